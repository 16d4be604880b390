package punch

import (
	"net/netip"
	"time"

	"github.com/pion/stun/v2"
)

// stage is how far a round has come.
type stage uint8

const (
	preparing stage = iota + 1 // sockets, and the port that the NAT gives out now
	waiting                    // for the peer to go
	running
)

// lastAnswer is how long answers to the last packets of a round are awaited.
const lastAnswer = time.Second

// round is the search for the ports of one peer, at most maxHardPackets long.
type round struct {
	plan
	p     *peer
	stage stage
	based bool // our own port is sampled
	ports []uint16

	first time.Time // when it was agreed on
	began time.Time // of the stage
	next  time.Time
	count int // packets that left
	sent  map[transactionID]trial
	pace  governor
}

// trial is a check of a round that waits for its answer.
type trial struct {
	to    netip.AddrPort
	local uint16
	at    time.Time
}

// governor holds a rate in every second: it knows when the last packets left.
type governor struct {
	times [roundRate]time.Time
	count int
}

// ready is when the next packet may leave.
func (p *governor) ready() time.Time {
	return p.times[p.count%len(p.times)].Add(time.Second)
}

func (p *governor) take(now time.Time) {
	p.times[p.count%len(p.times)] = now
	p.count++
}

// begin makes a round with a peer, which both sides want.
func (a *Agent) begin(p *peer, plan plan, now time.Time) {
	h := &a.hard
	h.began, p.meeting.began = now, now
	p.fair = fairness{had: now}
	p.meeting.rounds++
	p.meeting.backoff = 0
	h.round = &round{plan: plan, p: p, stage: preparing, first: now, began: now, next: now, sent: map[transactionID]trial{}}
	p.meeting.kind = plan.kind
	a.log.Debug("hard round", "peer", p, "type", plan.kind, "sockets", plan.sockets, "targets", len(plan.targets))
	a.notify()
}

// replan takes a plan that was made with newer ports; the sockets stay.
func (r *round) replan(plan plan) {
	plan.sockets = min(plan.sockets, len(r.ports))
	r.plan = plan
}

// runRound does what is due of the round.
func (a *Agent) runRound(now time.Time) {
	r := a.hard.round
	if r == nil || now.Before(r.next) {
		return
	}
	if a.peers[r.p.key] != r.p || r.p.direct() != nil {
		a.endRound(now)
		return
	}
	late := r.stage != running && now.Sub(r.began) >= hardAnswer
	switch {
	case late, r.stage == running && r.count >= r.total() && !now.Before(r.next):
		a.endRound(now)
	case r.stage == preparing:
		a.prepare(r, now)
	case r.stage == running:
		a.try(r, now)
	default:
		r.next = r.began.Add(hardAnswer)
	}
}

// prepare opens sockets and samples our port; then the peer is told.
func (a *Agent) prepare(r *round, now time.Time) {
	r.next = r.began.Add(hardAnswer)
	sequential := r.p.meeting.mine.nat.Allocation == Sequential
	if r.sockets > 0 && r.ports == nil {
		count := r.sockets
		if sequential {
			count++
		}
		ports, ok := a.sockets(count, now)
		if !ok {
			return
		}
		if len(ports) == 0 { // all are paths
			a.endRound(now)
			return
		}
		r.sockets = min(r.sockets, len(ports))
		r.ports = ports
	}
	if sequential && !r.based {
		// The last one opened asked no server yet.
		a.sampleBase(r.ports[len(r.ports)-1], now)
		a.runJob(now)
		return
	}
	a.prepared(r, now)
}

// based takes the port that our NAT gave out just now.
func (a *Agent) based(samples []Sample, now time.Time) {
	r := a.hard.round
	if r == nil || r.stage != preparing {
		return
	}
	if len(samples) == 0 {
		a.endRound(now)
		return
	}
	last := samples[0]
	step := r.p.meeting.mine.nat.Step
	for _, s := range samples[1:] {
		if int(int16(s.Mapped.Port()-last.Mapped.Port()))*step > 0 {
			last = s
		}
	}
	r.p.meeting.mine.addr = last.Mapped
	r.based = true
	r.ports = r.ports[:r.sockets]
	a.prepared(r, now)
}

// prepared tells the peer. Who proposed has the other side's answer, and begins;
// who was asked begins when it has to come first.
func (a *Agent) prepared(r *round, now time.Time) {
	if !r.p.meeting.mine.addr.Addr().Is4() { // the peer left the NAT that this was about
		a.endRound(now)
		return
	}
	kind := signalAgree
	if a.leads(r.p) {
		kind = signalGo
	}
	if !a.signal(r.p, kind, now) { // who is not told does not take part
		r.next = now.Add(r.p.talk.wait(signalRate))
		a.notify()
		return
	}
	if kind == signalGo || r.starts {
		a.run(r, now)
		return
	}
	r.stage, r.began, r.next = waiting, now, now.Add(hardAnswer)
}

// run begins to send. A round that took less time to prepare than the one before
// waits, so that a minute lies between their packets, too.
func (a *Agent) run(r *round, now time.Time) {
	start := later(now, a.hard.ran.Add(hardPause))
	a.hard.ran = start
	r.stage, r.began, r.next = running, start, start
	if r.sockets == 0 && len(r.targets) == walkLength {
		r.p.meeting.walked += walkLength
	}
	a.try(r, now)
	a.notify()
}

// total is how many packets the round has at most.
func (r *round) total() int {
	return min(r.passes*r.flows(), maxHardPackets)
}

// flows is how many pairs of a socket and a target there are.
func (r *round) flows() int { return max(r.sockets, 1) * len(r.targets) }

// passAt is when a pass may begin.
func (r *round) passAt(pass int) time.Time {
	switch {
	case pass == 0:
		return r.began
	case r.sockets == 0:
		return r.began.Add(time.Duration(pass) * passGap)
	}
	return r.began.Add(r.wait + time.Duration(pass-1)*passGap)
}

// try sends what is due.
func (a *Agent) try(r *round, now time.Time) {
	for r.count < r.total() {
		at := r.pace.ready()
		if r.count%r.flows() == 0 {
			at = later(at, r.passAt(r.count/r.flows()))
		}
		if now.Before(at) {
			r.next = at
			return
		}
		a.tryOnce(r, now)
		if r.gap > 0 && r.count < r.total() {
			r.next = now.Add(r.gap)
			return
		}
	}
	r.next = now.Add(lastAnswer)
}

// tryOnce sends the next check of a round.
func (a *Agent) tryOnce(r *round, now time.Time) {
	pass, i := r.count/r.flows(), r.count%r.flows()
	sockets := max(r.sockets, 1)
	t := trial{to: r.targets[i/sockets], at: now}
	ttl := 0
	if r.sockets > 0 {
		t.local = r.ports[i%sockets]
		if pass == 0 {
			ttl = openerTTL
		}
	}
	r.count++
	if !a.allowed(t.to) {
		return
	}
	// Who was heard there is a candidate, and under its limit.
	if q := r.p.find(t.to, t.local); q != nil && !q.heard.IsZero() && !a.mayProbe(r.p, q, now) {
		return
	}
	r.pace.take(now)
	r.p.counter++
	c := check{id: stun.NewTransactionID(), user: r.p.name, boot: a.boot, counter: r.p.counter}
	b, err := c.marshal(r.p.secrets.check)
	if err != nil {
		a.log.Error("check not built", "err", err)
		return
	}
	r.sent[c.id] = t
	a.sends = append(a.sends, datagram{b: b, to: t.to, from: socket(t.local), ttl: ttl})
}

// endRound closes what the round does not need any more.
func (a *Agent) endRound(now time.Time) {
	h := &a.hard
	h.round.p.meeting.past.over(h.round, now)
	a.log.Debug("hard round over", "peer", h.round.p, "packets", h.round.count, "direct", h.round.p.direct() != nil)
	h.round = nil
	if h.job.base {
		h.job = job{}
	}
	if len(h.open) > 0 {
		h.sweepAt = now
	}
}
