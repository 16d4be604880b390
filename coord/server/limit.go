package server

import (
	"errors"
	"hash/maphash"
	"net"
	"net/netip"
	"sync"
	"time"

	"overlay/coord/trust"
)

const (
	maxAnonymous = 16               // connections of one network served before they are members'
	maxWaiting   = 240              // more of them that wait for their turn
	maxAllAnon   = 4096             // connections of all networks together
	maxOfMember  = 32               // connections of one member
	waitForTurn  = 4 * time.Second  // less than what a client waits for an answer
	anonymousAge = 30 * time.Second // of a connection that does not become a member's

	failuresPerSource = 10 // failed joins a minute
	failuresTotal     = 100
	stunPerSource     = 50 // plain Binding requests a second
	stunPerMember     = 50 // those of a session
	stunBurst         = 200
	bucketSlots       = 4096
)

// network is what limits count by: one customer's addresses.
func network(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 24
	if a.Is6() {
		bits = 56
	}
	p, _ := a.Prefix(bits) // fails only for the zero address, one network as well
	return p
}

func networkOf(a net.Addr) netip.Prefix {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return network(tcp.AddrPort().Addr())
	}
	return netip.Prefix{}
}

// buckets limits how often something happens per network, or per member. It has a
// fixed size, so nobody can fill memory with networks; two that share a slot, which
// nobody can predict, share the limit. It is safe for concurrent use.
type buckets[K comparable] struct {
	rate  float64 // per second
	burst float64
	seed  maphash.Seed
	now   func() time.Time

	mu    sync.Mutex
	slots [bucketSlots]bucket
}

type bucket struct {
	spent float64 // as of at
	at    time.Time
}

func newBuckets[K comparable](rate, burst float64, now func() time.Time) *buckets[K] {
	return &buckets[K]{rate: rate, burst: burst, seed: maphash.MakeSeed(), now: now}
}

// left says how many are left to a key; it spends none.
func (b *buckets[K]) left(key K) float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.burst - b.refill(key).spent
}

// spend takes one from a key's bucket. It says false, and takes none, when
// the bucket is empty.
func (b *buckets[K]) spend(key K) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.refill(key)
	if s.spent+1 > b.burst {
		return false
	}
	s.spent++
	return true
}

func (b *buckets[K]) refill(key K) *bucket {
	s := &b.slots[maphash.Comparable(b.seed, key)%bucketSlots]
	now := b.now()
	s.spent = max(0, s.spent-max(0, now.Sub(s.at).Seconds())*b.rate)
	s.at = now
	return s
}

// gate bounds the connections that are nobody's yet. Of each network only
// maxAnonymous are served at once, some more wait for their turn, the rest are
// closed. Those that turn out to be a member's leave it and are counted by
// member. It is safe for concurrent use.
type gate struct {
	mu      sync.Mutex
	lanes   map[netip.Prefix]*lane
	total   int
	members map[trust.Key]int
}

func newGate() *gate {
	return &gate{lanes: map[netip.Prefix]*lane{}, members: map[trust.Key]int{}}
}

// lane is one network's share.
type lane struct {
	held int           // connections, served or waiting
	turn chan struct{} // one element for each that is served
}

// gatedListener gives every connection its place in the gate.
type gatedListener struct {
	net.Listener
	gate *gate
}

// Accept implements net.Listener.
func (l gatedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if g := l.gate.enter(c); g != nil {
			return g, nil
		}
		_ = c.Close()
	}
}

func (g *gate) enter(c net.Conn) *gatedConn {
	g.mu.Lock()
	defer g.mu.Unlock()
	source := networkOf(c.RemoteAddr())
	l := g.lanes[source]
	if g.total >= maxAllAnon || l != nil && l.held >= maxAnonymous+maxWaiting {
		return nil
	}
	if l == nil {
		l = &lane{turn: make(chan struct{}, maxAnonymous)}
		g.lanes[source] = l
	}
	l.held++
	g.total++
	return &gatedConn{Conn: c, gate: g, lane: l, source: source, closed: make(chan struct{})}
}

func (g *gate) leave(source netip.Prefix, l *lane) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if l.held--; l.held == 0 {
		delete(g.lanes, source)
	}
}

// take counts one more connection of a member, or says that it has too many.
func (g *gate) take(member trust.Key) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.members[member] >= maxOfMember {
		return false
	}
	g.members[member]++
	return true
}

func (g *gate) give(member trust.Key) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.members[member]--; g.members[member] == 0 {
		delete(g.members, member)
	}
}

// gatedConn reads nothing before it is its turn.
type gatedConn struct {
	net.Conn
	gate   *gate
	lane   *lane
	source netip.Prefix
	closed chan struct{}

	mu       sync.Mutex
	begun    bool
	serving  bool // holds a turn
	released bool
	ended    bool
	age      *time.Timer // closes who keeps a turn for nothing
	member   trust.Key   // whose connection it is counted as; zero: nobody's
}

var errNoTurn = errors.New("too many connections of this network")

// Read implements net.Conn.
func (c *gatedConn) Read(b []byte) (int, error) {
	if err := c.begin(); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c *gatedConn) begin() error {
	c.mu.Lock()
	first := !c.begun && !c.released
	c.begun = true
	c.mu.Unlock()
	if !first {
		return nil
	}
	wait := time.NewTimer(waitForTurn)
	defer wait.Stop()
	select {
	case c.lane.turn <- struct{}{}:
	case <-c.closed:
		return net.ErrClosed
	case <-wait.C:
		return errNoTurn
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.serving = !c.released; !c.serving {
		<-c.lane.turn
		return nil
	}
	c.age = time.AfterFunc(anonymousAge, func() { _ = c.Close() })
	return nil
}

// release makes room for the next of the network: the connection is a member's,
// or it has ended.
func (c *gatedConn) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released {
		return
	}
	c.released = true
	if c.serving {
		c.age.Stop()
		<-c.lane.turn
	}
	c.gate.leave(c.source, c.lane)
}

// admit makes the connection a member's. It says false when that member has too
// many.
func (c *gatedConn) admit(member trust.Key) bool {
	c.mu.Lock()
	known := c.ended || c.member != trust.Key{}
	if !known && c.gate.take(member) {
		c.member, known = member, true
	}
	c.mu.Unlock()
	if known {
		c.release()
	}
	return known
}

// NetConn is the connection inside, for who sets its options. It is not to be
// closed.
func (c *gatedConn) NetConn() net.Conn { return c.Conn }

// Close implements net.Conn.
func (c *gatedConn) Close() error {
	c.release()
	c.mu.Lock()
	if !c.ended {
		c.ended = true
		close(c.closed)
		if c.member != (trust.Key{}) {
			c.gate.give(c.member)
		}
	}
	c.mu.Unlock()
	return c.Conn.Close()
}
