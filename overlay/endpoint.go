package overlay

import (
	"context"
	"log/slog"
	"maps"
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
	dev  *tun.Device
	log  *slog.Logger
	wake chan struct{}

	mu      sync.Mutex
	pending map[punch.Key]punch.Path
	current map[punch.Key]punch.Path
}

func newEndpoints(dev *tun.Device, log *slog.Logger) *endpoints {
	return &endpoints{
		dev: dev, log: log, wake: make(chan struct{}, 1),
		pending: map[punch.Key]punch.Path{}, current: map[punch.Key]punch.Path{},
	}
}

// set notes a peer's path; only the last one counts.
func (e *endpoints) set(p punch.Path) {
	e.mu.Lock()
	e.pending[p.Peer] = p
	e.mu.Unlock()
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
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-handshakes.timer.C:
			handshakes.tick(time.Now())
		case <-e.wake:
			for p, ok := e.next(); ok; p, ok = e.next() {
				if e.write(p) {
					handshakes.start(p, time.Now())
				}
			}
		}
	}
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

// write makes the endpoint real and says whether the peer had none before.
func (e *endpoints) write(p punch.Path) (first bool) {
	old, had := e.path(p.Peer)
	var err error
	if p.Addr.IsValid() {
		e.dev.SetRoundTrip(tun.Key(p.Peer), p.RTT)
		err = e.dev.SetEndpoint(tun.Key(p.Peer), p.Addr, p.Local)
	} else {
		err = e.dev.ClearEndpoint(tun.Key(p.Peer))
	}
	if err != nil {
		e.log.Warn("endpoint not written", "peer", tun.Key(p.Peer), "err", err)
		return false
	}
	switch {
	case p.Addr.IsValid() && p.Addr == old.Addr: // only the own address changed
	case p.Addr.IsValid():
		e.log.Info("path", "peer", tun.Key(p.Peer), "via", via(p.Type), "rtt", p.RTT)
	default:
		e.log.Info("path lost", "peer", tun.Key(p.Peer), "was", via(old.Type))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !p.Addr.IsValid() {
		delete(e.current, p.Peer)
		return false
	}
	e.current[p.Peer] = p
	return !had
}

// A handshake is asked for again after a wait, and again: StartHandshake does
// nothing once there is a session, and wireguard-go alone would wait 5 s when a
// message of it was lost or came before the other side had its path.
const (
	handshakeTries = 8
	handshakeWait  = 100 * time.Millisecond
)

// starter starts handshakes on new paths and repeats the lost ones.
type starter struct {
	dev   *tun.Device
	timer *time.Timer
	open  map[punch.Key]*attempt
}

type attempt struct {
	left int
	wait time.Duration
	next time.Time
}

func newStarter(dev *tun.Device) *starter {
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
	}
	return ""
}
