package natlab

import "fmt"

// NAT is the kind of a home's router, in the words of RFC 4787.
type NAT string

const (
	// Public routes without translation and filters nothing: every laptop
	// has a public address.
	Public NAT = "public"
	// Masquerade is the Linux home router: endpoint-independent mapping
	// that preserves the port, address-and-port-dependent filtering, and
	// unsolicited packets to the router itself dropped.
	Masquerade NAT = "masquerade"
	// FullCone has endpoint-independent mapping and filtering.
	FullCone NAT = "full-cone"
	// OpenInput is Masquerade without the drop: a peer's early packet
	// reaches the router itself, takes the port there, and the laptop's
	// own packet to that peer leaves from another port.
	OpenInput NAT = "open-input"

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

const (
	postMasquerade = `chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }`

	preFullCone = `map eim { type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 1h; size 65535; }
chain pre { type nat hook prerouting priority dstnat; iifname "wan" meta l4proto udp dnat to udp dport map @eim; }
chain post { type nat hook postrouting priority srcnat;
	oifname "wan" meta l4proto udp update @eim { udp sport timeout 1h : ip saddr . udp sport };
	oifname "wan" masquerade; }`

	dropInput = `chain in { type filter hook input priority 0; iifname "wan" ct state established,related accept; iifname "wan" drop; }`

	dropForward = `chain fw { type filter hook forward priority 0; iifname "wan" ct state established,related accept; iifname "wan" drop; }`

	mappedForward = `chain fw { type filter hook forward priority 0; iifname "wan" ct state established,related accept; iifname "wan" ct status dnat accept; iifname "wan" drop; }`

	noUDPForward = `chain fw { type filter hook forward priority 0; meta l4proto udp drop; iifname "wan" ct state established,related accept; iifname "wan" drop; }`

	only443Forward = `chain fw { type filter hook forward priority 0; policy drop; iifname "wan" ct state established accept; oifname "wan" tcp dport 443 accept; }`

	noForward = `chain fw { type filter hook forward priority 0; policy drop; }`
)

// natRules is what a router's kind is made of: chains of the nat table and
// chains that filter.
type natRules struct{ nat, input, forward string }

func (n NAT) rules() (string, error) {
	r, ok := map[NAT]natRules{
		Public:     {},
		Masquerade: {postMasquerade, dropInput, dropForward},
		FullCone:   {preFullCone, dropInput, mappedForward},
		OpenInput:  {postMasquerade, "", dropForward},
		UDPBlocked: {postMasquerade, dropInput, noUDPForward},
		Only443:    {postMasquerade, dropInput, only443Forward},
		ProxyOnly:  {"", dropInput, noForward},
		ProxyAuth:  {"", dropInput, noForward},
	}[n]
	if !ok {
		return "", fmt.Errorf("no kind of NAT is called %q", string(n))
	}
	return fmt.Sprintf("table ip nat {\n%s\n}\ntable ip flt {\n%s\n%s\n}", r.nat, r.input, r.forward), nil
}
