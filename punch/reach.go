package punch

import (
	"math"
	"slices"
	"time"
)

const (
	// defaultDatagram is Config.Datagram of an interface MTU of 1400.
	defaultDatagram = 1400 + 32
	// A path under traffic proves its size again after provenFor, when many packets
	// were sent since, or some that nobody answers.
	provenFor     = 1500 * time.Millisecond
	manySent      = 10
	unansweredFor = 300 * time.Millisecond
	// soundGap is at least the time between two checks of one size.
	soundGap = 100 * time.Millisecond
	// So many checks of a size are lost, while small ones are answered, when it does
	// not pass: as many as make that improbable on a path with its losses.
	leastLost   = 3
	mostLost    = 10
	improbable  = 0.001
	enoughSmall = 2
	// raiseAfter is when larger sizes are tried again (RFC 8899 section 5.1.1).
	raiseAfter = 10 * time.Minute
	// Bytes that IP and UDP add to a datagram.
	overhead4 = 20 + 8
	overhead6 = 40 + 8
	// jumbo is the first packet that only local networks carry.
	jumbo = 9000
)

// packetSizes are the IP packets whose passage is tried, in bytes: what old and
// new lines, tunnels and carriers have, and the least of IPv6. The first is one
// that passes everywhere: a peer that does not answer it knows no padded checks.
func packetSizes() []int {
	return []int{668, 1040, ipv6Least, 1340, 1380, 1400, 1420, 1492, 1500, jumbo}
}

// ipv6Least is the packet that every link carries (RFC 8200 section 5).
const ipv6Least = 1280

// reach is how large the datagrams of a pair may be, as padded checks tell
// (RFC 8899). The zero value knows nothing.
type reach struct {
	size  int       // Path.MTU; 0: not known
	due   time.Time // before: neither known nor proven anew
	raise time.Time // when larger ones are tried; zero: as soon as one is known
	sent  uint64    // what the peer was sent when size was proven
	lost  uint64    // and what of it did not arrive
	sound sounding
}

// sounding is one search. Its zero value is none.
type sounding struct {
	sizes []int // ascending
	fall  bool  // the least of them are tried because a larger one did not pass
	best  int   // the largest that was answered
	tries int   // how often all that are larger were sent
	small int   // answers to small checks
	next  time.Time
}

// sizes are the datagrams to try on a pair, ascending, in bytes of UDP payload.
func (a *Agent) sizes(q *pair) []int {
	overhead, base := overhead6, a.datagram()
	if q.addr.Addr().Is4() {
		overhead = overhead4
	}
	list := []int{base}
	for _, packet := range packetSizes() {
		size := packet - overhead
		if size > base && (q.relayed() || packet >= jumbo && !a.near(q.addr)) {
			continue
		}
		list = append(list, size)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// datagram is the largest datagram of a path of which nothing is known. Checks
// have multiples of four bytes.
func (a *Agent) datagram() int {
	if a.cfg.Datagram == 0 {
		return defaultDatagram
	}
	return max(a.cfg.Datagram&^3, maxMessage+4)
}

// below is the size that a pair has when one does not pass any more: what every
// link of IPv6 carries, or else the least there is.
func (a *Agent) below(q *pair, size int) int {
	least := ipv6Least - overhead6
	if size > least {
		return min(least, a.datagram())
	}
	return a.sizes(q)[1]
}

// fathom finds out, under traffic, which datagrams the path in use carries.
func (a *Agent) fathom(p *peer, now time.Time) {
	q := p.selected
	if a.cfg.OnMTU == nil || q == nil || !q.valid || q.suspect || !p.active(now) {
		return
	}
	r := &q.reach
	if len(r.sound.sizes) == 0 {
		a.beginSound(p, q, now)
		return
	}
	if now.Before(r.sound.next) {
		return
	}
	lost := r.sound.tries >= q.provingLosses() && r.sound.small >= enoughSmall
	switch top := r.sound.sizes[len(r.sound.sizes)-1]; {
	case r.sound.best == top, lost:
		a.endSound(p, q, now)
	case r.sound.tries > mostLost: // not even small checks pass: no time for this
		r.sound = sounding{}
		r.due = now.Add(provenFor)
	default:
		a.sendSound(p, q, now)
	}
}

// beginSound begins what is due.
func (a *Agent) beginSound(p *peer, q *pair, now time.Time) {
	r := &q.reach
	all := a.sizes(q)
	switch base := a.datagram(); {
	case now.Before(r.due):
		return
	case r.size == 0:
		r.sound.sizes = all[slices.Index(all, base):]
	case !now.Before(r.raise):
		from, _ := slices.BinarySearch(all, r.size)
		r.sound.sizes = all[from:]
	case p.unproven(r, now):
		r.sound.sizes = []int{r.size}
	default:
		return
	}
	a.sendSound(p, q, now)
}

// unproven reports whether the size of a path has to be proven again.
func (p *peer) unproven(r *reach, now time.Time) bool {
	silent := !p.unanswered.IsZero() && now.Sub(p.unanswered) >= unansweredFor
	return silent || p.seen.Sent-r.sent >= manySent || p.seen.Lost != r.lost
}

// sendSound sends a check of every size that is not settled, and a small one.
func (a *Agent) sendSound(p *peer, q *pair, now time.Time) {
	s := &q.reach.sound
	s.tries++
	s.next = now.Add(max(soundGap, q.rtt+max(4*q.varied, probeMargin)))
	a.sendCheck(p, q, outgoing{now: now, from: q.from()})
	for _, size := range s.sizes {
		if size > s.best {
			a.sendCheck(p, q, outgoing{now: now, from: q.from(), size: size})
		}
	}
}

// provingLosses is how many checks have to be lost in a row to prove something.
func (q *pair) provingLosses() int {
	share := q.quality.past
	if q.quality.count >= relayChecks {
		share = max(share, q.quality.share())
	}
	switch s := q.reach.sound; {
	case s.small < s.tries: // small ones are lost, too
		return mostLost
	case share <= 0 || share >= 1:
		return leastLost
	}
	n := int(math.Ceil(math.Log(improbable) / math.Log(share)))
	return min(max(n, leastLost), mostLost)
}

// measured takes the answer to a check of a size, 0 for a small one.
func (r *reach) measured(size int) {
	switch s := &r.sound; {
	case len(s.sizes) == 0:
	case size == 0:
		s.small++
	default:
		s.best = max(s.best, size)
	}
}

// endSound draws the conclusion.
func (a *Agent) endSound(p *peer, q *pair, now time.Time) {
	r := &q.reach
	s := r.sound
	r.sound = sounding{}
	r.due, r.sent, r.lost = now.Add(provenFor), p.seen.Sent, p.seen.Lost
	all := a.sizes(q)
	switch {
	case s.best == 0 && !s.fall: // none of them passes, but smaller ones may
		if r.size > 0 {
			a.setMTU(p, q, a.below(q, r.size))
		}
		upTo, _ := slices.BinarySearch(all, s.sizes[0]+1)
		r.sound = sounding{sizes: all[:upTo], fall: true}
		a.sendSound(p, q, now)
		return
	case s.best == 0 && r.size == 0: // the peer knows no padded checks
		r.due = now.Add(raiseAfter)
	case s.best == 0:
		s.best = r.size
	case s.fall || len(s.sizes) > 1 || r.size == 0:
		r.raise = now.Add(raiseAfter)
	}
	if s.best == all[0] && s.best < a.datagram() { // next to nothing passes; what could be done?
		s.best = all[1]
	}
	a.setMTU(p, q, s.best)
}

// setMTU notes and tells how large the datagrams of the path in use may be.
func (a *Agent) setMTU(p *peer, q *pair, size int) {
	if q.reach.size == size {
		return
	}
	a.log.Debug("path mtu", "peer", p, "datagram", size, "before", q.reach.size)
	q.reach.size = size
	path := p.path()
	a.effects = append(a.effects, func() { a.cfg.OnMTU(path) })
}
