// Package nattest is an Internet in memory: hosts, NATs and links with delay,
// jitter, loss and duplication, for tests of punch under a fake clock.
//
// A Net belongs in a testing/synctest bubble: it keeps time with time.AfterFunc,
// so that hours of traffic pass in milliseconds. All packets go through one event
// queue ordered by time and then by age, and all chance comes from one seed, so a
// world differs between two runs only where the agents under test draw randomness
// of their own.
//
// The Internet has two routers between any two attachments. Every router on the
// way, NATs included, takes one from the TTL; a packet with TTL 2 dies after the
// own NAT and never touches the far one. ICMP is not modelled.
package nattest

import (
	"container/heap"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

const (
	defaultTTL = 64
	coreHops   = 2
)

// Link is the wire between a host or router and the network it is attached to.
// A packet crosses the link of its sender and then that of its receiver. The
// zero Link is instant and perfect.
type Link struct {
	Delay     time.Duration // one way
	Jitter    time.Duration // 0 to Jitter more, drawn per packet: packets overtake each other
	Loss      float64       // probability in each direction
	Duplicate float64       // probability that a packet arrives twice
	Down      bool          // cut: nothing passes
}

// Net is a simulated Internet. Its methods, and those of everything on it, are
// safe for concurrent use.
type Net struct {
	mu       sync.Mutex
	rng      *rand.Rand
	events   eventQueue
	seq      uint64
	timer    *time.Timer
	draining bool
	internet *Network
	parted   map[[2]netip.Addr]bool // by Part
}

// New returns an empty Internet whose chance comes from seed.
func New(seed uint64) *Net {
	n := &Net{rng: rand.New(rand.NewPCG(seed, 0x6e6174)), parted: map[[2]netip.Addr]bool{}}
	n.internet = &Network{net: n}
	return n
}

// Internet returns the public network.
func (n *Net) Internet() *Network { return n.internet }

// After calls f once d has passed, in order with the packets.
func (n *Net) After(d time.Duration, f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.schedule(d, func() func() { return f })
}

// event is something that happens at an instant. step runs with the lock held;
// what it returns runs without.
type event struct {
	at   time.Time
	seq  uint64
	step func() func()
}

type eventQueue []event

func (q eventQueue) Len() int      { return len(q) }
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }

func (q eventQueue) Less(i, j int) bool {
	if !q[i].at.Equal(q[j].at) {
		return q[i].at.Before(q[j].at)
	}
	return q[i].seq < q[j].seq
}

func (q *eventQueue) Pop() any {
	old := *q
	last := old[len(old)-1]
	old[len(old)-1] = event{}
	*q = old[:len(old)-1]
	return last
}

func (n *Net) schedule(d time.Duration, step func() func()) {
	n.seq++
	heap.Push(&n.events, event{at: time.Now().Add(d), seq: n.seq, step: step})
	if !n.draining {
		n.arm()
	}
}

func (n *Net) arm() {
	if len(n.events) == 0 {
		return
	}
	d := time.Until(n.events[0].at)
	if n.timer == nil {
		n.timer = time.AfterFunc(d, n.drain)
		return
	}
	n.timer.Reset(d)
}

// drain runs what is due. Only one drain runs at a time, so receivers are called
// one after the other.
func (n *Net) drain() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.draining {
		return
	}
	n.draining = true
	for len(n.events) > 0 && !n.events[0].at.After(time.Now()) {
		after := heap.Pop(&n.events).(event).step()
		if after != nil {
			n.mu.Unlock()
			after()
			n.mu.Lock()
		}
	}
	n.draining = false
	n.arm()
}

// packet is a UDP datagram on its way. The payload is shared and never written.
type packet struct {
	src, dst netip.AddrPort
	ttl      int
	payload  []byte
}

// hop takes one from the TTL and reports whether the packet lives on.
func (p *packet) hop() bool {
	p.ttl--
	return p.ttl > 0
}

// cross carries p over l and then calls arrive with the lock held.
func (n *Net) cross(l Link, p packet, arrive func(packet) func()) {
	copies := 1
	if l.Duplicate > 0 && n.rng.Float64() < l.Duplicate {
		copies = 2
	}
	for range copies {
		if l.Down || l.Loss > 0 && n.rng.Float64() < l.Loss {
			continue
		}
		d := l.Delay
		if l.Jitter > 0 {
			d += time.Duration(n.rng.Int64N(int64(l.Jitter)))
		}
		n.schedule(d, func() func() { return arrive(p) })
	}
}
