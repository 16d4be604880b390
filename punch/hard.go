package punch

import (
	"bytes"
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

const (
	// hardAfter is how long calls may fail before a hard round is proposed; the own
	// NAT is sampled hardSample earlier.
	hardAfter  = 1500 * time.Millisecond
	hardSample = 700 * time.Millisecond
	// hardPause is the least time between two rounds of a node; with one peer it is
	// doubled after a few rounds that found nothing.
	hardPause    = time.Minute
	maxHardPause = time.Hour
	hardTrials   = 4
	// Proposals that the peer does not agree to are repeated with back-off.
	minHardBackoff = 15 * time.Second
	// hardAnswer is how long a proposal, an agreement and their preparation wait.
	hardAnswer = 3 * time.Second
	// sweepGap is how often sockets that nobody uses any more are looked for.
	sweepGap = 10 * time.Second
)

// hard is what an agent needs for rounds with peers of which either side's ports
// are not known.
type hard struct {
	open    []uint16 // spare sockets
	opening bool
	refused time.Time // when opening failed; zero: it did not
	sweepAt time.Time // zero: there are none

	job   job
	nat   NAT // zero: not sampled
	churn float64
	again time.Time // not sampled before

	fresh fresh
	round *round
	began time.Time // last round; zero: none
	ran   time.Time // its first packet; zero: none
}

// meeting is how the rounds with one peer stand.
type meeting struct {
	next     time.Time // not proposed before
	backoff  time.Duration
	proposed time.Time // we wait for its agreement; zero: we do not
	asked    time.Time // it proposed; zero: it did not, or was answered
	agreed   time.Time // it agreed; zero: it did not, or the round began
	rounds   int       // in vain
	began    time.Time // last round; zero: none
	mine     side      // as last told
	theirs   side
	walked   int           // ports of it that rounds tried
	kind     CandidateType // of pairs that a round finds
	past     pastRounds
}

// leads reports whether we propose rounds to a peer, not it to us.
func (a *Agent) leads(p *peer) bool {
	return bytes.Compare(a.private.PublicKey().Bytes(), p.key[:]) < 0
}

// seekHard proposes a round, or agrees to one, when calls fail.
func (a *Agent) seekHard(p *peer, now time.Time) {
	if a.cfg.OpenSockets == nil || a.cfg.Signal == nil {
		return
	}
	if p.direct() != nil {
		p.meeting = p.meeting.forget()
		return
	}
	if !p.meeting.asked.IsZero() {
		a.agree(p, now)
		return
	}
	if !p.meeting.agreed.IsZero() {
		a.agreed(p, now)
		return
	}
	start := p.hardStart(now)
	if start.IsZero() {
		return
	}
	if !now.Before(start.Add(-hardSample)) {
		a.sample(now)
	}
	if !a.leads(p) || now.Before(later(start, p.meeting.next)) || !a.mayMeet(p, now) {
		return
	}
	mine, ok := a.side()
	if !ok || !p.talk.ready(now, signalRate) {
		return
	}
	m := &p.meeting
	m.backoff = min(max(2*m.backoff, minHardBackoff), maxHardPause)
	m.next, m.proposed, m.mine = now.Add(m.backoff), now, mine
	a.signal(p, signalPropose, now)
}

// hardStart is when rounds may begin; zero: nothing is looked for, or the peer
// does not answer calls.
func (p *peer) hardStart(now time.Time) time.Time {
	if p.search.Since.IsZero() || !p.search.Answered || !p.wanted(now) {
		return time.Time{}
	}
	return p.search.Since.Add(hardAfter)
}

// hardNext is when seekHard has something to do again; zero: after an event.
func (a *Agent) hardNext(p *peer, now time.Time) time.Time {
	if a.cfg.OpenSockets == nil || p.direct() != nil {
		return time.Time{}
	}
	if !p.meeting.asked.IsZero() {
		return p.meeting.asked.Add(hardAnswer)
	}
	if !p.meeting.agreed.IsZero() {
		return p.meeting.agreed.Add(hardAnswer)
	}
	start := p.hardStart(now)
	if start.IsZero() {
		return time.Time{}
	}
	next := now.Add(p.talk.wait(signalRate))
	if !next.After(now) {
		next = time.Time{}
	}
	for _, at := range []time.Time{start.Add(-hardSample), start, p.meeting.next, a.hard.again, a.hard.freeAt(), p.meeting.again(), a.othersFirst(p, now)} {
		if at.After(now) {
			next = earliest(next, at)
		}
	}
	return next
}

// again is when the next round may begin.
func (m *meeting) again() time.Time {
	if m.rounds == 0 {
		return time.Time{}
	}
	doublings := min(max(m.rounds-hardTrials+1, 0), 10)
	return m.began.Add(min(hardPause<<doublings, maxHardPause))
}

// agree answers the peer's proposal once our own NAT is known.
func (a *Agent) agree(p *peer, now time.Time) {
	m := &p.meeting
	if now.Sub(m.asked) >= hardAnswer {
		m.asked = time.Time{}
		return
	}
	a.sample(now)
	mine, ok := a.side()
	if !ok {
		return
	}
	m.mine = mine
	plan, ok := planFor(mine, m.theirs, m.walked)
	switch {
	case !ok:
		a.signal(p, signalAgree, now) // so that the peer knows, too
	case !a.observed(p, m.theirs.addr):
		return // the netmap may be behind
	case a.mayMeet(p, now):
		a.begin(p, plan, now)
	}
	m.asked = time.Time{}
}

// agreed begins the round that the peer agreed to, as soon as others say that it is
// where it says.
func (a *Agent) agreed(p *peer, now time.Time) {
	m := &p.meeting
	plan, ok := planFor(m.mine, m.theirs, m.walked)
	switch {
	case !ok: // nothing would help, before one of us moves
		m.backoff, m.next = maxHardPause, now.Add(maxHardPause)
	case !a.observed(p, m.theirs.addr) && now.Sub(m.agreed) < hardAnswer:
		return
	case a.observed(p, m.theirs.addr) && a.mayMeet(p, now):
		a.begin(p, plan, now)
	}
	m.agreed = time.Time{}
}

// follow forgets what the peer said of a NAT that it has left.
func (m *meeting) follow(list []Candidate) {
	gone := !slices.ContainsFunc(list, func(c Candidate) bool { return c.Addr.Addr() == m.theirs.addr.Addr() })
	if m.theirs.addr.IsValid() && gone {
		*m = meeting{rounds: m.rounds, began: m.began, walked: m.walked, kind: m.kind, past: m.past}
	}
}

// hardSignal takes what a peer says about rounds.
func (a *Agent) hardSignal(p *peer, s *signal, now time.Time) {
	m := &p.meeting
	leads, r := a.leads(p), a.hard.round
	switch {
	case a.cfg.OpenSockets == nil:
	case s.kind == signalPropose && !leads:
		m.theirs, m.asked = s.hard, now
	case s.kind == signalAgree && leads && !m.proposed.IsZero() && now.Sub(m.proposed) < hardAnswer:
		m.theirs, m.proposed, m.agreed = s.hard, time.Time{}, now
		a.agreed(p, now)
	case s.kind == signalGo && !leads && r != nil && r.p == p && r.stage == waiting && a.observed(p, s.hard.addr):
		m.theirs = s.hard
		if plan, ok := planFor(m.mine, m.theirs, m.walked); ok {
			r.replan(plan)
			a.run(r, now)
		}
	}
}

// observed reports whether others than the peer itself say that it is at an
// address: a server whom the node shows its proof, or an answer from there.
func (a *Agent) observed(p *peer, addr netip.AddrPort) bool {
	if Private(addr.Addr()) || !a.allowed(addr) {
		return false
	}
	return slices.ContainsFunc(p.pairs, func(q *pair) bool {
		named := q.source&published != 0 && (q.typ == ServerReflexive || q.typ == PortMapped)
		return q.addr.Addr() == addr.Addr() && (named || q.valid)
	})
}

// side describes our NAT as far as it is known. Only IPv4 has NATs of the kind.
func (a *Agent) side() (side, bool) {
	mapped, differ := a.seen4()
	switch {
	case len(mapped) == 0:
		return side{}, false
	case !differ:
		return side{nat: NAT{Mapping: EndpointIndependent}, addr: mapped[0]}, true
	case a.hard.nat.Mapping <= EndpointIndependent:
		return side{}, false
	}
	return side{nat: a.hard.nat, churn: uint16(min(a.hard.churn, 1<<16-1)), addr: mapped[0]}, true
}

// seen4 returns what the servers see of our main socket over IPv4, and whether
// they differ.
func (a *Agent) seen4() (list []netip.AddrPort, differ bool) {
	for _, s := range a.servers {
		if s.fresh && s.mapped.Addr().Is4() {
			list = append(list, s.mapped)
			differ = differ || s.mapped != list[0]
		}
	}
	return list, differ
}

// hardAnswered takes an answer that no check of the cadence waits for.
func (a *Agent) hardAnswered(m *stun.Message, from, at netip.AddrPort, now time.Time) {
	if ask := a.hard.job.find(m.TransactionID); ask != nil {
		a.sampled(ask, m, from, at)
		return
	}
	r := a.hard.round
	if r == nil {
		return
	}
	t, ok := r.sent[m.TransactionID]
	if !ok || from != t.to || at.Port() != t.local || stun.MessageIntegrity(r.p.secrets.check).Check(m) != nil {
		return
	}
	if q := a.learn(r.p, from, at.Port()); q != nil {
		a.accept(transaction{peer: r.p, pair: q, at: t.at}, at, now)
		a.schedule(r.p, now)
	}
}

// found is the type of a pair that an authenticated check revealed.
func (a *Agent) found(p *peer, addr netip.AddrPort, port uint16) CandidateType {
	r := a.hard.round
	tried := r != nil && r.p == p && r.stage == running && len(r.targets) > 0 && r.targets[0].Addr() == addr.Addr()
	if p.meeting.kind != 0 && (port != 0 || tried) {
		return p.meeting.kind
	}
	return PeerReflexive
}

// leaveHard ends what was under way before the network changed.
func (a *Agent) leaveHard(now time.Time) {
	h := &a.hard
	if r := h.round; r != nil {
		r.p.meeting.past.over(r, now)
		r.p.meeting.past.end = RoundMoved
	}
	h.job, h.nat, h.churn, h.again, h.round = job{}, NAT{}, 0, time.Time{}, nil
	h.fresh = fresh{}
	if len(h.open) > 0 {
		h.sweepAt = now
	}
	for _, p := range a.peers {
		p.meeting = p.meeting.forget()
		p.fresh = outing{}
	}
}

// wakeHard has those peers looked at that wait for what is known of our NAT.
func (a *Agent) wakeHard(now time.Time) {
	for _, p := range a.peers {
		if !p.meeting.asked.IsZero() || !p.fresh.asked.IsZero() || !p.search.Since.IsZero() {
			a.queue.set(p, now)
		}
	}
}

// forget keeps what is of use for later rounds in another situation.
func (m *meeting) forget() meeting {
	return meeting{walked: m.walked, kind: m.kind, past: m.past}
}

// hardTurn does what is due of sampling and of a round.
func (a *Agent) hardTurn(now time.Time) {
	a.runJob(now)
	a.runRound(now)
	a.sweep(now)
}

// hardTurnNext is when hardTurn has something to do again.
func (a *Agent) hardTurnNext() time.Time {
	next := earliest(a.hard.job.next, a.hard.sweepAt)
	if r := a.hard.round; r != nil {
		next = earliest(next, r.next)
	}
	return next
}

// revealed reports whether nobody named such a candidate: packets did.
func (t CandidateType) revealed() bool {
	return t == PeerReflexive || t == Predicted || t == Birthday
}
