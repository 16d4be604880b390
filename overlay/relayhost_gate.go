package overlay

import (
	"net"
	"net/netip"
	"sync"

	"overlay/coord/trust"
)

// Bounds of a relay's TCP connections.
const (
	maxRelayAnonymous = 64   // of one network, not yet or not known to be members'
	maxRelayStrangers = 4096 // of all networks together
	maxRelayMember    = 8    // of one member
)

// relayGate counts a relay's TCP connections: by the network they come from
// until they turn out to be a member's, then by member. It is safe for
// concurrent use.
type relayGate struct {
	net.Listener

	mu        sync.Mutex
	strangers int
	networks  map[netip.Prefix]int
	members   map[trust.Key]int
}

func newRelayGate(l net.Listener) *relayGate {
	return &relayGate{Listener: l, networks: map[netip.Prefix]int{}, members: map[trust.Key]int{}}
}

// Accept gives the next connection there is room for; others are closed.
func (g *relayGate) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if r := g.enter(c); r != nil {
			return r, nil
		}
		_ = c.Close()
	}
}

func (g *relayGate) enter(c net.Conn) *relayConn {
	source := customer(c.RemoteAddr())
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.strangers >= maxRelayStrangers || g.networks[source] >= maxRelayAnonymous {
		return nil
	}
	g.strangers++
	g.networks[source]++
	return &relayConn{Conn: c, gate: g, source: source}
}

// customer is what a stranger's connections are counted by: the addresses that
// one customer of a provider has.
func customer(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 24
	if ip.Is6() {
		bits = 56
	}
	p, _ := ip.Prefix(bits) // the zero address is one network as well
	return p
}

// relayConn is a connection with its place in the gate.
type relayConn struct {
	net.Conn
	gate   *relayGate
	source netip.Prefix

	// Under the gate's mutex.
	member trust.Key // zero: a stranger's
	closed bool
}

// admit counts the connection as a member's. It says false when that member has
// too many.
func (c *relayConn) admit(member trust.Key) bool {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case c.closed || c.member != trust.Key{}:
		return true
	case g.members[member] >= maxRelayMember:
		return false
	}
	g.leave(c.source)
	g.members[member]++
	c.member = member
	return true
}

func (g *relayGate) leave(source netip.Prefix) {
	g.strangers--
	if g.networks[source]--; g.networks[source] == 0 {
		delete(g.networks, source)
	}
}

// NetConn is the connection inside, for who sets its options. It is not to be
// closed: Close gives the place up.
func (c *relayConn) NetConn() net.Conn { return c.Conn }

// Close gives the place up.
func (c *relayConn) Close() error {
	g := c.gate
	g.mu.Lock()
	if !c.closed {
		c.closed = true
		if c.member == (trust.Key{}) {
			g.leave(c.source)
		} else if g.members[c.member]--; g.members[c.member] == 0 {
			delete(g.members, c.member)
		}
	}
	g.mu.Unlock()
	return c.Conn.Close()
}
