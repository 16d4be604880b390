package nattest

import (
	"bytes"
	"net/netip"
	"sync/atomic"
	"time"

	"overlay/punch"
)

// dataHeader begins a packet of the data plane, as WireGuard's transport data
// does; the sender's key follows and stands for its authentication.
const (
	dataHeader = "\x04\x00\x00\x00"
	dataLen    = len(dataHeader) + len(punch.Key{})
	// idle is the pause in sending after which new traffic wakes the agent.
	idle = time.Second
)

// traffic is what the data plane knows of a peer.
type traffic struct {
	path     punch.Path
	source   netip.Addr // the own address when the path was chosen
	moves    []Move
	sent     uint64
	lastSent time.Time
	arrivals []time.Time
}

// Move is a change of the path to a peer.
type Move struct {
	At   time.Time
	Path punch.Path
}

// Stream sends a packet to a peer in every interval until stop is called.
func (n *Node) Stream(to *Node, every time.Duration) (stop func()) {
	var stopped atomic.Bool
	var tick func()
	tick = func() {
		if stopped.Load() {
			return
		}
		n.send(to)
		n.world.After(every, tick)
	}
	tick()
	return func() { stopped.Store(true) }
}

func (n *Node) send(to *Node) {
	w := n.world
	w.mu.Lock()
	t := n.with(to.key)
	t.sent++
	path, source, agent := t.path, t.source, n.agent
	wake := !path.Addr.IsValid() || time.Since(t.lastSent) > idle
	t.lastSent = time.Now()
	w.mu.Unlock()
	if agent == nil {
		return
	}
	if wake {
		agent.Demand(to.key)
	}
	// The source of a path is pinned, as the real data plane pins it by
	// IP_PKTINFO: where the host has lost the address, nothing leaves.
	if path.Addr.IsValid() && source == n.host.sourceTo(path.Addr.Addr()) {
		_ = n.host.Send(append([]byte(dataHeader), n.key[:]...), n.port, path.Addr, 0) // data may be lost
	}
}

// with returns the traffic with a peer. The world's mutex is held.
func (n *Node) with(peer punch.Key) *traffic {
	t := n.peers[peer]
	if t == nil {
		t = &traffic{}
		n.peers[peer] = t
	}
	return t
}

func (n *Node) receive(b []byte, from netip.AddrPort) {
	n.audit.received(b, from)
	if !bytes.HasPrefix(b, []byte(dataHeader)) {
		if a := n.current(); a != nil {
			a.Receive(b, from, netip.Addr{})
		}
		return
	}
	if len(b) != dataLen {
		return
	}
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	t := n.with(punch.Key(b[len(dataHeader):]))
	t.arrivals = append(t.arrivals, time.Now())
}

func (n *Node) onPath(p punch.Path) {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	t := n.with(p.Peer)
	t.path, t.source = p, n.host.sourceTo(p.Addr.Addr())
	t.moves = append(t.moves, Move{At: time.Now(), Path: p})
}

func (n *Node) activity(peer punch.Key) punch.Activity {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	t := n.with(peer)
	return punch.Activity{Sent: t.sent, Received: uint64(len(t.arrivals))}
}

// Path returns the path that the agent last reported for a peer.
func (n *Node) Path(to *Node) punch.Path {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	return n.with(to.key).path
}

// Moves returns the changes of the path to a peer since t.
func (n *Node) Moves(to *Node, t time.Time) []Move {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	var since []Move
	for _, m := range n.with(to.key).moves {
		if !m.At.Before(t) {
			since = append(since, m)
		}
	}
	return since
}

// Arrivals returns when data of a peer arrived since t.
func (n *Node) Arrivals(from *Node, t time.Time) []time.Time {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	var since []time.Time
	for _, at := range n.with(from.key).arrivals {
		if !at.Before(t) {
			since = append(since, at)
		}
	}
	return since
}
