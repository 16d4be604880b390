package punch

import "time"

// A router remembers for routerMemory each address that a packet went to and none
// came from. A peer can name other addresses all the time, so it can have so many
// tried at once, and one more each newcomerGap: within routerMemory less than five
// times the candidates that it may have at a time.
const (
	newcomerBurst = 3 * MaxCandidates
	newcomerGap   = time.Second
	routerMemory  = 30 * time.Second
)

// newcomers limits how many addresses of a peer are tried that nothing was sent to
// lately. The zero value is full.
type newcomers struct {
	used float64
	at   time.Time
}

func (n *newcomers) take(now time.Time) bool {
	n.used = max(0, n.used-now.Sub(n.at).Seconds()/newcomerGap.Seconds())
	n.at = now
	if n.used+1 > newcomerBurst {
		return false
	}
	n.used++
	return true
}

// mayOpen charges a packet that makes the routers on the way remember an address.
func (p *peer) mayOpen(q *pair, now time.Time) bool {
	known := now.Sub(q.opened) < routerMemory || now.Sub(q.heard) < routerMemory
	return known || q.relayed() || p.newcomers.take(now)
}
