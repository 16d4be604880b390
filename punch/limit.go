package punch

import (
	"maps"
	"time"
)

// Rates that hold towards an address until it answered (packets per second).
const (
	pairRate    = 20
	addressRate = 100
	signalRate  = 10
	urgent      = 2 // signals that only those of hard rounds, calls and answers may take
	// Bounds of the tables of addresses that have not answered.
	maxPairLimits = 4 * MaxCandidates
	maxAddresses  = 4096
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

// spare reports whether take would leave enough for what is more urgent.
func (b *bucket) spare(now time.Time, rate float64) bool {
	return b.ready(now, rate) && b.used+1 <= rate/2-urgent
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
	if missing <= 0 {
		return 0
	}
	return time.Duration(missing/(rate/2)*float64(time.Second)) + time.Microsecond
}

// buckets limits a rate per key. Only keys whose bucket is not full are kept.
type buckets[K comparable] map[K]*bucket

// quota is what a table of buckets allows.
type quota struct {
	rate float64
	most int // keys; further ones get nothing
}

func (t buckets[K]) take(key K, now time.Time, allowed quota) bool {
	b := t[key]
	if b == nil {
		if len(t) >= allowed.most {
			maps.DeleteFunc(t, func(_ K, b *bucket) bool {
				b.drain(now, allowed.rate)
				return b.used == 0
			})
		}
		if len(t) >= allowed.most {
			return false
		}
		b = &bucket{}
		t[key] = b
	}
	return b.take(now, allowed.rate)
}

// mayProbe charges one packet to an address that did not answer lately: to the peer's
// transport address and, over all peers, to the IP address.
func (a *Agent) mayProbe(p *peer, q *pair, now time.Time) bool {
	if q.valid && now.Sub(q.answered) < consentExpiry {
		return true
	}
	return p.limits.take(q.addr, now, quota{pairRate, maxPairLimits}) &&
		a.limits.take(q.addr.Addr(), now, quota{addressRate, maxAddresses}) &&
		p.mayOpen(q, now) && (!a.scarce(p, q) || p.strangers.take(now))
}
