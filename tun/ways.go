package tun

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync/atomic"
)

// Bounds of paths through relays.
const (
	// relayedPort is the lowest port of a handle that is a path: the number of
	// the link is added. Those of handles that drop are below.
	relayedPort = 1 << 15
	maxWays     = 8 // of one peer
)

// flowHeader is the size of what every datagram of a flow begins with. A relay
// finds both ends of the flow by it; it is the same in both directions and in
// all of a pair's flows, whichever relay they go through.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+-----------------------------------------------+
//	|     0x90      |                                               |
//	+---------------+      hash of both WireGuard keys              |
//	|                                                               |
//	+---------------------------------------------------------------+
//	|     WireGuard message, fragment, STUN message or signal       |
const flowHeader = 8

// A Link is how datagrams go to a relay and come from it. The zero value is one
// that is down.
type Link struct {
	// Addr is the UDP address of the relay, which the WireGuard port sends to.
	// Flow frames from other addresses are dropped.
	Addr netip.AddrPort
	// Send, where it is not nil, takes what would go to Addr: flow frames, each
	// behind its length in two bytes, big endian. It must copy them, and must not
	// block. Flow frames from Addr, or else from the Addr before, are taken
	// nevertheless: they were under way.
	Send func(run []byte)
}

// A Way is one path to a peer through a relay: the number of the Link, and what
// all datagrams begin with.
type Way struct {
	Link   uint16
	Header [flowHeader]byte
}

// relay is one Link. It stays the same object while the Link changes. Safe for
// concurrent use.
type relay struct {
	id  uint16
	now atomic.Pointer[route] // nil: down
}

// route is where a relay is. It does not change.
type route struct {
	to   *endpoint // its UDP port; nil: not known
	send func(run []byte)
}

// accepts reports whether flow frames may come from an address.
func (l *relay) accepts(from netip.AddrPort) bool {
	r := l.now.Load()
	return r != nil && r.to != nil && r.to.to == from
}

// setLink makes l the Link of a number.
func (t *peers) setLink(id uint16, l Link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	one := t.relay(id)
	old := one.now.Load()
	if !l.Addr.IsValid() && l.Send == nil {
		one.now.Store(nil)
	} else {
		r := &route{send: l.Send}
		switch {
		case l.Addr.IsValid():
			if r.to = t.ports[l.Addr]; r.to == nil {
				r.to = newEndpoint(l.Addr, nil)
			}
		case old != nil:
			r.to = old.to
		}
		one.now.Store(r)
	}
	clear(t.ports)
	for _, one := range t.relays {
		if r := one.now.Load(); r != nil && r.to != nil {
			t.ports[r.to.to] = r.to
		}
	}
}

// relay is that of a number. Call with mu held.
func (t *peers) relay(id uint16) *relay {
	if t.relays[id] == nil {
		t.relays[id] = &relay{id: id}
	}
	return t.relays[id]
}

// setWays makes list the paths of k through relays. Those that stay keep their
// endpoints. The result has nil for what cannot be a way; all of a stranger's.
func (t *peers) setWays(k Key, list []Way) []*endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	result := make([]*endpoint, len(list))
	p := t.keys[k]
	if p == nil {
		return result
	}
	var ways []*endpoint
	for i, w := range list {
		if w.Link == 0 || w.Link >= relayedPort || w.Header[0] != flowByte || len(ways) == maxWays ||
			slices.ContainsFunc(ways, func(e *endpoint) bool { return e.relay.id == w.Link }) {
			continue
		}
		result[i] = t.way(p, w)
		ways = append(ways, result[i])
	}
	for _, e := range p.ways {
		if !slices.Contains(ways, e) {
			t.block(e)
			p.also.CompareAndSwap(e, nil)
		}
	}
	p.ways = ways
	for _, e := range ways {
		t.paths[e.to] = e
	}
	return result
}

// way is the endpoint of a way, registered. Call with mu held.
func (t *peers) way(p *peer, w Way) *endpoint {
	at := netip.AddrPortFrom(p.home, relayedPort|w.Link)
	if i := slices.IndexFunc(p.ways, func(e *endpoint) bool { return e.to == at && e.head == w.Header }); i >= 0 {
		return p.ways[i]
	}
	e := newEndpoint(at, p)
	e.relay, e.head = t.relay(w.Link), w.Header
	name := binary.BigEndian.Uint64(e.head[:])
	t.flows[name] = append(t.flows[name], e)
	return e
}

// block forgets the endpoint of a way. Call with mu held.
func (t *peers) block(e *endpoint) {
	t.unlist(e)
	name := binary.BigEndian.Uint64(e.head[:])
	t.flows[name] = slices.DeleteFunc(t.flows[name], func(one *endpoint) bool { return one == e })
	if len(t.flows[name]) == 0 {
		delete(t.flows, name)
	}
}

// follow makes the way with a handle the path of k. False means that k has none
// such.
func (t *peers) follow(k Key, handle netip.AddrPort) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.paths[handle]
	if e == nil || e.relay == nil || e.peer != t.keys[k] {
		return false
	}
	e.peer.use(e)
	return true
}

// setCopy makes all messages to k go to an address, too, over the spare socket of a
// port, or a main one where that is 0. What is not a path of k means nowhere.
func (t *peers) setCopy(k Key, to netip.AddrPort, port uint16) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	p := t.keys[k]
	if p == nil {
		return
	}
	for _, e := range p.endpoints {
		if e.to == to && e.spare.local() == port && !e.drop && t.table(e.spare)[to] == e {
			p.also.Store(e)
			return
		}
	}
	p.also.Store(p.way(to))
}

// pathOf is the path of a peer to an address, as leading gives it.
func (t *peers) pathOf(k Key, to netip.AddrPort) *endpoint {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if p := t.keys[k]; p != nil {
		return t.leading(p, to)
	}
	return nil
}

// leading is the path of p to an address, the newest of several over different
// local ports. It is nil when there is none. Call with mu held.
func (t *peers) leading(p *peer, to netip.AddrPort) *endpoint {
	for _, e := range slices.Backward(p.endpoints) {
		if e.to == to && !e.drop && t.table(e.spare)[to] == e {
			return e
		}
	}
	return p.way(to)
}

// way is that of a handle, nil when there is none. Call with peers.mu held.
func (p *peer) way(handle netip.AddrPort) *endpoint {
	for _, e := range p.ways {
		if e.to == handle {
			return e
		}
	}
	return nil
}

// flow is the way whose datagrams begin with a header and came over a link, or
// from an address when that is 0. It is nil when there is none.
func (t *peers) flow(header uint64, link uint16, from netip.AddrPort) *endpoint {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, e := range t.flows[header] {
		if link != 0 && e.relay.id == link || link == 0 && e.relay.accepts(from) {
			return e
		}
	}
	return nil
}

// sender is the endpoint of an address from which something came to a spare
// socket, or to a main one when s is nil. It is nil when there is none.
func (t *peers) sender(a netip.AddrPort, s *spare) *endpoint {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if e := t.table(s)[a]; e != nil || s != nil {
		return e
	}
	return t.ports[a]
}

// SetLink says how datagrams reach the relay with a number from 1 to 0x7fff, and
// from where they come. It takes effect with the next datagram, of whatever peer.
func (d *Device) SetLink(id uint16, l Link) {
	l.Addr = netip.AddrPortFrom(l.Addr.Addr().Unmap(), l.Addr.Port())
	if id == 0 || id >= relayedPort || d.config.meshed(l.Addr.Addr()) {
		d.log.Warn("link not set", "link", id, "why", "number out of range or address inside the mesh")
		return
	}
	d.peers.setLink(id, l)
}

// SetWays makes list the peer's paths through relays, at most 8, one for each
// link. It returns their handles in the same order, which SetEndpoint, SetCopy
// and Send take: the peer's overlay address with the port 0x8000 + the link's
// number. A handle is the zero value for what is beyond these bounds, and when
// the peer is unknown. The paths that stay go on undisturbed.
func (d *Device) SetWays(k Key, list []Way) []netip.AddrPort {
	handles := make([]netip.AddrPort, len(list))
	for i, e := range d.peers.setWays(k, list) {
		if e != nil {
			e.mtu.Store(&d.bind.mtu)
			handles[i] = e.to
		}
	}
	return handles
}

// SetCopy makes all messages to a peer go to an address, too: a path it has or
// had, with the port of from, as given to SetEndpoint; or a handle of SetWays. The
// zero value, and what is none of these, ends it. The receiver drops what comes
// twice.
func (d *Device) SetCopy(k Key, to, from netip.AddrPort) {
	d.peers.setCopy(k, netip.AddrPortFrom(to.Addr().Unmap(), to.Port()), from.Port())
}

// Deliver takes flow frames that came from the relay of a link over its own
// connection: each behind its length in two bytes, big endian. It blocks until
// they are taken and run may be used again, or until the sockets are closed.
func (d *Device) Deliver(link uint16, run []byte) { d.bind.deliver(link, run) }
