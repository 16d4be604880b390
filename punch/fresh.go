package punch

import (
	"net/netip"
	"slices"
	"time"
)

const (
	// freshAfter is how long calls may fail before two peers meet from fresh
	// sockets; those are prepared freshAhead earlier.
	freshAfter = 800 * time.Millisecond
	freshAhead = 300 * time.Millisecond
	// Proposals that do not lead to a path are repeated, the first few soon, because
	// signals may be lost, then with back-off; after one that was agreed to, its
	// checks come first.
	minFreshGap = 200 * time.Millisecond
	maxFreshGap = time.Minute
	soonFresh   = 5
	// freshRate is how many proposals of a peer are answered in a second.
	freshRate   = 6
	freshChecks = 2 * time.Second
	// freshFor is how long a socket is kept open, and its mapping surely as a server
	// saw it.
	freshFor = 20 * time.Second
	// freshAgain is how soon another socket is prepared.
	freshAgain = 300 * time.Millisecond
)

// fresh is a spare socket whose mapping is known and meets no flow of the past.
//
// A router that accepts packets itself takes the port that a packet of nobody's
// flow came to, for as long as more of them come: a check that overtook the signal
// which announces it, or what a relay sent to a node that was gone. What the node
// sends there then leaves from another port, which nobody knows. From two fresh
// sockets, and with the word of the one that it is open for the other, nothing of
// the kind can be in the way.
type fresh struct {
	port   uint16         // zero: there is none
	since  time.Time      // when it was taken
	mapped netip.AddrPort // zero: not known
	again  time.Time      // no other one before
	misses int            // of its predecessors that no server answered
}

// outing is how the meeting of fresh sockets with one peer stands.
type outing struct {
	next    time.Time // not proposed before
	gap     time.Duration
	count   int       // proposals
	told    uint16    // port of our socket that the peer was told of
	spent   bool      // it was agreed to
	asked   time.Time // the peer proposed; zero: it did not, or was answered
	answers bucket
	theirs  netip.AddrPort
}

// seekFresh proposes a meeting, or agrees to one, when calls fail between two
// sides whose mappings are endpoint-independent.
func (a *Agent) seekFresh(p *peer, now time.Time) {
	switch {
	case a.cfg.OpenSockets == nil || a.cfg.Signal == nil:
	case !p.fresh.asked.IsZero():
		a.agreeFresh(p, now)
	case p.direct() != nil:
		p.fresh = outing{}
	default:
		a.proposeFresh(p, now)
	}
}

func (a *Agent) proposeFresh(p *peer, now time.Time) {
	o, start := &p.fresh, p.freshStart(now)
	if start.IsZero() || !a.steady() || a.samePublic(p, false) || now.Before(later(start, o.next).Add(-freshAhead)) {
		return
	}
	if !a.leads(p) && now.Sub(start) > freshFor {
		return // who does not propose by then never does, or is waited for in agreeFresh
	}
	if o.spent {
		a.spend(o.told, now)
		o.spent = false
	}
	if !a.prepareFresh(now) || !a.leads(p) || now.Before(later(start, o.next)) {
		return
	}
	if !p.talk.spare(now, signalRate) {
		o.next = now.Add(minFreshGap)
		return
	}
	if o.count++; o.count <= soonFresh {
		o.gap = minFreshGap
	} else {
		o.gap = min(2*o.gap, maxFreshGap)
	}
	o.next, o.told = now.Add(o.gap), a.hard.fresh.port
	a.signal(p, signalFresh, now)
}

// freshStart is when meetings may begin; zero: nothing is looked for, or the peer
// does not answer calls.
func (p *peer) freshStart(now time.Time) time.Time {
	if p.search.Since.IsZero() || !p.search.Answered || !p.wanted(now) {
		return time.Time{}
	}
	return p.search.Since.Add(freshAfter)
}

// freshNext is when seekFresh has something to do again; zero: after an event.
func (a *Agent) freshNext(p *peer, now time.Time) time.Time {
	if a.cfg.OpenSockets == nil {
		return time.Time{}
	}
	if !p.fresh.asked.IsZero() {
		next := p.fresh.asked.Add(hardAnswer)
		for _, at := range []time.Time{a.hard.fresh.again, now.Add(p.talk.wait(signalRate))} {
			if at.After(now) {
				next = earliest(next, at)
			}
		}
		return next
	}
	start := p.freshStart(now)
	if p.direct() != nil || start.IsZero() {
		return time.Time{}
	}
	var next time.Time
	begin := later(start, p.fresh.next)
	for _, at := range []time.Time{begin.Add(-freshAhead), begin, a.hard.fresh.again} {
		if at.After(now) {
			next = earliest(next, at)
		}
	}
	return next
}

// steady reports whether our mappings are endpoint-independent, as far as a new
// socket shows: those of the main one may differ because ports are taken.
func (a *Agent) steady() bool {
	mapped, differ := a.seen4()
	return len(mapped) > 0 && (!differ || a.hard.nat.easy())
}

// prepareFresh reports whether there is a fresh socket, and prepares one.
func (a *Agent) prepareFresh(now time.Time) bool {
	h := &a.hard
	f := &h.fresh
	if f.mapped.IsValid() && now.Sub(f.since) < freshFor {
		return true
	}
	if !h.job.next.IsZero() || now.Before(f.again) {
		return false
	}
	a.spend(f.port, now)
	ports, ok := a.sockets(1, now)
	if !ok || len(ports) == 0 {
		return false
	}
	*f = fresh{port: ports[0], since: now, again: now.Add(freshAgain), misses: f.misses}
	h.job = job{fresh: true, began: now, next: now}
	for _, s := range a.sampleServers() {
		h.job.add(f.port, s, now)
	}
	a.notify()
	return false
}

// freshSampled takes what servers say of the mapping.
func (a *Agent) freshSampled(samples []Sample, now time.Time) {
	f := &a.hard.fresh
	if len(samples) > 0 && samples[0].Local == f.port {
		f.mapped, f.misses = samples[0].Mapped, 0
		a.log.Debug("fresh socket", "port", f.port, "mapped", f.mapped)
	} else {
		f.misses = min(f.misses+1, 8)
		f.again = now.Add(freshAgain << f.misses)
		a.spend(f.port, now)
	}
	a.wakeHard(now)
}

// spend gives a fresh socket up, unless a path leads through it.
func (a *Agent) spend(port uint16, now time.Time) {
	h := &a.hard
	if port == 0 || port != h.fresh.port {
		return
	}
	h.fresh = fresh{again: h.fresh.again, misses: h.fresh.misses}
	if a.socketsInUse(now)[port] || !slices.Contains(h.open, port) {
		return
	}
	h.open = slices.DeleteFunc(h.open, func(one uint16) bool { return one == port })
	if a.cfg.CloseSockets != nil {
		a.effects = append(a.effects, func() { a.cfg.CloseSockets([]uint16{port}) })
	}
}

// agreeFresh opens our NAT for the socket that the peer told of, and tells it of
// ours. The peer checks at full TTL; our checks answer its.
func (a *Agent) agreeFresh(p *peer, now time.Time) {
	o := &p.fresh
	if now.Sub(o.asked) >= hardAnswer || !a.steady() || !a.observed(p, o.theirs) {
		a.log.Debug("fresh sockets do not meet", "peer", p, "steady", a.steady(), "observed", a.observed(p, o.theirs))
		o.asked = time.Time{}
		return
	}
	if !a.prepareFresh(now) || !p.talk.ready(now, signalRate) {
		return
	}
	o.asked = time.Time{}
	f := a.hard.fresh
	if f.mapped.Addr() == o.theirs.Addr() {
		return
	}
	if q := a.learn(p, o.theirs, f.port); q != nil {
		a.sendCheck(p, q, outgoing{now: now, from: q.from(), ttl: openerTTL})
		if q.sent.Equal(now) { // or the limits held it back, and nothing is open
			a.signal(p, signalMeet, now)
		}
	}
}

// freshSignal takes what a peer says about fresh sockets.
func (a *Agent) freshSignal(p *peer, s *signal, now time.Time) {
	o, f := &p.fresh, a.hard.fresh
	to := s.hard.addr
	a.log.Debug("fresh socket of the peer", "peer", p, "told", o.told == f.port, "spent", o.spent, "observed", a.observed(p, to))
	switch {
	case a.cfg.OpenSockets == nil:
	case s.kind == signalFresh && !a.leads(p) && o.answers.take(now, freshRate):
		o.asked, o.theirs = now, to
	case s.kind == signalMeet && a.leads(p) && f.mapped.IsValid() && f.port == o.told && !o.spent && a.observed(p, to):
		q := a.learn(p, to, f.port)
		if q == nil || to.Addr() == f.mapped.Addr() {
			return
		}
		o.spent, o.next = true, later(o.next, now.Add(freshChecks))
		o.gap, o.count = max(o.gap, freshChecks/2), max(o.count, soonFresh)
		q.clear = now.Add(openFor)
		q.attempt, q.next, q.held = 0, now, false
	}
}
