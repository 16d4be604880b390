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
)

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
	}[n]
	if !ok {
		return "", fmt.Errorf("no kind of NAT is called %q", string(n))
	}
	return fmt.Sprintf("table ip nat {\n%s\n}\ntable ip flt {\n%s\n%s\n}", r.nat, r.input, r.forward), nil
}
