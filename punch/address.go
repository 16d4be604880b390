package punch

import "net/netip"

// plain removes what makes two spellings of one address differ.
func plain(addr netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
}

// socket names one of our sockets by its port; 0 is the node's UDP port.
func socket(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.Addr{}, port) }

// probeable reports whether packets may be sent to an address that somebody
// else named.
func probeable(addr netip.AddrPort) bool {
	ip := addr.Addr()
	switch {
	case !ip.IsValid(), addr.Port() == 0, ip.Is4In6():
		return false
	case ip.IsUnspecified(), ip.IsLoopback(), ip.IsMulticast():
		return false
	case ip.IsLinkLocalUnicast() && ip.Zone() == "":
		return false
	}
	if ip.Is4() {
		first := ip.As4()[0]
		return first != 0 && first < 240
	}
	return true
}

// Private reports whether an address means something only inside one site (RFC
// 1918, RFC 4193, link-local) or one carrier.
func Private(ip netip.Addr) bool {
	return ip.IsPrivate() || ip.IsLinkLocalUnicast() || CarrierGrade(ip)
}

// Routed reports whether the Internet routes to an address.
func Routed(ip netip.Addr) bool { return ip.IsGlobalUnicast() && !Private(ip) }

// CarrierGrade reports whether ip is in 100.64.0.0/10, which carriers use between
// their NAT and their customers (RFC 6598).
func CarrierGrade(ip netip.Addr) bool {
	if !ip.Is4() {
		return false
	}
	b := ip.As4()
	return b[0] == 100 && b[1]&0xc0 == 64
}

// broadcast reports whether ip is the directed broadcast address of prefix.
func broadcast(prefix netip.Prefix, ip netip.Addr) bool {
	if !ip.Is4() || prefix.Bits() > 30 || !prefix.Contains(ip) {
		return false
	}
	b := ip.As4()
	for bit := prefix.Bits(); bit < 32; bit++ {
		if b[bit/8]&(0x80>>(bit%8)) == 0 {
			return false
		}
	}
	return true
}

// onLink reports whether ip is reached without a router.
func (a *Agent) onLink(ip netip.Addr) bool {
	for _, prefix := range a.local {
		if prefix.Contains(ip) {
			return true
		}
	}
	return false
}

// near reports whether no NAT stands before addr, so that a check can do no harm
// there and need not wait.
func (a *Agent) near(addr netip.AddrPort) bool {
	return Private(addr.Addr()) || a.onLink(addr.Addr())
}

// allowed reports whether addr may be probed at all.
func (a *Agent) allowed(addr netip.AddrPort) bool {
	if !a.probeable(addr) || a.cfg.Forbidden != nil && a.cfg.Forbidden(addr) {
		return false
	}
	for _, prefix := range a.local {
		if broadcast(prefix, addr.Addr()) || prefix.Addr() == addr.Addr() && addr.Port() == a.port {
			return false
		}
	}
	return true
}

// eligible reports whether checks on a pair make sense now: private addresses
// only where both sides are at the same site.
func (a *Agent) eligible(p *peer, q *pair) bool {
	if q.relayed() {
		return true
	}
	if !a.allowed(q.addr) {
		return false
	}
	ip := q.addr.Addr()
	if q.valid || q.typ.revealed() || !Private(ip) || a.onLink(ip) {
		return true
	}
	return a.samePublic(p, false)
}

// samePublic reports whether both of us are at one public address; proven wants
// more than the peer's own word for that: the netmap's, which a server has checked,
// or a packet of the peer from there.
//
// The peer's word has to do where no server can be asked, but it lets a member have
// us send to private addresses that it cannot reach itself, beyond those on our
// links, which it may name anyway. What it gains is little: what leaves is a check,
// in the limits that hold towards any address, of which the member chooses nothing
// but the eight bytes of its nonce's tag, and learns nothing, because only an answer
// under our common key counts. So that it is no way to search a network either,
// there are few checks per call without a proof: see scarce.
func (a *Agent) samePublic(p *peer, proven bool) bool {
	for _, s := range a.servers {
		if !s.mapped.IsValid() {
			continue
		}
		for _, q := range p.pairs {
			outer := q.typ == ServerReflexive || q.typ == PortMapped
			sure := q.source&published != 0 || q.valid || !q.heard.IsZero()
			if outer && q.addr.Addr() == s.mapped.Addr() && (sure || !proven) {
				return true
			}
		}
	}
	return false
}

// scarce reports whether there are few checks on a pair until it answers: one with
// a global IPv6 host address, which nobody but the peer vouches for, and one with a
// private address beyond our links that is at our site by the peer's own word.
func (a *Agent) scarce(p *peer, q *pair) bool {
	ip := q.addr.Addr()
	switch {
	case q.valid, q.relayed(), q.typ.revealed():
		return false
	case q.typ == Host && ip.Is6() && !a.near(q.addr):
		return true
	}
	return Private(ip) && !a.onLink(ip) && !a.samePublic(p, true)
}
