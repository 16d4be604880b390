package punch

import (
	"math"
	"math/bits"
	"slices"
	"time"
)

const (
	// pulse is the time between checks under traffic on a direct path that a relay
	// could replace, and on one that a relay did replace.
	pulse = time.Second
	// A check counts as lost when it is unanswered for max(3·RTT, lossDeadline).
	lossDeadline = 500 * time.Millisecond
	// outage is how many checks in a row say nothing of the loss of a path any more:
	// it was interrupted, and that is the business of liveness.
	outage = 12
	// A suspicion has both ways checked in short intervals until it is settled, but
	// not for longer than longestTrial; the next one counts trialRest after that. A
	// path that is left was bad for badFor.
	trialGap     = 100 * time.Millisecond
	trialChecks  = 25
	badFor       = 5 * time.Second
	trialRest    = 5 * time.Second
	longestTrial = 3 * badFor
	// A path is bad when of at least leastChecks checks more than one of badShare is
	// lost, beyond what chance makes of that share; or when it is slowTimes slower
	// than the relay, and slowMargin. The relay must lose goodTimes less, and that by
	// so many standard deviations: two ways that lead over one bad line differ, too.
	windowChecks = 64
	leastChecks  = 20
	relayChecks  = 10
	badShare     = 10
	goodTimes    = 4
	certainty    = 4
	slowTimes    = 3
	slowMargin   = 100 * time.Millisecond
	// A path that was left is taken again after so many checks, one each pulse, of
	// which hardly any was lost; twice as many when it had to be left again within
	// relapse.
	leastClean = 30
	mostClean  = 600
	relapse    = 10 * time.Minute
	// suspiciousLoss is how many messages the peer misses at once when that is a
	// reason for a review.
	suspiciousLoss = 2
)

// Quality is what checks say of a path. The zero value says nothing.
type Quality struct {
	Loss float64       // share of packets lost each way, if both are alike
	RTT  time.Duration // smoothed; zero where the loss is the reason
}

// quality is how many of the checks on a pair were answered lately. The zero
// value knows of none.
type quality struct {
	lost  uint64  // the last of them, newest in the lowest bit: 1 is a lost one
	count int     // how many of those bits are known
	run   int     // checks lost since the last answer
	past  float64 // share of lost ones before a review began
	next  time.Time

	left     Quality   // why the pair is not used; zero: it may be
	clean    int       // checks since the pair was left or lost several
	lone     int       // checks since the last loss
	hold     int       // clean ones that take the pair back
	returned time.Time // when that happened last
}

// review is a time of many checks on the direct path in use, and on the relay that
// could take its place.
type review struct {
	began time.Time // zero: none
	next  time.Time
	sent  int
	ended time.Time
}

// hit takes an answer: checks that were lost before it were lost on a path that
// works.
func (k *quality) hit() {
	if k.run <= outage {
		for range k.run {
			k.add(1)
		}
	}
	k.run = 0
	k.add(0)
}

func (k *quality) add(lost uint64) {
	k.lost = k.lost<<1 | lost
	k.count = min(k.count+1, windowChecks)
	k.clean++
	k.lone++
	if lost == 0 {
		return
	}
	if k.lone < leastClean {
		k.clean = 0
	}
	k.lone = 0
}

// losses is how many of the known checks are lost.
func (k *quality) losses() int {
	return bits.OnesCount64(k.lost << (windowChecks - k.count))
}

// share is the part of checks that get no answer.
func (k *quality) share() float64 {
	if k.count == 0 {
		return 0
	}
	return float64(k.losses()) / float64(k.count)
}

// loss is the share of packets lost each way, of which both carry a check.
func (k *quality) loss() float64 { return 1 - math.Sqrt(1-k.share()) }

// lossy reports whether too many checks are lost, and that not by chance.
func (k *quality) lossy() bool {
	mean := float64(k.count) / badShare
	return k.count >= leastChecks && float64(k.losses()) > mean+math.Sqrt(mean)
}

// exceeds reports whether more checks are lost than on a good way, and that not by
// chance: it compares two proportions.
func (k *quality) exceeds(good *quality) bool {
	n, m := float64(k.count), float64(good.count)
	both := float64(k.losses()+good.losses()) / (n + m)
	deviation := math.Sqrt(both * (1 - both) * (1/n + 1/m))
	return good.share()*goodTimes <= k.share() && k.share()-good.share() >= certainty*deviation
}

// restart begins the count anew, so that what is lost from here on is seen soon.
func (k *quality) restart() { k.past, k.count = k.share(), 0 }

// revive forgets what was before a pair answered again.
func (k *quality) revive() { *k = quality{hold: k.hold, returned: k.returned} }

// worse tells in which way a direct pair is worse than a relay that is good; the
// zero value: in none that matters.
func (q *pair) worse(relay *pair) Quality {
	switch {
	case q.quality.lossy() && relay.quality.count >= relayChecks && q.quality.exceeds(&relay.quality):
		return Quality{Loss: q.quality.loss()}
	case q.slower(relay, slowTimes, slowMargin):
		return Quality{RTT: q.rtt}
	}
	return Quality{}
}

// slower reports whether a direct pair is so many times slower than a relay, and
// that by a margin.
func (q *pair) slower(relay *pair, times, margin time.Duration) bool {
	return q.samples >= minSamples && relay.samples >= minSamples && q.rtt > times*relay.rtt && q.rtt-relay.rtt > margin
}

// compareSeen notes what the data plane's counters say of losses.
func (p *peer) compareSeen(old Activity, now time.Time) {
	p.missed = p.missed || p.seen.Lost-old.Lost >= suspiciousLoss
	switch {
	case p.seen.Received != old.Received:
		p.unanswered = time.Time{}
	case p.seen.Sent != old.Sent && p.unanswered.IsZero():
		p.unanswered = now
	}
}

// grade takes the answer to a check.
func (q *pair) grade(t transaction, now time.Time) {
	q.reach.measured(t.size)
	if t.size == 0 { // a long one takes longer
		q.measure(now.Sub(t.at))
	}
	switch {
	case !q.valid:
		q.quality.revive()
	case q.suspect:
		q.quality.run = 0
	case t.counts:
		q.quality.hit()
	}
}

// overdue counts the checks on a pair that are lost by now, and reports whether
// there was one.
func (a *Agent) overdue(q *pair, now time.Time) bool {
	lost := false
	for _, id := range q.waiting {
		t := a.sent[id]
		if !t.counts || now.Sub(t.at) < max(3*q.rtt, lossDeadline) {
			continue
		}
		t.counts = false
		a.sent[id] = t
		q.quality.run++
		lost = true
	}
	return lost
}

// assess measures the direct path in use where a relay could take its place, and
// moves there when that is clearly better.
func (a *Agent) assess(p *peer, now time.Time) {
	s, suspicious := p.selected, p.missed
	p.missed = false
	for _, q := range p.pairs {
		if a.overdue(q, now) && q == s {
			suspicious = true
		}
	}
	r := p.relay(nil)
	if s == nil || r == nil || !r.valid || r.suspect || !p.active(now) {
		p.review = review{ended: p.review.ended}
		return
	}
	a.pulse(p, now)
	if s.relayed() || s.suspect {
		p.review = review{ended: p.review.ended}
		return
	}
	suspicious = suspicious || s.slower(r, slowTimes, slowMargin)
	if suspicious && p.review.began.IsZero() && now.Sub(p.review.ended) >= trialRest {
		p.review = review{began: now, next: now}
		s.quality.restart()
		r.quality.restart()
	}
	if !p.review.began.IsZero() {
		a.reviewPath(p, r, now)
	}
}

// pulse checks the direct path in use; or those that were left, and the relay in
// their place.
func (a *Agent) pulse(p *peer, now time.Time) {
	left := p.avoided() != nil
	for _, q := range p.pairs {
		k := &q.quality
		used := q == p.selected && (left || !q.relayed())
		if !used && k.left == (Quality{}) || !q.valid || q.suspect || now.Before(k.next) {
			continue
		}
		k.next = now.Add(pulse)
		a.sendCheck(p, q, outgoing{now: now, from: q.from()})
	}
}

// reviewPath drives a review.
func (a *Agent) reviewPath(p *peer, r *pair, now time.Time) {
	s, t := p.selected, &p.review
	why := s.worse(r)
	took := now.Sub(t.began)
	fine := s.quality.count >= leastChecks && t.sent > trialChecks && !s.quality.lossy() && why == Quality{}
	switch {
	case took >= badFor && why != Quality{}:
		*t = review{ended: now}
		a.avoid(p, s, why, now)
		a.choose(p, r, now)
		return
	case fine || took >= longestTrial:
		*t = review{ended: now}
		return
	case now.Before(t.next):
		return
	}
	t.next = now.Add(max(trialGap, s.rtt/4))
	t.sent++
	a.sendCheck(p, s, outgoing{now: now, from: s.from()})
	a.sendCheck(p, r, outgoing{now: now})
}

// avoid notes that a direct pair is left for a relay.
func (a *Agent) avoid(p *peer, q *pair, why Quality, now time.Time) {
	k := &q.quality
	if !k.returned.IsZero() && now.Sub(k.returned) < relapse {
		k.hold = min(2*k.hold, mostClean)
	} else {
		k.hold = leastClean
	}
	k.hold = max(k.hold, leastClean)
	k.left, k.clean = why, 0
	a.log.Debug("path is bad", "peer", p, "loss", why.Loss, "rtt", why.RTT)
}

// avoids reports whether a direct pair that answers is not to take over from the
// relay in use, because it is worse. What was bad has to be good for a while.
func (a *Agent) avoids(p *peer, q *pair, now time.Time) bool {
	s, k := p.selected, &q.quality
	if s == nil || !s.relayed() || q.relayed() {
		return false
	}
	if s.suspect || !s.valid {
		k.left = Quality{}
		return false
	}
	if k.left == (Quality{}) {
		why := q.worse(s)
		if why == (Quality{}) {
			return false
		}
		a.avoid(p, q, why, now)
		a.announce(p.path())
		return true
	}
	stillBad := k.clean < k.hold || q.slower(s, slowTimes-1, slowMargin/2)
	if stillBad && !s.quality.alike(k) {
		return true
	}
	k.left, k.returned = Quality{}, now
	return false
}

// alike reports whether a relay that was good has become about as bad as the
// direct path that was left for it.
func (k *quality) alike(direct *quality) bool {
	return k.lossy() && k.share()*goodTimes/2 > direct.share()
}

// avoided returns the direct pair that would be the path if it were better; nil:
// there is none.
func (p *peer) avoided() *pair {
	if p.selected == nil || !p.selected.relayed() {
		return nil
	}
	i := slices.IndexFunc(p.pairs, func(q *pair) bool {
		return q.quality.left != (Quality{}) && q.valid && !q.suspect
	})
	if i < 0 {
		return nil
	}
	return p.pairs[i]
}
