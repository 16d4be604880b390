package punch

import (
	"context"
	"crypto/cipher"
	"crypto/ecdh"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Agent finds and keeps the best path to every peer. Create it with New and give
// it a goroutine with Run; all methods are safe for concurrent use, and none of
// them blocks, except Run and Ping.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	private *ecdh.PrivateKey
	boot    uint64        // our boot id
	wake    chan struct{} // Run has something to do

	mu     sync.Mutex
	peers  map[Key]*peer
	users  map[user]*peer // who sends checks with this user name
	sent   map[transactionID]transaction
	limits buckets[netip.Addr]
	queue  queue

	local   []netip.Prefix
	port    uint16
	began   time.Time
	changed time.Time // last change of the network; zero: none since the start
	servers []*server
	mapped  []netip.AddrPort // SetMapped
	remaps  time.Time        // last change of a mapping that was acted on
	own     []Candidate
	told    []Candidate // what OnCandidates said last
	tellAt  time.Time   // zero: nothing to tell

	refreshes refresher
	hard      hard

	announcer cipher.AEAD
	announced bucket // announcements opened

	activeUntil time.Time     // some peer has traffic
	moved       chan struct{} // closed and replaced at every change of a path
	sends       []datagram    // to send after unlocking
	effects     []func()      // to call in Run, in order
}

type datagram struct {
	b    []byte
	to   netip.AddrPort
	from netip.AddrPort
	ttl  int
	pair *pair // whose state is told of a failure; nil: nobody's
}

// transaction is a request that waits for its answer.
type transaction struct {
	peer   *peer   // nil: the request went to server
	pair   *pair   // where to
	server *server // where to
	at     time.Time
	ping   chan<- Path // nil: nobody waits
	lost   bool        // it said that we have no session
	size   int         // of a padded check; else 0
	counts bool        // it is lost when it stays without an answer
}

var (
	errPrivateKey = errors.New("private key is zero")
	errNoSend     = errors.New("no Send function")
)

// New returns an agent; it does nothing before Run. The error is a bad
// configuration: a private key of zero, or no Send.
func New(c Config) (*Agent, error) {
	if c.PrivateKey == [32]byte{} {
		return nil, fmt.Errorf("new agent: %w", errPrivateKey)
	}
	if c.Send == nil {
		return nil, fmt.Errorf("new agent: %w", errNoSend)
	}
	private, err := ecdh.X25519().NewPrivateKey(c.PrivateKey[:])
	if err != nil {
		return nil, fmt.Errorf("new agent: read private key: %w", err)
	}
	a := &Agent{
		cfg:     c,
		log:     c.Log,
		private: private,
		boot:    c.Boot,
		began:   time.Now(),
		wake:    make(chan struct{}, 1),
		peers:   map[Key]*peer{},
		users:   map[user]*peer{},
		sent:    map[transactionID]transaction{},
		limits:  buckets[netip.Addr]{},
		moved:   make(chan struct{}),
	}
	if a.announcer, err = announcer(c.Mesh); err != nil {
		return nil, fmt.Errorf("new agent: %w", err)
	}
	if a.boot == 0 {
		a.boot = uint64(time.Now().UnixNano())
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	return a, nil
}

// Run does the agent's work until ctx ends; then it returns nil. The On
// functions and Signal are called from it.
func (a *Agent) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		a.loop(ctx)
		return nil
	})
	return group.Wait()
}

func (a *Agent) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
		case <-timer.C:
		}
		next := a.turn(time.Now())
		if next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
	}
}

// turn does what is due and tells when something is due again. Counters are read
// without the lock, because they belong to the data plane.
func (a *Agent) turn(now time.Time) time.Time {
	a.mu.Lock()
	due := a.queue.popDue(now)
	a.mu.Unlock()

	seen := make([]Activity, len(due))
	if a.cfg.Activity != nil {
		for i, p := range due {
			seen[i] = a.cfg.Activity(p.key)
		}
	}

	a.mu.Lock()
	a.gather(now)
	for i, p := range due {
		if a.peers[p.key] != p {
			continue
		}
		p.observe(seen[i], now)
		if now.Before(p.activeUntil) {
			a.activeUntil = later(a.activeUntil, p.activeUntil)
		}
		a.step(p, now)
		if next := p.next(a, now); !next.IsZero() {
			a.queue.set(p, later(next, now.Add(minStep)))
		}
	}
	a.hardTurn(now)
	a.tell(now)
	next := earliest(a.gatherNext(now), a.hardTurnNext(), a.tellAt, a.queue.first())
	sends, effects := a.take(), a.effects
	a.effects = nil
	a.mu.Unlock()

	a.perform(sends)
	for _, effect := range effects {
		effect()
	}
	return next
}

// take returns the datagrams to send once the lock is released.
func (a *Agent) take() []datagram {
	sends := a.sends
	a.sends = nil
	return sends
}

func (a *Agent) perform(sends []datagram) {
	for _, d := range sends {
		if err := a.cfg.Send(d.b, d.to, d.from, d.ttl); err != nil {
			a.log.Debug("send failed", "to", d.to, "err", err)
			a.unsent(d, err)
		}
	}
}

// schedule has Run look at p at the given time.
func (a *Agent) schedule(p *peer, at time.Time) {
	a.queue.set(p, at)
	a.notify()
}

func (a *Agent) notify() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// minStep is the shortest time between two steps of a peer without an event.
const minStep = time.Millisecond

func later(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}

// earliest returns the first of some times; zero ones mean never.
func earliest(times ...time.Time) time.Time {
	var first time.Time
	for _, t := range times {
		if first.IsZero() || !t.IsZero() && t.Before(first) {
			first = t
		}
	}
	return first
}

// SetPeer adds or updates a peer. A peer whose key is not usable or who has more
// than MaxCandidates is refused and logged.
func (a *Agent) SetPeer(info Peer) {
	if len(info.Candidates) > MaxCandidates {
		a.log.Warn("peer refused: too many candidates", "candidates", len(info.Candidates))
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	p := a.peers[info.Key]
	if p == nil {
		var err error
		if p, err = a.newPeer(info.Key); err != nil {
			a.log.Warn("peer refused", "err", err)
			return
		}
		p.setNonce(info.Nonce)
		a.peers[info.Key] = p
	} else if info.Nonce != p.published || info.Online && !p.online {
		p.setNonce(info.Nonce)
		p.wantProbe, p.wantCall = true, true
	}
	p.published = info.Nonce
	p.wantCall = p.wantCall || info.Online && !p.online
	p.wantProbe = p.wantProbe || !info.Online && p.online && p.selected != nil
	p.online = info.Online
	if a.setCandidates(p, slices.Clone(info.Candidates), published) {
		p.wantCall = p.wantCall || p.wanted(now)
	}
	a.schedule(p, now)
}

// RemovePeer forgets a peer and its paths.
func (a *Agent) RemovePeer(k Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[k]
	if p == nil {
		return
	}
	for _, q := range p.pairs {
		a.forget(q)
	}
	for _, name := range p.users {
		delete(a.users, name)
	}
	a.queue.remove(p)
	delete(a.peers, k)
}

// Demand says that data waits for a peer, or that traffic to it starts after a
// pause. It is cheap and may be called for every packet.
func (a *Agent) Demand(k Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[k]
	now := time.Now()
	if p == nil || now.Sub(p.demanded) < demandInterval {
		return
	}
	pause := now.Sub(p.demanded) > demandPause
	p.demanded = now
	p.activeUntil = now.Add(activeFor)
	a.activeUntil = later(a.activeUntil, p.activeUntil)
	switch {
	case p.selected == nil || p.selected.relayed():
		p.wantCall = p.wantCall || pause
		p.wantProbe = p.wantProbe || now.Sub(p.received) > consentInterval
	case now.Sub(p.received) > consentInterval:
		p.wantProbe = true
	}
	a.schedule(p, now)
}

// NetworkChanged says that links, addresses or routes changed: every path is
// suspect, every server is asked and every peer is called again, at once.
func (a *Agent) NetworkChanged() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.changed = time.Now()
	a.networkChanged(a.changed, [2]bool{})
}

// networkChanged is NetworkChanged with the families of which an address of ours
// was lost. Their paths through NATs end at once: data sent from the new address
// would reach the peer's NAT unasked. Relays take over where there are some,
// although they, too, have to answer anew.
func (a *Agent) networkChanged(now time.Time, lost [2]bool) {
	for _, s := range a.servers {
		s.fresh = false
	}
	a.startGather(now)
	a.leaveHard(now)
	for _, p := range a.peers {
		a.setCandidates(p, nil, announced)
		for _, q := range p.pairs {
			a.forget(q)
			q.suspect = true
			q.sent, q.clear, q.tally = time.Time{}, time.Time{}, tally{}
			q.local = socket(q.local.Port())
			q.quality, q.reach = quality{}, reach{}
		}
		p.series = time.Time{}
		p.backoff = 0
		p.probe = probe{}
		p.uncertain = true
		p.suspectSince = now
		if p.wanted(now) || p.selected != nil {
			p.wantCall = true
			a.queue.set(p, now)
		}
		a.leave(p, now, lost)
	}
	a.notify()
}

// SetLocal tells the addresses of the real interfaces and our UDP port. A change
// is a change of the network, and reported.
func (a *Agent) SetLocal(addrs []netip.Prefix, port uint16) (changed bool) {
	local := make([]netip.Prefix, 0, len(addrs))
	for _, prefix := range addrs {
		ip := prefix.Addr().Unmap()
		if ip.IsGlobalUnicast() || a.cfg.Loopback && ip.IsLoopback() {
			bits := prefix.Bits()
			if prefix.Addr().Is4In6() {
				bits -= 96
			}
			local = append(local, netip.PrefixFrom(ip, bits))
		}
	}
	slices.SortFunc(local, func(x, y netip.Prefix) int {
		if c := x.Addr().Compare(y.Addr()); c != 0 {
			return c
		}
		return x.Bits() - y.Bits()
	})
	local = slices.Compact(local)
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.Equal(local, a.local) && port == a.port {
		return false
	}
	var lost [2]bool
	for _, prefix := range a.local {
		addr := netip.AddrPortFrom(prefix.Addr(), port)
		kept := slices.ContainsFunc(local, func(now netip.Prefix) bool { return now.Addr() == prefix.Addr() })
		lost[family(addr)] = lost[family(addr)] || !kept || port != a.port
	}
	now := time.Now()
	if a.port != 0 {
		a.changed = now
	}
	a.local, a.port = local, port
	a.refresh(now)
	a.networkChanged(now, lost)
	return true
}

// Path returns the path in use towards a peer.
func (a *Agent) Path(k Key) (Path, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[k]
	if p == nil || p.selected == nil {
		return Path{}, false
	}
	return p.path(), true
}
