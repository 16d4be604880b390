package natlab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Site says where a home is, and what its router does. Its zero value but the
// kind of NAT is a home straight at the Internet, with a LAN of its own and
// without IPv6.
type Site struct {
	NAT NAT
	// LAN is the prefix of the LAN, an IPv4 one of at most 24 bits, which other
	// homes may have too; zero is one of its own.
	LAN netip.Prefix
	// Carrier is the NAT of the provider between the home and the Internet; see
	// Lab.Carrier. Nil is none.
	Carrier *Home
	// IPv6 needs a lab with Options.IPv6.
	IPv6 IPv6
}

// IPv6 is how a home is connected by IPv6, beside IPv4; empty is not at all.
type IPv6 string

const (
	// IPv6Open has public addresses and filters nothing.
	IPv6Open IPv6 = "open"
	// IPv6Firewall is IPv6Open behind a stateful firewall.
	IPv6Firewall IPv6 = "firewall"
	// IPv6Broken has addresses and routes, and passes nothing on.
	IPv6Broken IPv6 = "broken"
)

func (v IPv6) rules() string {
	const table = "\ntable ip6 flt {\n%s\n%s\n}"
	switch v {
	case IPv6Firewall:
		// Neighbours have to find each other.
		input := `chain in { type filter hook input priority 0; iifname "wan" ct state established,related accept; iifname "wan" meta l4proto icmpv6 accept; iifname "wan" drop; }`
		return fmt.Sprintf(table, input, dropForward)
	case IPv6Broken:
		return fmt.Sprintf(table, "", noForward)
	}
	return ""
}

// maxCarriers bounds the address plan: a carrier has a network of 100.64.0.0/10
// (RFC 6598), of which every home gets one address.
const (
	maxCarriers   = 100
	maxCustomers  = 200
	firstCustomer = 32
)

// Carrier attaches the NAT of a provider to the Internet, for homes to stand
// behind: see Site. It has a delay line of its own, which the packets of its
// homes cross on their way out, so that two of them are as far from each other
// as two homes of the lab. No UDP of one home reaches another by the address that
// the carrier gave it unless both know it.
func (l *Lab) Carrier(ctx context.Context, name string, nat NAT) (*Home, error) {
	l.mu.Lock()
	l.carriers++
	index := l.carriers
	l.mu.Unlock()
	if index > maxCarriers || nat.routed() {
		return nil, fmt.Errorf("add carrier %s: carrier %d of kind %s has no place in the address plan", name, index, nat)
	}
	lan := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(index), 0}), 24)
	c, err := l.HomeAt(ctx, name, Site{NAT: nat, LAN: lan})
	if err != nil || l.opts.Delay < 0 {
		return c, err
	}
	if err := c.startDelay(ctx); err != nil {
		return nil, fmt.Errorf("add carrier %s: %w", name, err)
	}
	return c, nil
}

// carrier says that homes stand behind this one.
func (h *Home) carrier() bool { return carrierGrade().Contains(h.lan.Addr()) }

func carrierGrade() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, 0, 0}), 10)
}

// startDelay has what the carrier's homes send cross a delay line before the NAT
// sees it, also what is for the carrier's public address; only what is for its
// inner one, and ARP, is not delayed.
func (h *Home) startDelay(ctx context.Context) error {
	if err := h.lab.runLine(h.node, newDelayLine(h.lab.opts.Delay, 0)); err != nil {
		return err
	}
	var s script
	s.sysctl("net/ipv4/conf/all/rp_filter", 0)
	s.sysctl("net/ipv4/conf/default/rp_filter", 0)
	s.add("ip rule add pref %d to %s lookup local", carrierPref-1, h.router())
	s.add("ip rule add pref %d lookup local", carrierPref+1)
	s.add("ip rule del pref 0 lookup local")
	return h.sh(ctx, append(s, lineSetup(delayDevice, delayTable)...))
}

// carrierPref is where the rules of a carrier's cables stand: before the local
// table, which is where the public address is.
const carrierPref = 10

// carrierRules keep the NAT from what has not crossed the delay line yet.
const carrierRules = `
table ip early {
	chain pre { type filter hook prerouting priority raw; iifname "port*" notrack; }
}`

// uplink is what a cable leads to: the core, or a carrier.
type uplink struct {
	node    *node
	gateway netip.Addr
	delayed bool
	pref    string // of the rule that sends packets into the delay line
}

func (l *Lab) internet() uplink { return uplink{l.core, gateway(), l.opts.Delay > 0, ""} }

// uplink is where the home's router is attached.
func (h *Home) uplink() uplink {
	if c := h.site.Carrier; c != nil {
		return uplink{c.node, c.router(), h.lab.opts.Delay > 0, fmt.Sprintf("pref %d", carrierPref)}
	}
	return h.lab.internet()
}

// narrow makes the line of a home that has SmallMTU one: what is too long for it
// vanishes at either end.
func (h *Home) narrow(ctx context.Context) error {
	if h.nat != SmallMTU {
		return nil
	}
	var core, self script
	up := h.uplink()
	core.add("ip link set %s mtu %d", h.port, smallMTU)
	core.add("nft -f - <<'RULES'\ntable ip silent {\n%s\n}\nRULES", silentAboutMTU)
	self.add("ip link set %s mtu %d", wanDevice, smallMTU)
	return errors.Join(up.node.sh(ctx, core), h.sh(ctx, self))
}

// address is the one of the home's router outside.
func (h *Home) address(index int) (netip.Addr, error) {
	c := h.site.Carrier
	if c == nil {
		return netip.AddrFrom4([4]byte{203, 0, 113, byte(index)}), nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.laptops >= maxCustomers {
		return netip.Addr{}, fmt.Errorf("carrier %s has no address left for another home", c.name)
	}
	host := c.lan.Addr().As4()
	host[3] += byte(firstCustomer + c.laptops)
	c.laptops++
	return netip.AddrFrom4(host), nil
}

// The addresses of IPv6: every home and every server has a prefix. On a cable
// both ends have a link-local one.
const (
	coreLink  = "fe80::1"
	outerLink = "fe80::2"
)

func homePrefix6(index int) netip.Prefix { return prefix6(1, index) }

func serverPrefix6(index int) netip.Prefix { return prefix6(2, index) }

func prefix6(kind byte, index int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, kind, 0, byte(index)}), 64)
}

// host6 is a host of a prefix.
func host6(p netip.Prefix, number byte) netip.Prefix {
	a := p.Addr().As16()
	a[15] = number
	return netip.PrefixFrom(netip.AddrFrom16(a), p.Bits())
}

// attach6 gives a cable to the core IPv6, and routes a prefix over it.
func (l *Lab) attach6(ctx context.Context, n *node, w wire, p netip.Prefix) error {
	var core, inner script
	core.add("ip -6 addr add %s/64 dev %s nodad", coreLink, w.port)
	core.add("ip -6 route add %s via %s dev %s", p, outerLink, w.port)
	if l.opts.Delay > 0 {
		core.add("ip -6 rule add iif %s lookup %d", w.port, delayTable)
	}
	inner.add("ip -6 addr add %s/64 dev %s nodad", outerLink, w.inner)
	inner.add("ip -6 route replace default via %s dev %s", coreLink, w.inner)
	return errors.Join(l.core.sh(ctx, core), n.sh(ctx, inner))
}

// serve6 gives a server IPv6.
func (l *Lab) serve6(ctx context.Context, h *Host, w wire, p netip.Prefix) error {
	h.addr6 = host6(p, 1).Addr()
	var s script
	s.add("ip -6 addr add %s dev eth0 nodad", host6(p, 1))
	if err := h.sh(ctx, s); err != nil {
		return err
	}
	return l.attach6(ctx, h.node, w, p)
}

// setUp6 gives the home's router IPv6.
func (h *Home) setUp6(ctx context.Context) error {
	if h.site.IPv6 == "" {
		return nil
	}
	if !h.lab.opts.IPv6 || h.site.Carrier != nil {
		return errors.New("IPv6 needs a lab that has it, and no carrier")
	}
	var s script
	s.sysctl("net/ipv6/conf/all/forwarding", 1)
	s.add("ip -6 addr add %s dev %s nodad", host6(h.lan6, 1), lanDevice)
	if err := h.sh(ctx, s); err != nil {
		return err
	}
	return h.lab.attach6(ctx, h.node, wire{h.port, wanDevice, h.wan}, h.lan6)
}

// laptop6 gives a laptop its address of IPv6, with the number that its address of
// IPv4 has.
func (h *Home) laptop6(ctx context.Context, host *Host) error {
	if h.site.IPv6 == "" {
		return nil
	}
	b := host.addr.As4()
	host.addr6 = host6(h.lan6, b[3]).Addr()
	var s script
	s.add("ip -6 addr add %s dev eth0 nodad", host6(h.lan6, b[3]))
	s.add("ip -6 route replace default via %s dev eth0", host6(h.lan6, 1).Addr())
	return host.sh(ctx, s)
}

// coreSetup6 is what the core needs for IPv6.
func coreSetup6(delayed bool) script {
	var s script
	s.sysctl("net/ipv6/conf/all/forwarding", 1)
	if delayed {
		s.add("ip -6 route add default dev %s table %d", delayDevice, delayTable)
	}
	return s
}

// Addr6 is the host's public address of IPv6; zero where it has none.
func (h *Host) Addr6() netip.Addr { return h.addr6 }

// Isolate keeps the laptops of a home apart, as a WLAN for guests does: they
// reach each other only where the router lets them.
func (h *Home) Isolate(ctx context.Context, laptops ...*Host) error {
	var s script
	for _, l := range laptops {
		s.add("ip link set %s type bridge_slave isolated on", l.port)
	}
	return h.sh(ctx, s)
}
