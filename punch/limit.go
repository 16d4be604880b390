package punch

import (
	"maps"
	"net/netip"
	"time"
)

// Rates that hold towards an address until it answered (packets per second).
const (
	pairRate    = 20
	addressRate = 100
	signalRate  = 10
	// maxAddresses bounds the table of rate-limited addresses.
	maxAddresses = 4096
)

// bucket limits a rate. In any one second at most rate events pass: half of
// them may come as a burst, the other half refills. The zero value is full.
type bucket struct {
	used float64
	at   time.Time
}

func (b *bucket) drain(now time.Time, rate float64) {
	if elapsed := now.Sub(b.at); elapsed > 0 {
		b.used = max(0, b.used-elapsed.Seconds()*rate/2)
	}
	b.at = now
}

// ready reports whether take would succeed.
func (b *bucket) ready(now time.Time, rate float64) bool {
	b.drain(now, rate)
	return b.used+1 <= rate/2
}

func (b *bucket) take(now time.Time, rate float64) bool {
	if !b.ready(now, rate) {
		return false
	}
	b.used++
	return true
}

// wait tells how long until take succeeds.
func (b *bucket) wait(rate float64) time.Duration {
	missing := b.used + 1 - rate/2
	return max(0, time.Duration(missing/(rate/2)*float64(time.Second)))
}

// mayProbe charges one packet to an address that has not answered: to the pair
// and, over all peers, to the IP address.
func (a *Agent) mayProbe(q *pair, now time.Time) bool {
	if q.valid {
		return true
	}
	ip := q.addr.Addr()
	b := a.addresses[ip]
	if b == nil {
		if len(a.addresses) >= maxAddresses {
			a.forgetAddresses(now)
		}
		if len(a.addresses) >= maxAddresses {
			return false
		}
		b = &bucket{}
		a.addresses[ip] = b
	}
	return q.limit.take(now, pairRate) && b.take(now, addressRate)
}

func (a *Agent) forgetAddresses(now time.Time) {
	maps.DeleteFunc(a.addresses, func(_ netip.Addr, b *bucket) bool {
		b.drain(now, addressRate)
		return b.used == 0
	})
}
