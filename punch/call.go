package punch

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

// Cadence of a round of checks on one pair: at once, then after 20, 60, 140,
// 300, 620 and 1260 ms, each gap with 20 % jitter.
const (
	firstGap     = 20 * time.Millisecond
	roundChecks  = 7
	globalChecks = 4 // per call on addresses that are scarce, after an opener
	openerTTL    = 2
	openerPause  = time.Second // no second opener within
	// maxHold is how long checks wait for the far side's NAT to be opened;
	// shortHold when the peer could not be told.
	maxHold   = time.Second
	shortHold = 200 * time.Millisecond
	// recallAfter is how soon a call is not repeated for the peer's sake.
	recallAfter = time.Second
	// openFor is how long a NAT surely stays open after a packet.
	openFor = 20 * time.Second
	// Back-off of calls while there is no path.
	minBackoff = 5 * time.Second
	maxBackoff = 60 * time.Second
)

// family tells IPv4 and IPv6 apart: their NATs have nothing to do with each other.
func family(addr netip.AddrPort) int {
	if addr.Addr().Is4() {
		return 0
	}
	return 1
}

// held reports whether a check on q has to wait. A packet that reaches a far NAT
// before the peer's own packet has left may occupy the very mapping the peer
// needs. Verified pairs are exempt, unless the network changed and nothing flows
// there anyway.
func (a *Agent) held(p *peer, q *pair, now time.Time) bool {
	if !now.Before(p.holdUntil) || now.Before(q.clear) || a.reachesAll(q) {
		return false
	}
	stranger := q.suspect && p.uncertain && (p.moved || !p.active(now))
	if q.valid && !stranger {
		return false
	}
	return !p.released[family(q.addr)] && !a.covered(p, family(q.addr), now)
}

// release lets those checks go that need not wait any more.
func (a *Agent) release(p *peer, now time.Time) {
	for _, q := range p.pairs {
		if q.held && !a.held(p, q, now) {
			q.held, q.next = false, now
		}
	}
}

// covered reports whether the peer's NAT is open towards our address of now, so
// that it hears us at full TTL; where servers see us at several addresses, towards
// all of them, because any may be the one that the peer will see. Behind a NAT we
// have to know them: as long as there is no server to tell, the peer can only have
// opened for an address of the past.
func (a *Agent) covered(p *peer, kind int, now time.Time) bool {
	if now.Sub(p.openAt) >= openFor {
		return false
	}
	asked, seen, pending := false, false, false
	for _, s := range a.servers {
		if family(s.Addr) != kind {
			continue
		}
		asked = true
		switch {
		case s.asking() && s.asked <= promptRequests:
			return false
		case s.fresh && !slices.Contains(p.openTo, s.mapped):
			return false
		}
		seen, pending = seen || s.fresh, pending || s.asking()
	}
	return seen || !pending && (asked || !a.translated(kind))
}

// translated reports whether our addresses of a family are such as only a NAT
// leads out of.
func (a *Agent) translated(kind int) bool {
	hosts := slices.DeleteFunc(slices.Clone(a.own), func(c Candidate) bool {
		return c.Type != Host || family(c.Addr) != kind
	})
	return len(hosts) > 0 && !slices.ContainsFunc(hosts, func(c Candidate) bool { return !Private(c.Addr.Addr()) })
}

// call begins a round: openers towards public pairs, checks on near ones, and
// the signal.
func (a *Agent) call(p *peer, now time.Time) {
	p.wantCall = false
	if now.Sub(p.series) > 2*maxHold {
		p.series = now
		p.released = [2]bool{}
	}
	if p.holdUntil = now.Add(maxHold); p.holdUntil.After(p.series.Add(2 * maxHold)) {
		p.holdUntil = p.series.Add(2 * maxHold)
	}
	p.called = now
	p.calls++
	p.seek(now)
	p.backoff = min(max(p.backoff, minBackoff), maxBackoff)
	p.retryAt = now.Add(p.backoff)
	a.freshen(now, staleAfter)
	a.open(p, now, false)
	if a.cfg.Signal == nil {
		a.unheard(p, p.calls)
		return
	}
	a.signal(p, signalCall, now)
	if p.recall = (recall{}); p.backoff == minBackoff {
		p.recall.at = now.Add(repeatGap)
	}
}

// open sends openers and starts the cadence on the pairs, or on those only that
// were never part of a round. A relay needs no opener.
func (a *Agent) open(p *peer, now time.Time, untried bool) {
	for _, q := range p.pairs {
		if untried && q.tried || !a.eligible(p, q) || q.typ.revealed() && !q.valid {
			continue
		}
		if q.relayed() && !q.reachable() {
			continue
		}
		opened := now.Sub(q.sent) < openerPause || a.reachesAll(q)
		if !opened && (!q.valid || q.suspect) {
			a.sendCheck(p, q, outgoing{now: now, from: q.from(), ttl: openerTTL})
		}
		q.tried = true
		q.attempt, q.next, q.held = 0, now, false
	}
}

// unheard shortens the hold of a call that could not be signalled. Just after a
// change of the network, or the start, signals are only interrupted: the way that
// carries them has to come first.
func (a *Agent) unheard(p *peer, calls int) {
	if p.calls != calls {
		return
	}
	until := later(p.called.Add(shortHold), a.changed.Add(maxHold))
	if a.cfg.Signal != nil {
		start := a.began.Add(2 * maxHold)
		p.holdUntil, until = later(p.holdUntil, start), later(until, start)
	}
	if !until.Before(p.holdUntil) {
		return
	}
	for _, q := range p.pairs {
		if q.held {
			q.next = until
		}
	}
	p.holdUntil = until
}

// postpone puts off the own next call, because the peer's does the same now. Two
// sides that cannot meet are then silent together, long enough for what their
// attempts left in the NATs to expire.
func (p *peer) postpone(now time.Time) {
	if p.retryAt.IsZero() {
		return
	}
	if p.retryAt.Sub(now) < p.backoff-recallAfter {
		p.backoff = min(2*p.backoff, maxBackoff)
	}
	p.retryAt = now.Add(p.backoff)
}

// answerCall does what a call asks for. When the caller has not opened its NAT
// towards our address of today, because it did not know it, it is called back
// and our checks wait for it. The caller has no path: on ours it gets as many
// checks as on others, each of which has it check, too.
func (a *Agent) answerCall(p *peer, now time.Time) {
	p.wantAnswer = false
	p.postpone(now)
	for _, q := range p.pairs {
		q.asked = !q.relayed()
	}
	if a.unknown(p, now) && now.Sub(p.called) > recallAfter && p.talk.ready(now, signalRate) {
		a.call(p, now)
		return
	}
	a.open(p, now, false)
	a.signal(p, signalOpened, now)
}

// unknown reports whether the peer does not know where we are now.
func (a *Agent) unknown(p *peer, now time.Time) bool {
	fresh := false
	for _, s := range a.servers {
		if !s.fresh {
			continue
		}
		fresh = true
		if !a.covered(p, family(s.Addr), now) {
			return true
		}
	}
	return !fresh && slices.ContainsFunc(a.servers, (*server).asking)
}

// signal seals and sends a message to a peer; false: there is no room for it now.
func (a *Agent) signal(p *peer, kind signalKind, now time.Time) bool {
	if a.cfg.Signal == nil || !p.talk.take(now, signalRate) {
		return false
	}
	p.counter++
	s := signal{
		kind:       kind,
		boot:       a.boot,
		counter:    p.counter,
		nonce:      a.cfg.Nonces[0],
		candidates: a.own,
		hard:       p.meeting.mine,
		message:    p.message,
	}
	if kind.fresh() {
		s.hard = side{nat: NAT{Mapping: EndpointIndependent}, addr: a.hard.fresh.mapped}
	}
	for _, q := range p.pairs {
		if !a.near(q.addr) && !q.relayed() && !q.sent.IsZero() && now.Sub(q.sent) < openFor {
			s.opened = append(s.opened, q.addr)
		}
	}
	sealed := p.secrets.seal(s.marshal())
	p.talked.said(now)
	calls := p.calls
	a.effects = append(a.effects, func() {
		err := a.cfg.Signal(p.key, sealed)
		if err == nil {
			return
		}
		a.log.Debug("signal failed", "peer", p, "err", err)
		a.mu.Lock()
		defer a.mu.Unlock()
		p.talked.failed(err)
		a.unheard(p, calls)
		a.schedule(p, time.Now())
	})
	return true
}

// outgoing says how a check leaves.
type outgoing struct {
	now  time.Time
	from netip.AddrPort // own socket and address; zero: the main one, the system chooses
	ttl  int            // 0: the default
	ping chan<- Path    // gets the answer; nil: nobody waits
	lost bool           // says that we have no session
	size int            // of the check, in bytes; 0: it is not padded
}

// sendCheck sends a check on a pair if the limits allow it.
func (a *Agent) sendCheck(p *peer, q *pair, how outgoing) {
	if !a.mayProbe(p, q, how.now) {
		q.tally.withheld++
		return
	}
	p.counter++
	c := check{id: stun.NewTransactionID(), user: p.name, boot: a.boot, counter: p.counter, lost: how.lost, size: how.size}
	b, err := c.marshal(p.secrets.check)
	if err != nil {
		a.log.Error("check not built", "err", err)
		return
	}
	if len(q.waiting) >= maxOutstanding {
		delete(a.sent, q.waiting[0])
		q.waiting = q.waiting[1:]
	}
	q.waiting = append(q.waiting, c.id)
	a.sent[c.id] = transaction{
		peer: p, pair: q, at: how.now, ping: how.ping, lost: how.lost, size: how.size,
		counts: q.valid && !q.suspect && how.ttl == 0 && how.size == 0,
	}
	q.tally.left(how)
	if how.size == 0 {
		q.expect(how.now)
	}
	a.post(p, q, datagram{b: b, to: q.addr, from: how.from, ttl: how.ttl}, how.now)
}

// post queues a datagram and notes that something was sent there.
func (a *Agent) post(p *peer, q *pair, d datagram, now time.Time) {
	d.pair = q
	a.sends = append(a.sends, d)
	q.sent, q.opened = now, now
	if q == p.selected && d.ttl == 0 {
		p.sentAt = now
	}
}

// round sends the checks of the cadence that are due.
func (a *Agent) round(p *peer, now time.Time) {
	for _, q := range p.pairs {
		if q.next.IsZero() || q.next.After(now) {
			continue
		}
		if a.held(p, q, now) {
			q.next, q.held = p.holdUntil, true
			continue
		}
		q.held = false
		checks := roundChecks
		if a.scarce(p, q) {
			checks = globalChecks
		}
		if q.attempt >= checks || q.settled() || !a.eligible(p, q) {
			q.next, q.asked = time.Time{}, false
			continue
		}
		a.sendCheck(p, q, outgoing{now: now, from: q.from()})
		q.next = now.Add(jitter(firstGap<<q.attempt, 20))
		q.attempt++
	}
}

// settled reports whether enough is known of a pair for the choice of the path.
func (q *pair) settled() bool {
	return q.valid && !q.suspect && q.samples >= minSamples && !q.asked
}

// jitter varies d by up to the given percentage both ways.
func jitter(d time.Duration, percent int64) time.Duration {
	spread := int64(d) * percent / 100
	return d + time.Duration(rand.Int64N(2*spread+1)-spread)
}
