package punch

import "time"

// hardWait is how long a peer counts as waiting that could not have a round.
const hardWait = 2 * hardPause

// freeAt is when the next round may begin, so that a minute lies between the packets
// of two: one that is prepared in less time than the one before it would start out
// of step with the peer otherwise.
func (h *hard) freeAt() time.Time {
	if h.began.IsZero() {
		return time.Time{}
	}
	return later(h.began.Add(hardPause), h.ran.Add(hardPause-settle))
}

// fairness orders the peers that want the node's only round.
type fairness struct {
	had   time.Time // last round, found or in vain; zero: none
	waits time.Time // wants one, until then
}

// mayMeet reports whether a round with a peer may begin now. A peer that may not
// because others are first is remembered as waiting.
func (a *Agent) mayMeet(p *peer, now time.Time) bool {
	if now.Before(p.meeting.again()) {
		return false
	}
	busy := a.hard.round != nil || now.Before(a.hard.freeAt())
	if busy || now.Before(a.othersFirst(p, now)) {
		p.fair.waits = now.Add(hardWait)
		return false
	}
	p.fair.waits = now.Add(hardAnswer) // its turn is over when nothing comes of it
	return true
}

// othersFirst is until when p gives way to peers that wait and whose last round was
// before its own; zero: there are none. They have until their next proposal: one that
// only says that it wants a round keeps nobody longer.
func (a *Agent) othersFirst(p *peer, now time.Time) time.Time {
	var until time.Time
	if p.fair.had.IsZero() {
		return until
	}
	for _, q := range a.peers {
		if now.Before(q.fair.waits) && q.fair.had.Before(p.fair.had) && q.direct() == nil && !now.Before(q.meeting.again()) {
			until = later(until, earliest(q.fair.waits, a.hard.freeAt().Add(minHardBackoff)))
		}
	}
	return until
}
