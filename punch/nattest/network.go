package nattest

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// ErrUnreachable is returned by Host.Send when the host has no address of the
// destination's family.
var ErrUnreachable = errors.New("network is unreachable")

// node is what can be attached to a network: a host or a router's outer side.
type node interface {
	wire() Link
	receive(p packet) func()
}

// Network is one link-layer segment: the Internet or a LAN behind a router.
// Hosts on one LAN reach each other directly.
type Network struct {
	net     *Net
	router  *Router // nil: the Internet
	hosts   []*Host
	routers []*Router
}

// NewHost attaches a host by l. The prefixes are its addresses with the length
// of their subnet.
func (nw *Network) NewHost(l Link, addrs ...netip.Prefix) *Host {
	nw.net.mu.Lock()
	defer nw.net.mu.Unlock()
	h := &Host{net: nw.net, network: nw, link: l, addrs: addrs, ports: map[uint16]Receiver{}}
	nw.hosts = append(nw.hosts, h)
	return h
}

// NewRouter attaches a router by l under the address wan and returns it; its
// LAN is Router.LAN. IPv4 is translated as nat says. IPv6 addresses of the LAN
// are routed untranslated behind a stateful firewall with nat's filtering and
// lifetimes.
func (nw *Network) NewRouter(nat NAT, wan netip.Addr, l Link) *Router {
	nw.net.mu.Lock()
	defer nw.net.mu.Unlock()
	r := &Router{net: nw.net, outside: nw, link: l, wan: wan}
	r.table = newTable(nat, nw.net.rng)
	r.inside = &Network{net: nw.net, router: r}
	nw.routers = append(nw.routers, r)
	return r
}

// find returns the node of this segment that takes packets for dst, or nil.
func (nw *Network) find(dst netip.Addr) node {
	for _, h := range nw.hosts {
		if h.has(dst) {
			return h
		}
	}
	for _, r := range nw.routers {
		if r.wan == dst || dst.Is6() && r.inside.find(dst) != nil {
			return r
		}
	}
	return nil
}

// forward moves a packet that entered the segment towards its destination.
func (nw *Network) forward(p packet) func() {
	if nw.router == nil {
		if nw.net.parted[[2]netip.Addr{p.src.Addr(), p.dst.Addr()}] {
			return nil
		}
		for range coreHops {
			if !p.hop() {
				return nil
			}
		}
	}
	if to := nw.find(p.dst.Addr()); to != nil {
		nw.net.cross(to.wire(), p, func(p packet) func() {
			if nw.find(p.dst.Addr()) != to { // moved away meanwhile
				return nil
			}
			return to.receive(p)
		})
		return nil
	}
	if nw.router != nil {
		return nw.router.fromInside(p)
	}
	return nil
}

// Receiver takes a datagram. The bytes are valid only during the call.
type Receiver func(b []byte, from netip.AddrPort)

// Host is a machine with UDP ports.
type Host struct {
	net     *Net
	network *Network
	link    Link
	addrs   []netip.Prefix
	ports   map[uint16]Receiver
}

// Addrs returns the host's addresses with the lengths of their subnets.
func (h *Host) Addrs() []netip.Prefix {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	return slices.Clone(h.addrs)
}

// Listen hands the datagrams that arrive at port to recv; nil closes the port.
func (h *Host) Listen(port uint16, recv Receiver) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.ports[port] = recv
}

// Send sends b from the host's first address of the family of to. ttl 0 is the
// default of 64.
func (h *Host) Send(b []byte, fromPort uint16, to netip.AddrPort, ttl int) error {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	src, ok := h.source(to.Addr())
	if !ok {
		return fmt.Errorf("send to %s: %w", to, ErrUnreachable)
	}
	if ttl == 0 {
		ttl = defaultTTL
	}
	p := packet{src: netip.AddrPortFrom(src, fromPort), dst: to, ttl: ttl, payload: slices.Clone(b)}
	nw := h.network
	h.net.cross(h.link, p, nw.forward)
	return nil
}

// Move takes the host to another network, or to other addresses in the same.
// What is under way to it is lost; its ports stay open.
func (h *Host) Move(to *Network, addrs ...netip.Prefix) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.network.hosts = slices.DeleteFunc(h.network.hosts, func(o *Host) bool { return o == h })
	h.network, h.addrs = to, addrs
	to.hosts = append(to.hosts, h)
}

// SetLink replaces the host's link.
func (h *Host) SetLink(l Link) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.link = l
}

func (h *Host) wire() Link { return h.link }

func (h *Host) has(a netip.Addr) bool {
	return slices.ContainsFunc(h.addrs, func(p netip.Prefix) bool { return p.Addr() == a })
}

func (h *Host) source(to netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(h.addrs, func(p netip.Prefix) bool { return p.Addr().Is4() == to.Is4() })
	if i < 0 {
		return netip.Addr{}, false
	}
	return h.addrs[i].Addr(), true
}

// sourceTo returns the address that packets to a destination leave with.
func (h *Host) sourceTo(to netip.Addr) netip.Addr {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	a, _ := h.source(to)
	return a
}

func (h *Host) receive(p packet) func() {
	recv := h.ports[p.dst.Port()]
	if recv == nil {
		return nil
	}
	return func() { recv(p.payload, p.src) }
}

// Router joins a LAN to an outer network through a NAT.
type Router struct {
	net             *Net
	inside, outside *Network
	link            Link
	wan             netip.Addr
	table           *table
}

// LAN returns the network behind the router.
func (r *Router) LAN() *Network { return r.inside }

// SetLink replaces the link to the outer network.
func (r *Router) SetLink(l Link) {
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	r.link = l
}

// Reboot forgets all mappings.
func (r *Router) Reboot() {
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	r.table.flush()
}

// SetWAN changes the outer address, as a provider does over night: all mappings
// are gone with the old one.
func (r *Router) SetWAN(a netip.Addr) {
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	r.wan = a
	r.table.flush()
}

func (r *Router) wire() Link { return r.link }

// fromInside handles a packet of the LAN that is for somewhere else.
func (r *Router) fromInside(p packet) func() {
	if !p.hop() {
		return nil
	}
	if p.dst.Addr() == r.wan {
		return r.hairpin(p)
	}
	if p.src.Addr().Is4() {
		p.src = r.table.outbound(p.src, p.dst, r.wan)
	} else {
		p.src = r.table.outbound(p.src, p.dst, netip.Addr{})
	}
	if !p.src.IsValid() {
		return nil
	}
	r.net.cross(r.link, p, r.outside.forward)
	return nil
}

// hairpin turns a packet for the own outer address around (RFC 4787 REQ-9,
// external source address).
func (r *Router) hairpin(p packet) func() {
	if !r.table.nat.Hairpin {
		return nil
	}
	if p.src = r.table.outbound(p.src, p.dst, r.wan); !p.src.IsValid() {
		return nil
	}
	dst, ok := r.table.inbound(p.src, p.dst)
	if !ok {
		return nil
	}
	p.dst = dst
	return r.inside.forward(p)
}

// receive handles a packet from the outer network.
func (r *Router) receive(p packet) func() {
	dst, ok := r.table.inbound(p.src, p.dst)
	if !ok || !p.hop() {
		return nil
	}
	p.dst = dst
	if r.inside.find(dst.Addr()) == nil { // never back out
		return nil
	}
	return r.inside.forward(p)
}

// Part has the Internet lose all that two outer addresses send to each other.
func (n *Net) Part(a, b netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.parted[[2]netip.Addr{a, b}], n.parted[[2]netip.Addr{b, a}] = true, true
}

// Stray has a packet arrive at one outer address from another, as one that was
// under way for long.
func (n *Net) Stray(from, to netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.internet.forward(packet{src: from, dst: to, ttl: defaultTTL, payload: []byte("stray")})
}
