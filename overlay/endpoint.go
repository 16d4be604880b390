package overlay

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"overlay/punch"
	"overlay/tun"
)

// endpoints is the one writer of peer endpoints. The agent tells it paths; it
// writes them through wgctrl, in order, from its own goroutine, because a write
// inside a receive function would deadlock wireguard-go.
type endpoints struct {
	dev endpointDevice
	// relay names the relay that a handle leads through.
	relay func(handle netip.AddrPort) string
	// member says whether a peer is still one. It is called without locks.
	member func(punch.Key) bool
	log    *slog.Logger
	wake   chan struct{}

	mu      sync.Mutex
	pending map[punch.Key]punch.Path
	current map[punch.Key]punch.Path
	copies  map[punch.Key]copies // as the device was told last
	failed  map[punch.Key]unwritten
	renewed map[punch.Key]bool
	resumed bool // all sessions ended
}

// A path that could not be written is written again after a wait that doubles.
const (
	firstRewrite = 200 * time.Millisecond
	lastRewrite  = 5 * time.Second
)

// copies says where copies go, and from which own socket and address.
type copies struct{ to, from netip.AddrPort }

// unwritten is a path that the device refused.
type unwritten struct {
	path punch.Path
	wait time.Duration
	next time.Time
}

// endpointDevice is what endpoints need of a tun.Device.
type endpointDevice interface {
	SetEndpoint(k tun.Key, to, from netip.AddrPort) error
	ClearEndpoint(k tun.Key) error
	SetCopy(k tun.Key, to, from netip.AddrPort)
	SetRoundTrip(k tun.Key, trip time.Duration)
	SetPathMTU(k tun.Key, to netip.AddrPort, size int)
	StartHandshake(k tun.Key)
}

func newEndpoints(dev endpointDevice, relay func(netip.AddrPort) string, member func(punch.Key) bool, log *slog.Logger) *endpoints {
	return &endpoints{
		dev: dev, relay: relay, member: member, log: log, wake: make(chan struct{}, 1),
		pending: map[punch.Key]punch.Path{}, current: map[punch.Key]punch.Path{}, renewed: map[punch.Key]bool{},
		copies: map[punch.Key]copies{}, failed: map[punch.Key]unwritten{},
	}
}

// set notes a peer's path; only the last one counts.
func (e *endpoints) set(p punch.Path) {
	e.mu.Lock()
	e.pending[p.Peer] = p
	e.mu.Unlock()
	e.poke()
}

// renew has a handshake started on the path of a peer that came to a relay: one
// sent there before was lost.
func (e *endpoints) renew(k punch.Key) {
	e.mu.Lock()
	e.renewed[k] = true
	e.mu.Unlock()
	e.poke()
}

func (e *endpoints) poke() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// forget drops what is known of a peer that left.
func (e *endpoints) forget(k punch.Key) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.pending, k)
	delete(e.current, k)
	delete(e.copies, k)
	delete(e.failed, k)
	delete(e.renewed, k)
}

// path is the endpoint as written.
func (e *endpoints) path(k punch.Key) (punch.Path, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p, ok := e.current[k]
	return p, ok
}

// measure hands on how long round trips take now.
func (e *endpoints) measure(a *punch.Agent) {
	e.mu.Lock()
	keys := slices.Collect(maps.Keys(e.current))
	e.mu.Unlock()
	for _, k := range keys {
		if p, ok := a.Path(k); ok {
			e.dev.SetRoundTrip(tun.Key(k), p.RTT)
		}
	}
}

func (e *endpoints) run(ctx context.Context) error {
	handshakes := newStarter(e.dev)
	rewrite := time.NewTimer(time.Hour)
	defer rewrite.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-handshakes.timer.C:
			handshakes.tick(time.Now())
			continue
		case <-rewrite.C:
		case <-e.wake:
		}
		for p, ok := e.next(); ok; p, ok = e.next() {
			if e.write(p) {
				handshakes.start(p, time.Now())
			}
		}
		for _, p := range e.refused(time.Now()) {
			if e.write(p) {
				handshakes.start(p, time.Now())
			}
		}
		for _, p := range e.again() {
			handshakes.start(p, time.Now())
		}
		for _, p := range e.afresh() {
			handshakes.start(p, time.Now())
		}
		rewrite.Reset(e.nextRewrite(time.Now()))
	}
}

// refused gives the paths that are to be written again now, and forgets those of
// peers that left meanwhile.
func (e *endpoints) refused(now time.Time) []punch.Path {
	e.mu.Lock()
	var due []punch.Path
	for _, u := range e.failed {
		if !now.Before(u.next) {
			due = append(due, u.path)
		}
	}
	e.mu.Unlock()
	return slices.DeleteFunc(due, func(p punch.Path) bool {
		if e.member(p.Peer) {
			return false
		}
		e.forget(p.Peer)
		return true
	})
}

// nextRewrite tells how long until a path is to be written again.
func (e *endpoints) nextRewrite(now time.Time) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	soonest := time.Hour
	for _, u := range e.failed {
		soonest = min(soonest, u.next.Sub(now))
	}
	return soonest
}

func (e *endpoints) next() (punch.Path, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for k, p := range e.pending {
		delete(e.pending, k)
		return p, true
	}
	return punch.Path{}, false
}

// again gives the relayed paths of peers that came to a relay.
func (e *endpoints) again() []punch.Path {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []punch.Path
	for k := range e.renewed {
		if p, ok := e.current[k]; ok && p.Type == punch.Relayed {
			list = append(list, p)
		}
	}
	clear(e.renewed)
	return list
}

// write makes the endpoint real and says whether the peer is to be reached at
// another address now.
func (e *endpoints) write(p punch.Path) (moved bool) {
	old, _ := e.path(p.Peer)
	k := tun.Key(p.Peer)
	if sameWay(old, p) {
		return e.resize(old, p)
	}
	e.copy(p) // first, so that nothing goes only where it is not answered yet
	var err error
	if p.Addr.IsValid() {
		e.dev.SetRoundTrip(k, p.RTT)
		if err = e.dev.SetEndpoint(k, p.Addr, p.Local); err == nil {
			e.dev.SetPathMTU(k, p.Addr, p.MTU)
		}
	} else {
		err = e.dev.ClearEndpoint(k)
	}
	if err != nil {
		e.refuse(p, err)
		return false
	}
	moved = p.Addr != old.Addr || p.Local.Port() != old.Local.Port()
	switch {
	case !moved: // only the own address or the copies changed
	case p.Addr.IsValid():
		e.log.Info("path", "peer", k, "via", e.text(p), "was", e.text(old), "reason", moveReason(old, p), "rtt", p.RTT)
	default:
		e.log.Info("path lost", "peer", k, "was", e.text(old))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.failed, p.Peer)
	if !p.Addr.IsValid() {
		delete(e.current, p.Peer)
		return false
	}
	e.current[p.Peer] = p
	return moved
}

// copy tells the device where copies go, unless it was told so. What it was told
// is noted apart from the endpoint, which may not be written yet.
func (e *endpoints) copy(p punch.Path) {
	e.mu.Lock()
	told, now := e.copies[p.Peer], copies{p.Also, p.AlsoLocal}
	if p.Also.IsValid() {
		e.copies[p.Peer] = now
	} else {
		delete(e.copies, p.Peer)
	}
	e.mu.Unlock()
	if now != told {
		e.dev.SetCopy(tun.Key(p.Peer), now.to, now.from)
	}
}

// refuse notes a path that was not written for another attempt, and tells of it
// once.
func (e *endpoints) refuse(p punch.Path, err error) {
	e.mu.Lock()
	u, repeated := e.failed[p.Peer]
	repeated = repeated && u.path == p
	wait := firstRewrite
	if repeated {
		wait = min(2*u.wait, lastRewrite)
	}
	e.failed[p.Peer] = unwritten{p, wait, time.Now().Add(wait)}
	e.mu.Unlock()
	if !repeated {
		e.log.Warn("endpoint not written", "peer", tun.Key(p.Peer), "err", err)
	}
}

// text names a path for people, without its addresses.
func (e *endpoints) text(p punch.Path) string {
	switch {
	case !p.Addr.IsValid():
		return "none"
	case p.Type == punch.Relayed:
		return e.relay(p.Addr)
	}
	return "direct " + via(p.Type)
}

// moveReason says why the path is another one.
func moveReason(old, now punch.Path) string {
	switch {
	case !old.Addr.IsValid():
		return "first path"
	case old.Type == punch.Relayed && now.Type == punch.Relayed:
		return "the other way is nearer, or the only one left"
	case old.Type == punch.Relayed && old.Left != punch.Quality{}:
		return "the direct path is good again"
	case old.Type == punch.Relayed:
		return "a direct path answered"
	case now.Left != punch.Quality{}:
		return badPath(now)
	case now.Type == punch.Relayed:
		return "the direct path does not answer"
	}
	return "the other path is nearer, or the only one that answers"
}

// A handshake is asked for again after a wait, and again after half as much more,
// because asking makes an answer void that is still under way: StartHandshake does
// nothing once there is a session, and wireguard-go alone would wait 5 s when a
// message of it was lost or came before the other side had its path.
const (
	handshakeTries = 8
	handshakeWait  = 100 * time.Millisecond
)

// starter starts handshakes on new paths and repeats the lost ones.
type starter struct {
	dev   endpointDevice
	timer *time.Timer
	open  map[punch.Key]*attempt
}

type attempt struct {
	left int
	wait time.Duration
	next time.Time
}

func newStarter(dev endpointDevice) *starter {
	return &starter{dev: dev, timer: time.NewTimer(time.Hour), open: map[punch.Key]*attempt{}}
}

func (s *starter) start(p punch.Path, now time.Time) {
	wait := max(handshakeWait, p.RTT+p.RTT/2)
	s.open[p.Peer] = &attempt{left: handshakeTries, wait: wait, next: now}
	s.tick(now)
}

func (s *starter) tick(now time.Time) {
	soonest := time.Hour
	for k, a := range s.open {
		if !now.Before(a.next) {
			if a.left == 0 {
				delete(s.open, k)
				continue
			}
			a.left--
			a.next = now.Add(a.wait)
			a.wait += a.wait / 2
			s.dev.StartHandshake(tun.Key(k))
		}
		soonest = min(soonest, a.next.Sub(now))
	}
	s.timer.Reset(soonest)
}

// via names how the remote candidate of a path was found, as status shows it.
func via(t punch.CandidateType) string {
	switch t {
	case punch.Host:
		return "host"
	case punch.ServerReflexive:
		return "srflx"
	case punch.PeerReflexive:
		return "prflx"
	case punch.PortMapped:
		return "mapped"
	case punch.Predicted:
		return "predicted"
	case punch.Birthday:
		return "birthday"
	}
	return ""
}
