package nattest

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"overlay/punch"
)

// dataHeader begins a packet of the data plane, as WireGuard's transport data
// does; the sender's key follows and stands for its authentication, then a
// counter, by which copies are told.
const (
	dataHeader = "\x04\x00\x00\x00"
	keyEnd     = len(dataHeader) + len(punch.Key{})
	dataLen    = keyEnd + 8
	// idle is the pause in sending after which new traffic wakes the agent.
	idle = time.Second
)

// traffic is what the data plane knows of a peer.
type traffic struct {
	path     punch.Path
	sources  map[netip.AddrPort]netip.Addr // the own addresses when the path was chosen
	moves    []Move
	sent     []time.Time
	arrivals []time.Time
	got      map[uint64]bool // counters that arrived
}

// Move is a change of the path to a peer; what only changes where copies go is
// none.
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
	b := append([]byte(dataHeader), n.key[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(len(t.sent)))
	wake := !t.path.Addr.IsValid() || len(t.sent) == 0 || time.Since(t.sent[len(t.sent)-1]) > idle
	t.sent = append(t.sent, time.Now())
	path, sources, agent := t.path, t.sources, n.agent
	w.mu.Unlock()
	if agent == nil {
		return
	}
	if wake {
		agent.Demand(to.key)
	}
	for _, way := range [][2]netip.AddrPort{{path.Addr, path.Local}, {path.Also, path.AlsoLocal}} {
		if to, local := way[0], way[1]; to.IsValid() {
			n.sendData(b, to, netip.AddrPortFrom(sources[to], local.Port()))
		}
	}
}

// sendData sends one packet, which may be lost. The source of a path is pinned,
// as the real data plane pins it by IP_PKTINFO: where the host has lost the
// address, nothing leaves, nor does it from a socket that is closed.
func (n *Node) sendData(b []byte, to, source netip.AddrPort) {
	if relay, peer, ok := n.world.relayTo(to); ok {
		_ = relay.forward(n, peer, b)
	} else if source.Addr() == n.host.sourceTo(to.Addr()) && n.has(source) {
		_ = n.host.Send(b, n.portOf(source), to, 0)
	}
}

// with returns the traffic with a peer. The world's mutex is held.
func (n *Node) with(peer punch.Key) *traffic {
	t := n.peers[peer]
	if t == nil {
		t = &traffic{got: map[uint64]bool{}}
		n.peers[peer] = t
	}
	return t
}

func (n *Node) receive(b []byte, from netip.AddrPort) { n.receiveAt(0, b, from) }

// receiveAt takes what came to a spare socket; 0 is the main one.
func (n *Node) receiveAt(port uint16, b []byte, from netip.AddrPort) {
	n.audit.received(b, from, port)
	if !bytes.HasPrefix(b, []byte(dataHeader)) {
		if a := n.current(); a != nil {
			a.Receive(b, from, netip.AddrPortFrom(netip.Addr{}, port))
		}
		return
	}
	if len(b) != dataLen {
		return
	}
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	t := n.with(punch.Key(b[len(dataHeader):]))
	counter := binary.BigEndian.Uint64(b[keyEnd:])
	if t.got[counter] {
		return
	}
	t.got[counter] = true
	t.arrivals = append(t.arrivals, time.Now())
}

func (n *Node) onPath(p punch.Path) {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	t := n.with(p.Peer)
	old := t.path
	t.path = p
	sources := map[netip.AddrPort]netip.Addr{p.Addr: n.host.sourceTo(p.Addr.Addr())}
	if source, ok := t.sources[p.Also]; ok {
		sources[p.Also] = source
	}
	if old.Addr == p.Addr && old.Local == p.Local && old.Also != p.Also {
		sources[p.Addr] = t.sources[p.Addr]
	} else {
		t.moves = append(t.moves, Move{At: time.Now(), Path: p})
	}
	t.sources = sources
}

func (n *Node) activity(peer punch.Key) punch.Activity {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	t := n.with(peer)
	return punch.Activity{Sent: uint64(len(t.sent)), Received: uint64(len(t.arrivals))}
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

// Missing returns how many packets that a peer sent in [since, until) did not
// arrive.
func (n *Node) Missing(from *Node, since, until time.Time) int {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	got, missing := n.with(from.key).got, 0
	for counter, at := range from.with(n.key).sent {
		if !at.Before(since) && at.Before(until) && !got[uint64(counter)] {
			missing++
		}
	}
	return missing
}
