package punch

import "time"

const (
	// hintInterval is the least time between two hints to, or from, one peer, and
	// how long one is repeated.
	hintInterval = time.Second
	// hintGap is the least time between two repetitions.
	hintGap = 50 * time.Millisecond
)

// hint is that we have no WireGuard session with a peer, as long as the peer has
// not acknowledged it.
type hint struct {
	at   time.Time
	next time.Time // next check that says so; zero: none
}

// SessionLost tells a peer, in an authenticated check, that we have no WireGuard
// session with it, because it sends data of one that we do not know. It is cheap
// and does nothing when called again within a second.
func (a *Agent) SessionLost(k Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[k]
	now := time.Now()
	if p == nil || now.Sub(p.hint.at) < hintInterval {
		return
	}
	p.hint = hint{at: now, next: now}
	a.schedule(p, now)
}

// sendHint sends the hint on every path in use, until it is answered.
func (a *Agent) sendHint(p *peer, now time.Time) {
	if p.hint.next.IsZero() || p.hint.next.After(now) || p.selected == nil {
		return
	}
	if now.Sub(p.hint.at) >= hintInterval {
		p.hint.next = time.Time{}
		return
	}
	p.hint.next = now.Add(max(hintGap, p.selected.expected()+probeMargin))
	for _, q := range []*pair{p.selected, p.copying.to} {
		if q != nil {
			a.sendCheck(p, q, outgoing{now: now, from: q.from(), lost: true})
		}
	}
}

// sessionLost takes the peer's hint.
func (a *Agent) sessionLost(p *peer, now time.Time) {
	if a.cfg.OnSessionLost == nil || now.Sub(p.hinted) < hintInterval {
		return
	}
	p.hinted = now
	a.effects = append(a.effects, func() { a.cfg.OnSessionLost(p.key) })
	a.notify()
}

// Attempt says how the search for a direct path to a peer stands. The zero
// Attempt means that there is a direct path, or that none is looked for.
type Attempt struct {
	Since    time.Time // when the search began
	Calls    int       // how often the peer was called since
	Answered bool      // a signal of the peer came since
	Public   bool      // the peer has named an address that is not private
	Mapped   bool      // a STUN server answered: we have a reflexive candidate
}

// attempt tells why there is no direct path to a peer; zero where there is one.
func (a *Agent) attempt(p *peer) Attempt {
	if p.direct() != nil || p.search.Since.IsZero() {
		return Attempt{}
	}
	attempt := p.search
	attempt.Mapped = reflexive(a.own)
	for _, q := range p.pairs {
		named := q.source&(published|signalled) != 0
		attempt.Public = attempt.Public || named && !Private(q.addr.Addr())
	}
	return attempt
}

// seek notes a call in the search for a direct path.
func (p *peer) seek(now time.Time) {
	if p.direct() != nil {
		return
	}
	if p.search.Since.IsZero() {
		p.search = Attempt{Since: now}
	}
	p.search.Calls++
}
