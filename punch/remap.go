package punch

import (
	"time"

	"github.com/pion/stun/v2"
)

const (
	// remapInterval is the least time between two changes of a mapping that are
	// acted on, and how long after a change of our own network they are no news.
	remapInterval = 5 * time.Second
	// mappingLife is how long a mapping that is used surely stays: what is seen
	// later may be a new one because the old one expired.
	mappingLife = 2 * consentInterval
	// maxBelief is the longest time between two changes that are acted on because
	// the same peer told of them.
	maxBelief = 10 * time.Minute
)

// belief bounds how often one peer's word about our mapping is acted on: the time
// between doubles, until a server tells of a change, too.
type belief struct {
	gap  time.Duration
	next time.Time
}

// spend notes that the peer's word was acted on.
func (b *belief) spend(now time.Time) {
	b.gap = min(max(2*b.gap, remapInterval), maxBelief)
	b.next = now.Add(b.gap)
}

// Remapped says that a relay sees us at another address than before: a NAT lost
// its mappings. It is cheap, and does nothing when called again within 5 s.
func (a *Agent) Remapped() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if a.remap(now) {
		a.startGather(now)
	}
}

// seen takes from an answer where the peer saw our check come from. Another
// address than a moment ago means that our NAT lost its mappings. Of relays the
// peer sees only the handle.
func (a *Agent) seen(t transaction, m *stun.Message, now time.Time) {
	q := t.pair
	mapped, err := mappedOf(m)
	if err != nil || q.relayed() {
		return
	}
	old, at := q.seenAs, q.seenTime
	q.seenAs, q.seenTime = mapped, now
	if !old.IsValid() || old == mapped || !at.After(a.changed) || now.Sub(at) > mappingLife {
		return
	}
	if believed := &t.peer.belief; !now.Before(believed.next) && a.remap(now) {
		believed.spend(now)
		a.startGather(now)
	}
}

// confirmed has every peer believed again: a server, too, saw a mapping change.
func (a *Agent) confirmed() {
	for _, p := range a.peers {
		p.belief = belief{}
	}
}

// remap acts on a change of a mapping: the direct paths of peers with traffic have
// to answer anew, because what we send there may come from elsewhere, and
// OnRemapped is called. False means that it is too soon after the last one, or
// after a change of our own network, which moves mappings too.
func (a *Agent) remap(now time.Time) bool {
	if now.Sub(a.remaps) < remapInterval || now.Sub(a.changed) < remapInterval {
		return false
	}
	a.remaps = now
	a.log.Debug("mapped anew")
	for _, p := range a.peers {
		if q := p.direct(); q != nil && p.active(now) && !a.near(q.addr) {
			p.wantProbe = true
			a.queue.set(p, now)
		}
	}
	if a.cfg.OnRemapped != nil {
		a.effects = append(a.effects, a.cfg.OnRemapped)
	}
	a.notify()
	return true
}
