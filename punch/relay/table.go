package relay

import (
	"sync/atomic"
	"time"

	"overlay/punch"
)

const (
	nodeLife    = 90 * time.Second // since the last authenticated control message
	flowLife    = 5 * time.Minute  // since the last datagram or OPEN
	expireEvery = 5 * time.Second
	// memoryLife is how long the sequence numbers of a node that is gone are
	// kept: as long as a cookie it used can be valid.
	memoryLife = 2 * cookieAge

	maxNodes     = 1 << 14
	maxFlows     = 1 << 17
	maxNodeFlows = 1 << 12
	maxWays      = 4                      // UDP transports of one node: addresses and ports of ours
	usedEvery    = int64(5 * time.Second) // how exactly a flow's last use is known
	halvesPart   = 4                      // one node alone may open one of so many flows
)

// node is one admitted node.
type node struct {
	key     punch.Key
	session session

	active atomic.Pointer[transport]          // where its datagrams go; nil: nowhere now
	ways   [maxWays]atomic.Pointer[transport] // validated addresses
	tls    atomic.Pointer[transport]          // the connection
	sent   meter                              // bytes, in all flows
	fair   meter                              // of them, within its share of all
	asked  meter                              // control messages
	moves  meter                              // challenges of its own
	told   meter                              // answers to Binding requests

	// Guarded by Server.mu.
	device [32]byte
	last   [transportKinds]sequence // of the messages of each kind of transport
	chosen sequence                 // that made active what it is
	heard  int64
	flows  int
	halves int  // of them, those that only this node asked for
	gone   bool // forgotten but for last
}

// at reports whether a datagram from a socket address is the node's.
func (n *node) at(name *sockaddr) bool {
	for i := range n.ways {
		if t := n.ways[i].Load(); t != nil && t.name == *name {
			return true
		}
	}
	return false
}

// uses reports whether a message on t comes from where the node was validated.
func (n *node) uses(t *transport) bool {
	if t.conn != nil {
		return n.tls.Load() == t
	}
	return n.at(&t.name)
}

// settle takes a message on a validated transport into account. The caller holds
// Server.mu. It returns the connection that is replaced, if one is.
func (n *node) settle(t *transport, seq sequence, trial bool, now int64) (old stream) {
	n.last[t.kind()], n.heard = seq, now
	if t.conn != nil {
		if before := n.tls.Swap(t); before != nil && before != t {
			old = before.conn
			n.active.CompareAndSwap(before, t)
		}
	} else {
		t = n.way(t)
	}
	t.heard = now
	switch {
	case !trial && seq.after(n.chosen):
		n.chosen = seq
		n.active.Store(t)
	case n.active.Load() == nil:
		n.active.Store(t)
	}
	return old
}

// way puts a UDP transport into the table, instead of the one that was silent
// longest when there is no room. It returns the one that is there already.
func (n *node) way(t *transport) *transport {
	at := 0
	for i := range n.ways {
		w := n.ways[i].Load()
		if w == nil {
			at = i
			continue
		}
		if w.same(t) {
			return w
		}
		if o := n.ways[at].Load(); o != nil && w.heard < o.heard {
			at = i
		}
	}
	if old := n.ways[at].Swap(t); old != nil {
		n.active.CompareAndSwap(old, t)
	}
	return t
}

// prune forgets transports that are silent since a time. The caller holds
// Server.mu. It returns the connection to close, if it is among them.
func (n *node) prune(since int64) (old stream) {
	var lost [maxWays + 1]*transport
	for i := range n.ways {
		if t := n.ways[i].Load(); t != nil && t.heard <= since {
			n.ways[i].Store(nil)
			lost[i] = t
		}
	}
	if t := n.tls.Load(); t != nil && t.heard <= since {
		n.tls.Store(nil)
		lost[maxWays], old = t, t.conn
	}
	for _, t := range lost {
		if t != nil {
			n.fallBack(t)
		}
	}
	return old
}

// fallBack chooses another transport when a lost one was active: the last heard.
func (n *node) fallBack(lost *transport) {
	if n.active.Load() != lost {
		return
	}
	best := n.tls.Load()
	for i := range n.ways {
		if t := n.ways[i].Load(); t != nil && (best == nil || t.heard > best.heard) {
			best = t
		}
	}
	n.active.Store(best)
}

// flow is what two nodes send each other.
type flow struct {
	ends  [2]*node
	sent  [2]meter     // bytes, by sender
	used  atomic.Int64 // last datagram or OPEN
	asked [2]bool      // which ends sent an OPEN; guarded by Server.mu
}

// from is which end sent a datagram from a socket address, -1 for none.
func (f *flow) from(name *sockaddr) int {
	for i, n := range f.ends {
		if n.at(name) {
			return i
		}
	}
	return -1
}

// of is which end a node is, -1 for none.
func (f *flow) of(n *node) int {
	for i, end := range f.ends {
		if end == n {
			return i
		}
	}
	return -1
}

// touch notes that the flow is used.
func (f *flow) touch(now int64) {
	if now-f.used.Load() > usedEvery {
		f.used.Store(now)
	}
}

func (s *Server) flow(header uint64) *flow {
	s.mu.RLock()
	f := s.flows[header]
	s.mu.RUnlock()
	return f
}

// bySession is the node with a session, nil when it is not here.
func (s *Server) bySession(id sessionID) *node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := s.sessions[id]; n != nil && !n.gone {
		return n
	}
	return nil
}

// openFlow opens or refreshes the flow between a node and a peer, and says
// whether it is open now. The caller holds s.mu.
func (s *Server) openFlow(n *node, peer punch.Key, header uint64, now int64) bool {
	p := s.nodes[peer]
	if p == nil || p.gone || p == n {
		return false
	}
	if f := s.flows[header]; f != nil {
		return s.join(f, n, p, now)
	}
	// What nobody else asked for may take a part of the room only: a node could
	// have it all otherwise.
	if n.halves >= max(1, s.cfg.MaxFlows/halvesPart) {
		return false
	}
	if len(s.flows) >= s.cfg.MaxFlows || n.flows >= maxNodeFlows || p.flows >= maxNodeFlows {
		return false
	}
	f := &flow{ends: [2]*node{n, p}, asked: [2]bool{true, false}}
	f.used.Store(now)
	s.flows[header] = f
	n.halves++
	s.addFlows(n, 1)
	s.addFlows(p, 1)
	return true
}

// join notes that an end asks for a flow that is there.
func (s *Server) join(f *flow, n, p *node, now int64) bool {
	side := f.of(n)
	if side < 0 || f.of(p) < 0 {
		return false
	}
	f.used.Store(now)
	if !f.asked[side] {
		f.asked[side] = true
		p.halves--
	}
	return true
}

// addFlows changes the number of a node's flows, and with it the share of each node
// that has any. The caller holds s.mu.
func (s *Server) addFlows(n *node, by int) {
	before := n.flows
	n.flows += by
	switch {
	case before == 0:
		s.busy++
	case n.flows == 0:
		s.busy--
	default:
		return
	}
	if s.totalRate != nil {
		r := newRate(max(1, s.totalRate.per/uint64(max(2, s.busy))))
		s.fair.Store(&r)
	}
}

// expire forgets what was not used for long enough. What there is to forget is
// looked for under the lock that lets datagrams pass.
func (s *Server) expire() {
	now := s.clock()
	var flows []uint64
	var nodes []*node
	s.mu.RLock()
	for header, f := range s.flows {
		if now-f.used.Load() > int64(flowLife) {
			flows = append(flows, header)
		}
	}
	for _, n := range s.nodes {
		if n.stale(now) {
			nodes = append(nodes, n)
		}
	}
	s.mu.RUnlock()
	s.forget(flows, nodes, now)
}

// stale reports whether a transport of the node, or the node, is to be
// forgotten.
func (n *node) stale(now int64) bool {
	if now-n.heard > int64(nodeLife) {
		return !n.gone || now-n.heard > int64(nodeLife+memoryLife)
	}
	for i := range n.ways {
		if t := n.ways[i].Load(); t != nil && now-t.heard > int64(nodeLife) {
			return true
		}
	}
	t := n.tls.Load()
	return t != nil && now-t.heard > int64(nodeLife)
}

func (s *Server) forget(flows []uint64, nodes []*node, now int64) {
	var closing []stream
	gone := 0
	s.mu.Lock()
	for _, header := range flows {
		if f := s.flows[header]; f != nil && now-f.used.Load() > int64(flowLife) {
			s.removeFlow(header, f)
		}
	}
	for _, n := range nodes {
		if c := n.prune(now - int64(nodeLife) - 1); c != nil {
			closing = append(closing, c)
		}
		silent := now - n.heard
		if silent > int64(nodeLife) && !n.gone {
			s.lose(n)
			gone++
		}
		if silent > int64(nodeLife+memoryLife) {
			s.removeNode(n)
		}
	}
	if gone > 0 {
		s.sweepFlows()
	}
	s.mu.Unlock()
	if gone > 0 {
		s.log.Debug("silent nodes forgotten", "count", gone)
	}
	for _, c := range closing {
		c.close()
	}
}

// lose makes a node one that is gone. The caller holds s.mu.
func (s *Server) lose(n *node) {
	if !n.gone {
		n.gone = true
		s.present--
	}
}

// removeNode takes a node that is gone out of the tables. The caller holds s.mu.
func (s *Server) removeNode(n *node) {
	delete(s.nodes, n.key)
	delete(s.sessions, n.session.id)
}

// sweepFlows forgets the flows of nodes that are gone. The caller holds s.mu.
func (s *Server) sweepFlows() {
	for header, f := range s.flows {
		if f.ends[0].gone || f.ends[1].gone {
			s.removeFlow(header, f)
		}
	}
}

func (s *Server) removeFlow(header uint64, f *flow) {
	delete(s.flows, header)
	for side, n := range f.ends {
		s.addFlows(n, -1)
		if f.asked[side] && !f.asked[1-side] {
			n.halves--
		}
	}
}

// leave says that a connection ended. Its node stays known: it may come back or
// be reached over UDP.
func (s *Server) leave(n *node, t *transport) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n.tls.CompareAndSwap(t, nil) {
		n.fallBack(t)
	}
}

// Retain forgets at once the nodes of devices that are not to be kept, their
// flows and connections, and all that was verified before, of whomever: who is
// admitted from here on was verified after what keep knows. keep is called
// without locks. An admission that is being verified meanwhile is verified
// again.
func (s *Server) Retain(keep func(device [32]byte) bool) {
	devices := map[[32]byte]bool{}
	s.mu.Lock()
	s.retention++
	s.verified.clear()
	for _, n := range s.nodes {
		devices[n.device] = true
	}
	s.mu.Unlock()
	for d := range devices {
		devices[d] = keep(d)
	}
	var closing []stream
	removed := 0
	s.mu.Lock()
	for _, n := range s.nodes {
		if known, ok := devices[n.device]; ok && !known {
			if c := n.prune(s.clock()); c != nil {
				closing = append(closing, c)
			}
			s.lose(n)
			s.removeNode(n)
			removed++
		}
	}
	if removed > 0 {
		s.sweepFlows()
	}
	s.mu.Unlock()
	if removed > 0 {
		s.log.Info("nodes of withdrawn devices forgotten", "count", removed)
	}
	for _, c := range closing {
		c.close()
	}
}
