package natlab

import (
	"fmt"
	"net/netip"
	"strings"
)

// NAT is the kind of a home's router, in the words of RFC 4787.
type NAT string

const (
	// Public routes without translation and filters nothing: every laptop
	// has a public address.
	Public NAT = "public"
	// Firewall is Public behind a stateful firewall.
	Firewall NAT = "firewall"
	// Masquerade is the Linux home router: endpoint-independent mapping
	// that preserves the port, address-and-port-dependent filtering, and
	// unsolicited packets to the router itself dropped.
	Masquerade NAT = "masquerade"
	// FullCone has endpoint-independent mapping and filtering.
	FullCone NAT = "full-cone"
	// Restricted is FullCone with address-dependent filtering, and
	// PortRestricted with address-and-port-dependent one.
	Restricted     NAT = "restricted"
	PortRestricted NAT = "port-restricted"
	// OtherPort is Masquerade whose mappings have another port than the host.
	OtherPort NAT = "other-port"
	// OpenInput is Masquerade without the drop: a peer's early packet
	// reaches the router itself, takes the port there, and the laptop's
	// own packet to that peer leaves from another port.
	OpenInput NAT = "open-input"
	// Hairpin is Masquerade whose hosts reach each other by their mappings,
	// under which they see each other.
	Hairpin NAT = "hairpin"
	// DMZ passes everything on to the first laptop, and OneToOne that which
	// belongs to what the laptop has sent.
	DMZ      NAT = "dmz"
	OneToOne NAT = "one-to-one"
	// Reset is Masquerade that answers unsolicited TCP.
	Reset NAT = "reset"

	// Sequential has a mapping for every remote endpoint, each a port above
	// the last one, SequentialDown two ports below it.
	Sequential     NAT = "sequential"
	SequentialDown NAT = "sequential-down"
	// Random has a mapping for every remote endpoint, at any port.
	Random NAT = "random"
	// Block512, Block and Block2048 are Random within so many ports, Block
	// within 1024.
	Block512  NAT = "block-512"
	Block     NAT = "block-1024"
	Block2048 NAT = "block-2048"

	// ShortTimeouts is Masquerade that forgets flows after 5 s, and after
	// 10 s when both sides have sent.
	ShortTimeouts NAT = "short-timeouts"
	// SmallMTU is Masquerade on a line that carries 1280 bytes, and nobody
	// says so.
	SmallMTU NAT = "mtu-1280"
	// Lossy is Masquerade that loses a fifth of all packets each way.
	Lossy NAT = "lossy"
	// Policed is Masquerade that drops what is beyond 100 kB/s.
	Policed NAT = "policed"

	// UDPBlocked is Masquerade that passes no UDP on, without a word.
	UDPBlocked NAT = "udp-blocked"
	// Only443 passes nothing on but TCP to port 443 and its answers.
	Only443 NAT = "only-443"
	// ProxyOnly passes nothing on. Its router runs an HTTP proxy for the LAN
	// (RFC 9110 section 9.3.6), which connects to port 443 only; see
	// Home.Proxy.
	ProxyOnly NAT = "proxy-only"
	// ProxyAuth is ProxyOnly whose proxy wants a user and a password.
	ProxyAuth NAT = "proxy-auth"
)

// proxied says that the home's router runs a proxy.
func (n NAT) proxied() bool { return n == ProxyOnly || n == ProxyAuth }

// routed says that the home's laptops have public addresses.
func (n NAT) routed() bool { return n == Public || n == Firewall }

const (
	blockStart    = 30000
	sequenceStart = 20000
	sequencePorts = 2000

	smallMTU = 1280
)

// In the rules WAN stands for the router's public address, and FIRST for that
// of the first laptop.
const (
	wanWord, firstWord = "WAN", "FIRST"

	postMasquerade = `chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }`

	// The map has the port of every host, by which it is reached again. It is
	// exact as long as no two hosts use the same port.
	eimMap = `map eim { type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 1h; size 65535; }`

	preFullCone = eimMap + `
chain pre { type nat hook prerouting priority dstnat; iifname "wan" meta l4proto udp dnat to udp dport map @eim; }
chain post { type nat hook postrouting priority srcnat;
	oifname "wan" meta l4proto udp update @eim { udp sport timeout 1h : ip saddr . udp sport };
	oifname "wan" masquerade; }`

	preHairpin = eimMap + `
chain pre { type nat hook prerouting priority dstnat; ip daddr WAN meta l4proto udp dnat to udp dport map @eim; }
chain post { type nat hook postrouting priority srcnat;
	oifname "wan" meta l4proto udp update @eim { udp sport timeout 1h : ip saddr . udp sport };
	oifname "wan" masquerade;
	iifname != "wan" ct status dnat meta l4proto udp update @eim { udp sport timeout 1h : ip saddr . udp sport };
	iifname != "wan" ct status dnat snat to WAN; }`

	preOneToOne = `chain pre { type nat hook prerouting priority dstnat; iifname "wan" dnat to FIRST; }
chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }`

	dropInput = `chain in { type filter hook input priority 0; iifname "wan" ct state established,related accept; iifname "wan" drop; }`

	resetInput = `chain in { type filter hook input priority 0; iifname "wan" ct state established,related accept; iifname "wan" meta l4proto tcp reject with tcp reset; iifname "wan" drop; }`

	dropForward = `chain fw { type filter hook forward priority 0; iifname "wan" ct state established,related accept; iifname "wan" drop; }`

	mappedForward = `chain fw { type filter hook forward priority 0; iifname "wan" ct state established,related accept; iifname "wan" ct status dnat accept; iifname "wan" drop; }`

	restrictedForward = `set seen { type ipv4_addr . inet_service . ipv4_addr; flags dynamic,timeout; timeout 1h; size 65535; }
chain fw { type filter hook forward priority 0;
	oifname "wan" meta l4proto udp update @seen { ip saddr . udp sport . ip daddr timeout 1h }
	iifname "wan" ct state established,related accept;
	iifname "wan" meta l4proto udp ct status dnat ip daddr . udp dport . ip saddr @seen accept;
	iifname "wan" drop; }`

	noUDPForward = `chain fw { type filter hook forward priority 0; meta l4proto udp drop; iifname "wan" ct state established,related accept; iifname "wan" drop; }`

	only443Forward = `chain fw { type filter hook forward priority 0; policy drop; iifname "wan" ct state established accept; oifname "wan" tcp dport 443 accept; }`

	noForward = `chain fw { type filter hook forward priority 0; policy drop; }`

	lossyLine = `
chain line { type filter hook forward priority -10; numgen random mod 100 < 20 drop; }`

	policedLine = `
chain line { type filter hook forward priority -10; limit rate over 100 kbytes/second burst 10 kbytes drop; }`

	silentAboutMTU = `
chain silent { type filter hook output priority 0; icmp type destination-unreachable drop; }`
)

// postPorts masquerades UDP in a way of its own.
func postPorts(how string) string {
	return fmt.Sprintf(`chain post { type nat hook postrouting priority srcnat; oifname "wan" meta l4proto udp masquerade %s; oifname "wan" masquerade; }`, how)
}

// postBlock gives every flow any of the ports of a block.
func postBlock(ports int) string {
	return postPorts(fmt.Sprintf("to :%d-%d fully-random", blockStart, blockStart+ports-1))
}

// postSequence gives every flow the next port. Without the map the ports would
// have their bytes swapped.
func postSequence(step int) string {
	first := sequenceStart
	if step < 0 {
		first -= step * sequencePorts
	}
	all := make([]string, sequencePorts)
	for i := range all {
		all[i] = fmt.Sprintf("%d : %d", i, first+i*step)
	}
	return postPorts(fmt.Sprintf("to :numgen inc mod %d map { %s }", sequencePorts, strings.Join(all, ", ")))
}

// natRules is what a router's kind is made of: chains of the nat table and
// chains that filter.
type natRules struct{ nat, input, forward string }

func (n NAT) rules() (string, error) {
	r, ok := map[NAT]natRules{
		Public:         {},
		Firewall:       {"", dropInput, dropForward},
		Masquerade:     {postMasquerade, dropInput, dropForward},
		FullCone:       {preFullCone, dropInput, mappedForward},
		Restricted:     {preFullCone, dropInput, restrictedForward},
		PortRestricted: {preFullCone, dropInput, dropForward},
		OtherPort:      {postPorts("to :20000-29999"), dropInput, dropForward},
		OpenInput:      {postMasquerade, "", dropForward},
		Hairpin:        {preHairpin, dropInput, dropForward},
		DMZ:            {preOneToOne, dropInput, mappedForward},
		OneToOne:       {preOneToOne, dropInput, dropForward},
		Reset:          {postMasquerade, resetInput, dropForward},
		Sequential:     {postSequence(1), dropInput, dropForward},
		SequentialDown: {postSequence(-2), dropInput, dropForward},
		Random:         {postPorts("fully-random"), dropInput, dropForward},
		Block512:       {postBlock(512), dropInput, dropForward},
		Block:          {postBlock(1024), dropInput, dropForward},
		Block2048:      {postBlock(2048), dropInput, dropForward},
		ShortTimeouts:  {postMasquerade, dropInput, dropForward},
		SmallMTU:       {postMasquerade, dropInput, dropForward + silentAboutMTU},
		Lossy:          {postMasquerade, dropInput, dropForward + lossyLine},
		Policed:        {postMasquerade, dropInput, dropForward + policedLine},
		AddressMapped:  {userPost, dropInput, userForward},
		RandomOpen:     {userPost, dropInput, userForward},
		Stride:         {userPost, dropInput, userForward},
		UDPBlocked:     {postMasquerade, dropInput, noUDPForward},
		Only443:        {postMasquerade, dropInput, only443Forward},
		ProxyOnly:      {"", dropInput, noForward},
		ProxyAuth:      {"", dropInput, noForward},
	}[n]
	if !ok {
		return "", fmt.Errorf("no kind of NAT is called %q", string(n))
	}
	return fmt.Sprintf("table ip nat {\n%s\n}\ntable ip flt {\n%s\n%s\n}", r.nat, r.input, r.forward), nil
}

// fill puts addresses into rules.
func fill(rules string, wan, first netip.Addr) string {
	return strings.NewReplacer(wanWord, wan.String(), firstWord, first.String()).Replace(rules)
}

// bound says that the rules have the router's public address in them.
func (n NAT) bound() bool { return n == Hairpin }

// setUp is what a router of the kind has besides its rules.
func (n NAT) setUp() script {
	var s script
	if n == ShortTimeouts {
		s.sysctl("net/netfilter/nf_conntrack_udp_timeout", 5)
		s.sysctl("net/netfilter/nf_conntrack_udp_timeout_stream", 10)
	}
	return s
}
