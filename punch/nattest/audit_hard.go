package nattest

import (
	"net/netip"
	"slices"
	"time"

	"overlay/punch"
)

// The limits of hard rounds.
const (
	maxSpare       = 256
	maxHardRate    = 200  // packets per second
	maxHardPackets = 1200 // per round
	hardPause      = time.Minute
	// hardGap is how long a round may be silent and still be the same.
	hardGap = 10 * time.Second
)

// hardRounds is what an audit knows of a node's hard rounds.
type hardRounds struct {
	began, last time.Time
	count       int // packets of the round
	total       int // of all rounds
	rounds      int
	times       []time.Time              // of the last second
	few         []lone                   // of the last minute, from and to so few that they are no round
	lone        int                      // of all
	lonesome    map[spareKey][]time.Time // of them, of the last second; small rounds come from several sockets
}

// lone is a packet from a spare socket.
type lone struct {
	port uint16
	to   netip.AddrPort
	at   time.Time
}

// maxFresh is from how many spare sockets, and to how many addresses and ports, a
// node may send in a minute outside of hard rounds.
const maxFresh = 8

// spareKey is a spare socket and where a packet came to it from.
type spareKey struct {
	port uint16
	from netip.AddrPort
}

// ofRound tells packets of hard rounds: they leave from a spare socket that heard
// nothing from there, or go to where nobody said that a peer is.
func (a *audit) ofRound(to netip.AddrPort, how sending) bool {
	if how.port != 0 {
		return !a.spoken[spareKey{how.port, to}]
	}
	return to.Addr().Is4() && global(to.Addr()) && !how.named && !a.met[to]
}

// lonely tells packets that are no part of a hard round, because few sockets send
// any, to few others. If it becomes one, they are counted after all.
func (a *audit) lonely(to netip.AddrPort, how sending, now time.Time) bool {
	h := &a.hard
	if how.port == 0 || now.Sub(h.last) <= hardGap {
		return false
	}
	h.few = slices.DeleteFunc(h.few, func(l lone) bool { return now.Sub(l.at) >= hardPause })
	h.few = append(h.few, lone{how.port, to, now})
	ports, targets := map[uint16]bool{}, map[netip.AddrPort]bool{}
	for _, l := range h.few {
		ports[l.port], targets[l.to] = true, true
	}
	if len(ports) <= maxFresh && len(targets) <= maxFresh {
		h.lone++
		return true
	}
	before := slices.DeleteFunc(h.few[:len(h.few)-1], func(l lone) bool { return now.Sub(l.at) > hardGap })
	h.few = nil
	for _, l := range before {
		a.countInRound(l.at)
	}
	return false
}

// sentInRound judges a packet of a hard round, or of sockets that meet.
func (a *audit) sentInRound(to netip.AddrPort, how sending, now time.Time) {
	if !how.observed {
		a.fault("packet from a spare socket, or to a guessed port, to %s, where no server saw a node", to)
	}
	if !a.lonely(to, how, now) {
		a.countInRound(now)
		return
	}
	if n := count(a.hard.lonesome, spareKey{how.port, to}, now); n > maxPerEndpoint {
		a.fault("%d packets within a second from a spare socket to %s, which is silent", n, to)
	}
	if n := count(a.addresses, to.Addr(), now); n > maxPerAddress {
		a.fault("%d packets within a second to %s, some from spare sockets", n, to.Addr())
	}
}

func (a *audit) countInRound(now time.Time) {
	h := &a.hard
	if now.Sub(h.last) > hardGap {
		if h.rounds > 0 && now.Sub(h.began) < hardPause {
			a.fault("hard round %v after another", now.Sub(h.began))
		}
		h.began, h.count = now, 0
		h.rounds++
	}
	h.last = now
	h.count++
	h.total++
	if h.count > maxHardPackets {
		a.fault("%d packets in a hard round", h.count)
	}
	h.times = append(slices.DeleteFunc(h.times, func(at time.Time) bool { return now.Sub(at) >= time.Second }), now)
	if n := len(h.times); n > maxHardRate {
		a.fault("%d packets of a hard round within a second", n)
	}
}

// Hard returns how many hard rounds the node took part in, and their packets.
func (n *Node) Hard() (rounds, packets int) {
	n.audit.mu.Lock()
	defer n.audit.mu.Unlock()
	return n.audit.hard.rounds, n.audit.hard.total
}

// Lone returns how many packets left from spare sockets outside of hard rounds, to
// where these had heard nothing from.
func (n *Node) Lone() int {
	n.audit.mu.Lock()
	defer n.audit.mu.Unlock()
	return n.audit.hard.lone
}

// Spare returns how many sockets beside the main one are open.
func (n *Node) Spare() int { return len(n.spareSockets()) }

func (n *Node) spareSockets() []uint16 {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	return slices.Clone(n.spare)
}

func (n *Node) openSockets(count int) ([]uint16, error) {
	w := n.world
	w.mu.Lock()
	var ports []uint16
	for len(ports) < count {
		port := uint16(firstPort + w.chance.IntN(1<<16-firstPort))
		if port != n.port && !slices.Contains(n.spare, port) {
			ports = append(ports, port)
			n.spare = append(n.spare, port)
		}
	}
	open := len(n.spare)
	w.mu.Unlock()
	if open > maxSpare {
		n.audit.report("too many sockets are open")
	}
	for _, port := range ports {
		n.host.Listen(port, func(b []byte, from netip.AddrPort) { n.receiveAt(port, b, from) })
	}
	return ports, nil
}

func (n *Node) closeSockets(ports []uint16) {
	for _, port := range ports {
		n.host.Listen(port, nil)
	}
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	n.spare = slices.DeleteFunc(n.spare, func(port uint16) bool { return slices.Contains(ports, port) })
}

// has reports whether the socket of that port is open.
func (n *Node) has(local netip.AddrPort) bool {
	return local.Port() == 0 || slices.Contains(n.spareSockets(), local.Port())
}

// portOf returns the port of a socket as the agent names it.
func (n *Node) portOf(local netip.AddrPort) uint16 {
	if local.Port() != 0 {
		return local.Port()
	}
	return n.port
}

// name notes where the node is, as the server or its system says: peers may send
// there from now on.
func (n *Node) name(list []punch.Candidate) {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	for _, c := range list {
		if c.Type == punch.Host || slices.Equal(c.Token, Token(n.session, c.Addr)) {
			n.world.named[c.Addr] = true
		}
	}
}

// knows tells whether somebody published an address, and whether the server saw
// a node at its IP address.
func (w *World) knows(addr netip.AddrPort) (named, observed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for known := range w.named {
		observed = observed || known.Addr() == addr.Addr()
	}
	return w.named[addr] || w.planted[addr], observed
}
