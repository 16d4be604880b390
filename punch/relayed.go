package punch

import (
	"net/netip"
	"slices"
	"time"
)

const (
	// MaxRelays is how many relays one peer may have; further ones are ignored.
	MaxRelays = 8

	// relayTick is tick where a relay may get copies: they should not come late.
	relayTick = 50 * time.Millisecond
	// A check in doubt is one unanswered for max(2·RTT, minDoubt).
	minDoubt = 60 * time.Millisecond
	// doubtGap is the time between checks then; the more of them, the less does
	// mere loss have a path left.
	doubtGap = 20 * time.Millisecond
	// unknownRTT stands for that of a relay of which nobody gave an estimate.
	unknownRTT = 300 * time.Millisecond
	// maxCopying is how long two paths are used while one takes over that works.
	maxCopying = time.Second
	// doubtInterval is the least time between two calls of OnDoubt for a handle.
	doubtInterval = time.Second
)

// Relay is a relay over which a peer may be reached. Addr is its handle for this
// peer: datagrams that Config.Send gets for it go to the peer over the relay, and
// Receive gets it as the source of what comes from there. RTT is the estimated
// round trip between the two nodes, before checks measured it; zero: unknown. Here
// says that the peer was seen at the relay. Cost is added to its round trip where
// it is compared with other relays. Config.Forbidden should refuse handles,
// so that what still comes over a relay that was given up makes no candidate.
type Relay struct {
	Addr netip.AddrPort
	RTT  time.Duration
	Cost time.Duration
	Here bool
}

// copying is where everything sent to a peer goes a second time.
type copying struct {
	to    *pair     // nil: nowhere
	since time.Time // answers to checks that left earlier do not end it
	until time.Time // zero: until the path in use answers or is suspect
}

// SetRelays replaces the relays over which a peer may be reached now; unknown
// peers have none. Without a living direct path the best one is the path at
// once, before it answers.
func (a *Agent) SetRelays(k Key, list []Relay) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[k]
	if p == nil {
		return
	}
	now := time.Now()
	list = list[:min(len(list), MaxRelays)]
	p.pairs = slices.DeleteFunc(p.pairs, func(q *pair) bool {
		named := slices.ContainsFunc(list, func(r Relay) bool { return plain(r.Addr) == q.addr })
		if !q.relayed() || named {
			return false
		}
		a.forget(q)
		return true
	})
	for _, r := range list {
		p.setRelay(r, now)
	}
	a.reroute(p, now)
	a.schedule(p, now)
}

// setRelay adds or updates a relay. While there is no direct path, a relay where
// the peer came up is checked, and a call that nothing could carry is repeated.
func (p *peer) setRelay(r Relay, now time.Time) {
	addr := plain(r.Addr)
	if !addr.IsValid() {
		return
	}
	q := p.find(addr, 0)
	if q == nil {
		q = &pair{addr: addr, typ: Relayed, source: relay}
		p.pairs = append(p.pairs, q)
	}
	if !q.relayed() {
		return
	}
	if r.Here && !q.here {
		q.suspect = false
		if p.direct() == nil && p.wanted(now) {
			q.attempt, q.next = 0, now
			p.wantCall = p.wantCall || p.talked.Err != nil
		}
	}
	if q.here && !r.Here {
		q.valid = false
	}
	q.here, q.extra = r.Here, r.Cost
	if q.samples == 0 {
		q.rtt = r.RTT
	}
}

// reroute leaves relays that are gone, or over which the peer is not reached.
func (a *Agent) reroute(p *peer, now time.Time) {
	s, c := p.selected, p.copying.to
	lost := func(q *pair) bool { return q != nil && !slices.Contains(p.pairs, q) }
	if lost(c) {
		c = nil
	}
	best := p.relay(nil)
	switch {
	case s == nil:
		return
	case lost(s) && best == nil && c != nil: // back to the direct path, suspect as it is
		p.suspectSince = p.copying.until.Add(-giveUp)
		p.noteHistory(now)
		p.selected, p.copying, p.probe = c, copying{}, probe{}
		a.announce(p.path())
	case lost(s) && best == nil:
		a.drop(p, now)
	case lost(s):
		a.choose(p, best, now)
	case c == nil && p.copying.to != nil:
		a.copyTo(p, copying{})
	}
	s = p.selected
	if s == nil || best == nil || s == best || !best.reachable() {
		return
	}
	unfit := s.suspect && !best.suspect || !s.reachable()
	if s.relayed() && unfit || !s.relayed() && s.suspect {
		a.choose(p, best, now)
	}
}

// relayed reports whether a pair is the handle of a relay.
func (q *pair) relayed() bool { return q.source&relay != 0 }

// reachable reports whether the peer is, or was, at the relay.
func (q *pair) reachable() bool { return q.here || q.valid }

// expected is the RTT as far as it is known.
func (q *pair) expected() time.Duration {
	if q.rtt == 0 && q.relayed() {
		return unknownRTT
	}
	return q.rtt
}

// direct returns the path in use if it is not suspect and no relay; else nil.
func (p *peer) direct() *pair {
	if q := p.selected; q != nil && !q.suspect && !q.relayed() {
		return q
	}
	return nil
}

// relay returns the best relayed pair but one; nil: there is none.
func (p *peer) relay(except *pair) *pair {
	var best *pair
	for _, q := range p.pairs {
		if q.relayed() && q != except && (best == nil || q.before(best)) {
			best = q
		}
	}
	return best
}

// before reports whether a relay is worth more than another.
func (q *pair) before(other *pair) bool {
	switch {
	case q.suspect != other.suspect:
		return !q.suspect
	case q.reachable() != other.reachable():
		return q.reachable()
	}
	return q.expected()+q.extra < other.expected()+other.extra
}

// fallback returns the relay that takes over from the path in use.
func (p *peer) fallback() *pair {
	q := p.relay(p.selected)
	if q == nil || !q.reachable() || p.selected.relayed() && q.suspect {
		return nil
	}
	return q
}

// tick is how often the counters of an active peer are read.
func (p *peer) tick() time.Duration {
	if p.relay(nil) != nil {
		return relayTick
	}
	return tick
}

// relayFirst gives a peer without a path a relay, until something better is
// found.
func (a *Agent) relayFirst(p *peer, now time.Time) {
	if p.selected != nil || !p.wanted(now) {
		return
	}
	if q := p.relay(nil); q != nil {
		a.choose(p, q, now)
	}
}

// leave is what a change of the network does to the path of a peer. On families
// of which an address was lost it cannot even get copies.
func (a *Agent) leave(p *peer, now time.Time, lost [2]bool) {
	s, copied := p.selected, p.copying.to != nil
	p.copying = copying{}
	if s == nil {
		return
	}
	if s.relayed() {
		if copied {
			a.announce(p.path())
		}
		return
	}
	gone := lost[family(s.addr)] && !a.near(s.addr)
	q := p.fallback()
	if gone {
		p.selected, p.moved = nil, true
	}
	switch {
	case q != nil:
		a.choose(p, q, now)
	case gone:
		a.announce(Path{Peer: p.key})
	case copied:
		a.announce(p.path())
	}
}

// drop ends the path in use; a relay takes its place if there is one.
func (a *Agent) drop(p *peer, now time.Time) {
	relayed := p.selected.relayed()
	p.selected, p.copying, p.probe = nil, copying{}, probe{}
	p.wantCall = p.wanted(now)
	if q := p.relay(nil); q != nil && (!relayed || p.wanted(now)) {
		a.choose(p, q, now)
		return
	}
	a.announce(Path{Peer: p.key})
}

// handOver decides who gets copies after the path changed from old. From a relay
// to a direct path it is the relay, until the direct one answered once more; the
// other way it is the direct path, until it is given up.
func (p *peer) handOver(old *pair, now time.Time) {
	q, c := p.selected, p.copying
	p.copying = copying{}
	switch {
	case old == nil:
	case q.relayed() && old.relayed() && c.to != nil && !c.to.relayed():
		p.copying = c
	case !slices.Contains(p.pairs, old):
	case !q.relayed() && old.relayed():
		p.copying = copying{to: old, since: now, until: now.Add(maxCopying)}
		p.uncertain = true
		p.startProbe(now)
	case !q.relayed():
	case old.quality.left != Quality{}: // it works, after all
	case !old.relayed():
		p.copying = copying{to: old, until: now.Add(giveUp)}
	case old.suspect:
		p.copying = copying{to: old, until: now.Add(maxCopying)}
	}
}

// doubt has everything go to the best relay, too, because the path in use owes an
// answer. From here on data proves nothing: the peer may do the same, and it may
// come over that relay.
func (a *Agent) doubt(p *peer, now time.Time) {
	q := p.copying.to
	if q == nil {
		q = p.relay(p.selected)
	}
	if q == nil || !q.relayed() || !q.reachable() {
		return
	}
	if p.selected.relayed() {
		p.probe.strict = true
	} else {
		p.uncertain = true
	}
	if q != p.copying.to {
		p.probe.again = now
	}
	a.copyTo(p, copying{to: q, since: p.copying.since})
}

// confirm takes an answer of the path in use to a check that left at sent.
func (a *Agent) confirm(p *peer, sent time.Time) {
	if sent.Before(p.copying.since) {
		return
	}
	p.clear()
	if q := p.copying.to; q != nil && (q.relayed() || !p.selected.relayed()) {
		a.copyTo(p, copying{})
	}
}

// copyTo sets where copies go, and tells when that changes.
func (a *Agent) copyTo(p *peer, c copying) {
	changed := c.to != p.copying.to
	p.copying = c
	if changed {
		a.announce(p.path())
	}
}

// endCopies ends copies whose time is over. A direct path that a relay took over
// from, and that did not answer since, is given up with them.
func (a *Agent) endCopies(p *peer, now time.Time) {
	c := p.copying
	if c.to == nil || c.until.IsZero() || now.Before(c.until) {
		return
	}
	a.copyTo(p, copying{})
	if c.to.relayed() || !p.selected.relayed() {
		return
	}
	for _, q := range p.pairs {
		if !q.relayed() {
			q.valid, q.suspect, q.samples = false, false, 0
		}
	}
	p.wantCall = p.wanted(now)
}

// expect notes that an answer over a relay is awaited.
func (q *pair) expect(now time.Time) {
	if q.relayed() && q.reachable() && q.late.IsZero() {
		q.late = now.Add(max(2*q.expected(), minDoubt))
	}
}

// reportLate tells of relays over which an answer is overdue.
func (a *Agent) reportLate(p *peer, now time.Time) {
	for _, q := range p.pairs {
		if q.late.IsZero() || now.Before(q.late) {
			continue
		}
		q.late = time.Time{}
		if a.cfg.OnDoubt == nil || now.Sub(q.doubted) < doubtInterval {
			continue
		}
		q.doubted = now
		addr := q.addr
		a.effects = append(a.effects, func() { a.cfg.OnDoubt(addr) })
	}
}
