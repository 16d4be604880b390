package nattest

import (
	"fmt"
	"net/netip"
	"slices"

	"overlay/punch"
)

// handlePort is the lowest port of the handles that stand for relays.
const handlePort = 0x8000

// Relay forwards datagrams between the nodes of a World. A datagram crosses the
// access link of its sender, the relay's link twice, and the access link of its
// receiver; no NAT stands in the way, because every node keeps its link to the
// relay open.
type Relay struct {
	world *World
	port  uint16 // of the handles

	// Guarded by the world's mutex.
	link      Link
	withdrawn bool
	forwarded int
}

// NewRelay adds a relay that all nodes use from now on.
func (w *World) NewRelay(l Link) *Relay {
	w.mu.Lock()
	r := &Relay{world: w, port: handlePort | uint16(len(w.relays)+1), link: l}
	w.relays = append(w.relays, r)
	w.mu.Unlock()
	w.shareRelays()
	return r
}

// SetLink replaces the relay's link. The nodes are not told.
func (r *Relay) SetLink(l Link) {
	r.world.mu.Lock()
	defer r.world.mu.Unlock()
	r.link = l
}

// Withdraw ends the relay, and the nodes know; with false it comes back.
func (r *Relay) Withdraw(gone bool) {
	r.world.mu.Lock()
	r.withdrawn = gone
	r.world.mu.Unlock()
	r.world.shareRelays()
}

// Forwarded returns how many datagrams entered the relay.
func (r *Relay) Forwarded() int {
	r.world.mu.Lock()
	defer r.world.mu.Unlock()
	return r.forwarded
}

// shareRelays tells all agents which relays lead to their peers.
func (w *World) shareRelays() {
	w.mu.Lock()
	nodes := slices.Clone(w.nodes)
	w.mu.Unlock()
	for _, n := range nodes {
		for _, peer := range w.peersOf(n) {
			n.useRelays(peer)
		}
	}
}

// useRelays tells the agent which relays lead to a peer.
func (n *Node) useRelays(peer *Node) {
	w := n.world
	w.mu.Lock()
	var list []punch.Relay
	for _, r := range w.relays {
		if !r.withdrawn {
			rtt := 2 * (n.access.Delay + 2*r.link.Delay + peer.access.Delay)
			list = append(list, punch.Relay{Addr: r.handle(peer), RTT: rtt, Here: peer.agent != nil})
		}
	}
	a, some := n.agent, len(w.relays) > 0
	w.mu.Unlock()
	if a != nil && some {
		a.SetRelays(peer.key, list)
	}
}

// handle is the address under which agents know the way to a node over r.
func (r *Relay) handle(n *Node) netip.AddrPort {
	b := inMeshPrefix().Addr().As16()
	copy(b[8:], n.key[:8])
	return netip.AddrPortFrom(netip.AddrFrom16(b), r.port)
}

// relayTo returns the relay and the node that a handle stands for.
func (w *World) relayTo(handle netip.AddrPort) (*Relay, *Node, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := int(handle.Port()) - handlePort - 1
	if i < 0 || i >= len(w.relays) || !inMesh(handle) {
		return nil, nil, false
	}
	r := w.relays[i]
	for _, n := range w.nodes {
		if r.handle(n) == handle {
			return r, n, true
		}
	}
	return nil, nil, false
}

// forward carries a datagram from one node to another.
func (r *Relay) forward(from, to *Node, b []byte) error {
	w := r.world
	w.mu.Lock()
	if r.withdrawn {
		w.mu.Unlock()
		return fmt.Errorf("send over relay: %w", ErrUnreachable)
	}
	links := []Link{from.access, r.link, r.link, to.access}
	r.forwarded++
	w.mu.Unlock()
	w.Net.mu.Lock()
	defer w.Net.mu.Unlock()
	var hop func(packet) func()
	hop = func(p packet) func() {
		if len(links) == p.ttl {
			return func() { to.receive(p.payload, r.handle(from)) }
		}
		l := links[p.ttl]
		p.ttl++
		w.cross(l, p, hop)
		return nil
	}
	hop(packet{payload: slices.Clone(b)})
	return nil
}
