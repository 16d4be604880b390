package punch

import "time"

const (
	// repeatGap is how long a call waits for an answer before it is said again; the
	// next gaps are longer. Where the server is not reached, signals travel by UDP.
	repeatGap  = 250 * time.Millisecond
	maxRepeats = 3
)

// recall is when a call is said again.
type recall struct {
	at    time.Time // zero: it was answered, or that is enough
	count int
}

// repeatCall says a call again, the first of a search, that the peer has not
// answered. The openers that left with it still hold our NAT open.
func (a *Agent) repeatCall(p *peer, now time.Time) {
	r := &p.recall
	if r.at.IsZero() || now.Before(r.at) {
		return
	}
	if p.direct() != nil || r.count >= maxRepeats {
		r.at = time.Time{}
		return
	}
	if !p.talk.spare(now, signalRate) {
		r.at = now.Add(repeatGap)
		return
	}
	r.count++
	r.at = now.Add(repeatGap << r.count)
	a.signal(p, signalCall, now)
}
