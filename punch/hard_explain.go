package punch

import (
	"slices"
	"time"
)

// Rounds is how the search by hard rounds stands with a peer: prediction, and
// trying many ports. The zero Rounds is that of a peer unknown or reached directly
// without any.
type Rounds struct {
	State RoundState
	// Kind is Predicted or Birthday, Sockets is how many of ours take part beside
	// the main one, Targets how many ports of the peer's NAT, from Low to High. They
	// are those of the round at work or, before there was one, of the one that would
	// be next; else of the last one. All zero: none is planned.
	Kind      CandidateType
	Sockets   int
	Targets   int
	Low, High uint16
	// InVain counts the rounds that found nothing in this network; Packets is how
	// many left in the round at work or the last one, Spent in all of them.
	InVain  int
	Packets int
	Spent   int
	Began   time.Time // of the last round; zero: there was none
	Next    time.Time // when the next may begin; zero: at once, or not planned
	Ended   RoundEnd  // how the last one ended; empty: there was none
}

// RoundState says what stands between a node and the next round.
type RoundState string

// The states of Rounds, the first that applies.
const (
	RoundNone       RoundState = ""            // not needed, or not switched on
	RoundRunning    RoundState = "running"     // packets leave
	RoundPreparing  RoundState = "preparing"   // both agreed; sockets are opened, ports sampled
	RoundUnanswered RoundState = "unanswered"  // the peer answers no calls
	RoundUnknown    RoundState = "nat-unknown" // our own NAT is not sampled yet
	RoundAsked      RoundState = "asked"       // the peer's agreement is awaited
	RoundUntold     RoundState = "untold"      // the peer said nothing of its NAT yet
	RoundUseless    RoundState = "useless"     // neither side's ports can be guessed, or need not be
	RoundPaused     RoundState = "paused"      // one per node and minute
	RoundBackoff    RoundState = "back-off"    // after rounds in vain, or proposals without an answer
	RoundDue        RoundState = "due"         // it begins when the peer agrees
)

// RoundEnd says how a round ended.
type RoundEnd string

// The ends of rounds.
const (
	RoundFound   RoundEnd = "found"
	RoundSpent   RoundEnd = "in-vain"    // all packets of the plan left, none was answered
	RoundLate    RoundEnd = "late"       // the peer did not come in time
	RoundCrowded RoundEnd = "no-sockets" // none could be opened, or sampled
	RoundMoved   RoundEnd = "moved"      // a side left its network, or the mesh
)

// pastRounds is what is remembered of rounds with a peer.
type pastRounds struct {
	last    sketch
	began   time.Time // of the last one
	packets int       // of the last one
	spent   int       // of all
	end     RoundEnd
}

// sketch is a plan in numbers.
type sketch struct {
	kind             CandidateType
	sockets, targets int
	low, high        uint16
}

func (p plan) sketch() sketch {
	s := sketch{kind: p.kind, sockets: p.sockets, targets: len(p.targets)}
	for _, t := range p.targets {
		if s.low == 0 || t.Port() < s.low {
			s.low = t.Port()
		}
		s.high = max(s.high, t.Port())
	}
	return s
}

// over notes how a round ended.
func (p *pastRounds) over(r *round, now time.Time) {
	p.last, p.packets, p.end = r.sketch(), r.count, RoundSpent
	p.spent += r.count
	p.began = r.first
	switch {
	case r.p.direct() != nil:
		p.end = RoundFound
	case r.stage == running:
	case r.stage == preparing && now.Sub(r.began) < hardAnswer && !r.p.meeting.mine.addr.Addr().Is4():
		p.end = RoundMoved
	case r.stage == preparing && (r.sockets > 0 && r.ports == nil || now.Sub(r.began) < hardAnswer):
		p.end = RoundCrowded
	default:
		p.end = RoundLate
	}
}

// rounds tells how hard rounds stand with a peer.
func (a *Agent) rounds(p *peer, now time.Time) Rounds {
	m := &p.meeting
	s := m.past.last
	r := Rounds{InVain: m.rounds, Packets: m.past.packets, Spent: m.past.spent, Began: m.past.began, Ended: m.past.end}
	at := a.hard.round
	working := at != nil && at.p == p
	if working {
		s = at.sketch()
		r.InVain = max(r.InVain-1, 0)
		r.Began = at.first
		r.Packets, r.Spent, r.Ended = at.count, r.Spent+at.count, ""
	}
	switch {
	case p.direct() != nil:
		r.InVain = 0
		if working { // it is about to end
			r.Ended = RoundFound
		}
	case working && at.stage == running:
		r.State = RoundRunning
	case working:
		r.State = RoundPreparing
	default:
		var next sketch
		r.State, r.Next, next = a.nextRound(p, now)
		if next.targets > 0 && m.past.end == "" {
			s = next
		}
	}
	r.Kind, r.Sockets, r.Targets, r.Low, r.High = s.kind, s.sockets, s.targets, s.low, s.high
	return r
}

// nextRound tells what the next round waits for, until when, and what it would be.
func (a *Agent) nextRound(p *peer, now time.Time) (state RoundState, at time.Time, next sketch) {
	m := &p.meeting
	if a.cfg.OpenSockets == nil || a.cfg.Signal == nil || p.search.Since.IsZero() {
		return RoundNone, at, next
	}
	mine, known := a.side()
	switch {
	case !p.search.Answered:
		return RoundUnanswered, at, next
	case !known:
		return RoundUnknown, at, next
	case !m.proposed.IsZero() && now.Sub(m.proposed) < hardAnswer:
		return RoundAsked, m.proposed.Add(hardAnswer), next
	case !m.theirs.addr.IsValid():
		return RoundUntold, m.waitsFor(a, p, now), next
	}
	plan, ok := planFor(mine, m.theirs, m.walked)
	if !ok {
		return RoundUseless, at, next
	}
	next, at = plan.sketch(), m.waitsFor(a, p, now)
	pause := time.Time{}
	if !a.hard.began.IsZero() {
		pause = a.hard.freeAt()
	}
	switch {
	case at.IsZero():
		return RoundDue, at, next
	case !at.After(pause):
		return RoundPaused, at, next
	}
	return RoundBackoff, at, next
}

// waitsFor is before when no round with the peer begins; zero: one may now.
func (m *meeting) waitsFor(a *Agent, p *peer, now time.Time) time.Time {
	list := []time.Time{m.again(), p.search.Since.Add(hardAfter)}
	if a.leads(p) {
		list = append(list, m.next)
	}
	if !a.hard.began.IsZero() {
		list = append(list, a.hard.freeAt())
	}
	last := slices.MaxFunc(list, time.Time.Compare)
	if !last.After(now) {
		return time.Time{}
	}
	return last
}
