package punch

import (
	"net/netip"
	"time"
)

const (
	// tick is how often counters are read while there is traffic, and silence
	// how long sending without receiving goes unquestioned.
	tick    = 100 * time.Millisecond
	silence = 100 * time.Millisecond
	// activeFor is how long after the last traffic a peer counts as active.
	activeFor = 10 * time.Second
	// Demand: the shortest time between two that count, the pause after which
	// traffic is new, and how long one is remembered.
	demandInterval = 50 * time.Millisecond
	demandPause    = 5 * time.Second
	demandMemory   = time.Minute

	// Consent to send (RFC 7675) and NAT keepalive.
	consentInterval = 5 * time.Second
	consentExpiry   = 30 * time.Second
	keepalive       = 25 * time.Second

	// A path is suspect when a check on it, repeated after RTT + probeMargin and
	// then every probeGap, is unanswered for max(3·RTT, minDeadline).
	minDeadline = 400 * time.Millisecond
	probeMargin = 20 * time.Millisecond
	probeGap    = 50 * time.Millisecond
	// minMargin is how much later than the RTT an answer may come while another
	// path has answered already.
	minMargin = 30 * time.Millisecond
	// quiet is how long a path is silent before the peer's use of another one
	// means something.
	quiet = 200 * time.Millisecond
	// recent is how old the answer of a path may be that takes over.
	recent = 15 * time.Second
	// giveUp is how long calling may fail while data is sent into nothing, and how
	// long a direct path that a relay took over from gets copies.
	giveUp = 5 * time.Second
	// remember is how long a pair that stopped answering stays valid.
	remember = 2 * time.Minute

	// A path takes over when it is 10 % and minGain better in minSamples samples.
	minGain    = 2 * time.Millisecond
	minSamples = 3
	// natCost is what a path that is not near has to be faster to be preferred.
	natCost = 3 * time.Millisecond
)

// probe is a check on the selected path that must be answered.
type probe struct {
	began    time.Time // zero: none
	again    time.Time
	early    time.Time // from here another path that answered wins; zero: never
	doubt    time.Time // from here a relay gets copies
	deadline time.Time
	strict   bool // on a relay: only an answer ends it, not data
}

// observe takes the counters of the data plane.
func (p *peer) observe(seen Activity, now time.Time) {
	old, first := p.seen, p.observed.IsZero()
	p.seen, p.observed = seen, now
	if first || seen == old {
		return
	}
	p.activeUntil = now.Add(activeFor)
	p.compareSeen(old, now)
	if seen.Sent != old.Sent {
		p.sentAt = now
		if p.sendingFrom.IsZero() {
			p.sendingFrom = now
		}
	}
	if seen.Received != old.Received {
		p.receive(now)
		p.pace.note(now)
		p.arrived = now
		proven := !p.uncertain
		if p.selected != nil && p.selected.relayed() {
			proven = !p.probe.strict
		}
		if proven {
			p.clear()
		}
	}
}

// receive notes an authenticated receipt.
func (p *peer) receive(now time.Time) {
	p.received = now
	p.sendingFrom = time.Time{}
}

// clear lifts every suspicion from the selected path. When that is a relay, the
// search for a direct one goes on.
func (p *peer) clear() {
	p.probe = probe{}
	p.suspectSince = time.Time{}
	if p.selected != nil {
		p.selected.suspect = false
		if p.selected.relayed() {
			return
		}
		p.wantCall = false
		p.backoff, p.retryAt = 0, time.Time{}
		p.search = Attempt{}
	}
	p.uncertain, p.moved = false, false
}

// step does what is due for a peer.
func (a *Agent) step(p *peer, now time.Time) {
	a.relayFirst(p, now)
	a.watch(p, now)
	a.assess(p, now)
	a.fathom(p, now)
	a.expire(p, now)
	a.endCopies(p, now)
	a.reportLate(p, now)
	a.sendHint(p, now)
	if p.wantAnswer {
		a.answerCall(p, now)
	}
	if p.wantOpen {
		p.wantOpen = false
		a.open(p, now, true)
	}
	failing := p.direct() == nil && p.avoided() == nil
	p.wantCall = p.wantCall && failing
	if !p.retryAt.IsZero() && !now.Before(p.retryAt) {
		p.retryAt = time.Time{}
		if failing && p.wanted(now) {
			p.backoff *= 2
			p.wantCall = true
		}
	}
	if p.wantCall && p.talk.ready(now, signalRate) {
		a.call(p, now)
	}
	a.repeatCall(p, now)
	a.seekHard(p, now)
	a.seekFresh(p, now)
	a.round(p, now)
}

// watch starts and drives the checks on the selected path.
func (a *Agent) watch(p *peer, now time.Time) {
	wanted := p.wantProbe
	p.wantProbe = false
	if p.selected == nil {
		return
	}
	active := p.active(now)
	silent := active && !p.sendingFrom.IsZero() && now.Sub(p.sendingFrom) >= silence
	hushed := active && !p.arrived.IsZero() && now.Sub(p.arrived) >= p.pace.hush()
	idle := !active && a.kept(p.selected) && now.Sub(p.sentAt) >= keepalive
	if hushed {
		p.arrived = time.Time{}
	}
	if wanted || silent || hushed || idle {
		p.startProbe(now)
	}
	if active && now.Sub(p.consentAt) >= consentInterval {
		a.consent(p, now)
	}
	a.driveProbe(p, now)
}

// kept reports whether a path needs keepalives.
func (a *Agent) kept(q *pair) bool { return !a.near(q.addr) && !q.relayed() }

// consent checks every path that may be of use.
func (a *Agent) consent(p *peer, now time.Time) {
	p.consentAt = now
	for _, q := range p.pairs {
		if q != p.selected && now.Sub(q.answered) > remember {
			q.valid = false
		}
		if q.valid || q.relayed() && q.reachable() {
			a.sendCheck(p, q, outgoing{now: now, from: q.from()})
		}
	}
}

func (p *peer) startProbe(now time.Time) {
	if p.selected == nil || p.selected.suspect || !p.probe.began.IsZero() {
		return
	}
	rtt := p.selected.expected()
	p.probe = probe{
		began: now, again: now,
		doubt:    now.Add(max(2*rtt, minDoubt)),
		deadline: now.Add(max(3*rtt, minDeadline)),
	}
}

func (a *Agent) driveProbe(p *peer, now time.Time) {
	switch {
	case p.probe.began.IsZero():
		return
	case !now.Before(p.probe.deadline), p.probe.lost(now) && p.rival(p.probe.began) != nil:
		a.suspect(p, now)
		return
	case !now.Before(p.probe.doubt):
		a.doubt(p, now)
	}
	if now.Before(p.probe.again) {
		return
	}
	a.sendCheck(p, p.selected, outgoing{now: now, from: p.selected.from()})
	gap := probeGap
	if q := p.copying.to; q != nil && q.relayed() {
		a.sendCheck(p, q, outgoing{now: now}) // which has the peer doubt its path, too
		gap = doubtGap
	}
	p.probe.again = later(now.Add(gap), p.probe.began.Add(p.selected.expected()+probeMargin))
}

// lost reports whether the check is late compared with another path.
func (b probe) lost(now time.Time) bool {
	return !b.early.IsZero() && !now.Before(b.early)
}

// suspect gives up trust in the selected path: another one that answers, or a
// relay, takes over now, and everything is tried again.
func (a *Agent) suspect(p *peer, now time.Time) {
	s := p.selected
	a.log.Debug("path suspect", "peer", p, "addr", s.addr)
	s.suspect = true
	p.suspectSince = now
	p.probe = probe{}
	if !s.relayed() {
		a.freshen(now, min(doubtAfter, now.Sub(p.received)))
		if p.talk.ready(now, signalRate) {
			a.call(p, now)
		} else {
			p.wantCall = true
		}
	}
	q := p.rival(now.Add(-recent))
	if q == nil {
		q = p.fallback()
	}
	if q != nil {
		a.choose(p, q, now)
		p.wantProbe = true
	} else if p.copying.to != nil {
		p.copying.until = now.Add(giveUp)
	}
}

// rival returns the best other direct pair that answered after since.
func (p *peer) rival(since time.Time) *pair {
	var best *pair
	for _, q := range p.pairs {
		if q == p.selected || q.relayed() || !q.valid || q.suspect || q.answered.Before(since) {
			continue
		}
		if best == nil || q.rtt < best.rtt {
			best = q
		}
	}
	return best
}

// hear notes an authenticated message of the peer from q. When that is not the
// path we use, and ours is silent, ours has to answer a check, whatever data
// arrives; when q is new (the peer moved), ours loses to it as soon
// as its answer is late. What comes directly says nothing about a relay of ours,
// and what comes over a relay does not mean that the peer moved.
func (p *peer) hear(q *pair, now time.Time) {
	if !q.valid && now.Sub(q.heard) > 2*consentInterval {
		q.since = now
	}
	q.heard = now
	s := p.selected
	if s == nil || s == q || now.Sub(s.heard) <= quiet || s.relayed() && !q.relayed() {
		return
	}
	p.startProbe(now)
	if s.relayed() {
		p.probe.strict = true
		return
	}
	p.uncertain = true
	if q.relayed() {
		return
	}
	if !p.probe.began.IsZero() && p.probe.early.IsZero() && now.Sub(q.since) <= quiet {
		p.probe.early = now.Add(s.rtt + max(4*s.varied, minMargin))
	}
}

// expire drops a path that stays dead; the sooner when it is used, or when the
// server, too, has lost the peer.
func (a *Agent) expire(p *peer, now time.Time) {
	q := p.selected
	if q == nil || !q.suspect || now.Sub(p.suspectSince) < giveUp {
		return
	}
	sending := p.active(now) && !p.sendingFrom.IsZero()
	if !sending && p.online && now.Sub(p.received) < consentExpiry {
		return
	}
	if q.relayed() && p.wanted(now) { // there is nothing better
		return
	}
	a.log.Debug("path lost", "peer", p, "addr", q.addr)
	p.clear()
	for _, q := range p.pairs {
		q.valid, q.suspect, q.samples = false, false, 0
	}
	a.drop(p, now)
}

// accept takes the answer to a check, which arrived at an address of ours: the
// pair is valid. The first answer settles from which address it is used.
func (a *Agent) accept(t transaction, at netip.AddrPort, now time.Time) {
	p, q := t.peer, t.pair
	p.hear(q, now)
	if q.relayed() {
		at, q.late = netip.AddrPort{}, time.Time{}
	}
	rerouted := q.local != at && !q.from().Addr().IsValid()
	if rerouted {
		q.local = at
	}
	q.grade(t, now)
	q.valid, q.suspect = true, false
	q.answered = now
	q.tally.answers++
	p.receive(now)
	switch {
	case q != p.selected:
		a.compare(p, q, now)
	case rerouted:
		a.announce(p.path())
		fallthrough
	default:
		a.confirm(p, t.at)
	}
	if t.lost {
		p.hint.next = time.Time{}
	}
	if t.ping != nil {
		path := Path{Peer: p.key, Addr: q.addr, Local: q.local, Type: q.typ, RTT: now.Sub(t.at)}
		select {
		case t.ping <- path:
		default:
		}
	}
}

// from is the own socket and address from which packets of the pair leave. The
// address is zero where none is proven, or not any more: then the system chooses.
func (q *pair) from() netip.AddrPort {
	if !q.valid || q.suspect {
		return socket(q.local.Port())
	}
	return q.local
}

// measure smooths the RTT as RFC 6298 section 2 does.
func (q *pair) measure(rtt time.Duration) {
	if q.samples == 0 {
		q.rtt, q.varied = rtt, rtt/2
	} else {
		q.varied += ((rtt - q.rtt).Abs() - q.varied) / 4
		q.rtt += (rtt - q.rtt) / 8
	}
	q.samples++
}

// compare chooses between the selected pair and one that just answered.
func (a *Agent) compare(p *peer, q *pair, now time.Time) {
	s := p.selected
	switch {
	case a.avoids(p, q, now):
		return
	case s == nil || s.suspect, s.relayed() && (!q.relayed() || !s.valid && q.samples >= minSamples):
		a.choose(p, q, now)
		return
	case q.relayed() && !s.relayed():
		return
	case p.probe.lost(now):
		a.choose(p, q, now)
		return
	}
	mine, other := a.cost(s), a.cost(q)
	if other*10 > mine*9 || other+minGain > mine {
		q.better = 0
		return
	}
	if q.better++; q.better >= minSamples {
		a.choose(p, q, now)
	}
}

func (a *Agent) cost(q *pair) time.Duration {
	if a.near(q.addr) || q.relayed() {
		return q.rtt + q.extra
	}
	return q.rtt + natCost
}

// choose makes q the path of p.
func (a *Agent) choose(p *peer, q *pair, now time.Time) {
	old := p.selected
	p.noteHistory(now)
	p.selected = q
	q.quality.left = Quality{}
	if q.relayed() { // it may not have answered
		p.probe = probe{}
		p.suspectSince = now
	} else {
		p.clear()
	}
	p.handOver(old, now)
	p.sendingFrom = time.Time{}
	p.consentAt = q.answered
	p.sentAt = q.sent
	for _, other := range p.pairs {
		other.better = 0
	}
	a.log.Debug("path chosen", "peer", p, "addr", q.addr, "type", q.typ, "rtt", q.rtt)
	a.announce(p.path())
}

// announce tells the node and those who wait in Ping of a new path.
func (a *Agent) announce(path Path) {
	close(a.moved)
	a.moved = make(chan struct{})
	if a.cfg.OnPath != nil {
		a.effects = append(a.effects, func() { a.cfg.OnPath(path) })
	}
	a.notify()
}

// next tells when step has something to do again; zero: only after an event.
func (p *peer) next(a *Agent, now time.Time) time.Time {
	if p.wantProbe {
		return now
	}
	next := earliest(p.retryAt, p.recall.at, p.copying.until, a.hardNext(p, now), a.freshNext(p, now))
	for _, q := range p.pairs {
		next = earliest(next, q.next, q.late)
	}
	if p.wantCall {
		next = earliest(next, now.Add(p.talk.wait(signalRate)))
	}
	if p.selected == nil {
		return next
	}
	next = earliest(next, p.probe.again, p.probe.deadline, p.hint.next)
	for _, at := range []time.Time{p.probe.early, p.probe.doubt} {
		if at.After(now) {
			next = earliest(next, at)
		}
	}
	switch {
	case p.active(now):
		return earliest(next, now.Add(p.tick()))
	case a.kept(p.selected) && !p.selected.suspect: // else calls go there
		next = earliest(next, p.sentAt.Add(keepalive))
	}
	return earliest(next, p.end())
}

// end tells when an idle path that is suspect may be given up; zero: never.
func (p *peer) end() time.Time {
	if !p.selected.suspect {
		return time.Time{}
	}
	end := later(p.received.Add(consentExpiry), p.suspectSince.Add(giveUp))
	if !p.selected.relayed() {
		return end
	}
	if p.online {
		return time.Time{}
	}
	return later(end, p.demanded.Add(demandMemory))
}
