package portmap

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// lifetime is what routers are asked for; they may grant less, and what they
	// grant is taken between the bounds.
	lifetime    = 2 * time.Hour
	minLifetime = 20 * time.Second
	maxLifetime = 24 * time.Hour

	// checkEvery is how often a router is asked whether it still has the mapping:
	// not all announce that they were restarted.
	checkEvery = time.Minute
	// A check that got no answer is repeated after a wait that doubles.
	checkRetry  = time.Second
	checkMisses = 3 // then the protocol is looked for anew
	maxShift    = 6 // beyond checkEvery

	// Waits between attempts at a router that has nothing for us.
	firstRetry = 10 * time.Second
	lastRetry  = 15 * time.Minute
	// lookPause is the least time between two attempts or checks.
	lookPause = time.Second

	askTimeout    = 3 * time.Second
	removeTimeout = time.Second
	// lastWait is how long the answer to a request may take that is on its way when
	// everything ends, and how long the request to forget it, if none came.
	lastWait = 300 * time.Millisecond
)

// want is what a router is asked for. The zero external leaves the choice to it.
type want struct {
	port     uint16 // ours
	external netip.AddrPort
	lifetime time.Duration
}

// grant is what a router gave.
type grant struct {
	external netip.AddrPort
	lifetime time.Duration
}

// refusal is a router's own word that it will not, or has not: the reason to try
// another protocol rather than to ask again.
type refusal struct {
	err  error
	code byte // of PCP
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// protocol is a way to talk to one router about one port.
type protocol interface {
	name() string
	// find says whether the router speaks the protocol; nothing changes there.
	find(context.Context) error
	// ask makes or renews the mapping.
	ask(context.Context, want) (grant, error)
	// alive says whether the router still has the mapping.
	alive(context.Context, grant) (bool, error)
	// remove takes the mapping back. The zero grant is one that the router may have
	// made and has not told of: it must not harm anybody else's.
	remove(context.Context, grant) error
}

// site keeps one mapping at one router.
type site struct {
	protocols []protocol // the best first
	want      want
	log       *slog.Logger
	report    func(*Mapping)        // nil: there is none
	failed    func(said)            // an attempt ended without one
	listen    func(context.Context) // for announcements; nil: none
	looks     chan struct{}
}

func newSite(protocols []protocol, w want, log *slog.Logger) *site {
	return &site{
		protocols: protocols, want: w, log: log, looks: make(chan struct{}, 1),
		report: func(*Mapping) {}, failed: func(said) {},
	}
}

// look has the site ask the router now; it never blocks.
func (s *site) look() {
	select {
	case s.looks <- struct{}{}:
	default:
	}
}

// run works until ctx ends, and has removed the mapping when it returns.
func (s *site) run(ctx context.Context) {
	var group errgroup.Group
	if s.listen != nil {
		group.Go(func() error {
			s.listen(ctx)
			return nil
		})
	}
	wait := firstRetry
	for ctx.Err() == nil {
		if s.attempt(ctx) {
			wait = firstRetry
			s.pause(ctx, lookPause)
			continue
		}
		if s.pause(ctx, wait/2+rand.N(wait)) {
			wait = firstRetry
		} else {
			wait = min(2*wait, lastRetry)
		}
	}
	_ = group.Wait() // listening does not fail
}

// pause waits, and reports whether it was cut short because something changed;
// even then not within lookPause.
func (s *site) pause(ctx context.Context, wait time.Duration) (cut bool) {
	least := time.NewTimer(min(wait, lookPause))
	defer least.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-least.C:
	}
	rest := time.NewTimer(wait - min(wait, lookPause))
	defer rest.Stop()
	select {
	case <-ctx.Done():
	case <-rest.C:
	case <-s.looks:
		return true
	}
	return false
}

// attempt looks for a protocol and holds a mapping as long as that works; false:
// there was none.
func (s *site) attempt(ctx context.Context) bool {
	race, stop := startRace(ctx, s.protocols)
	defer stop()
	for p := race.next(ctx); p != nil; p = race.next(ctx) {
		got, err := s.ask(ctx, p, s.want)
		switch {
		case err == nil:
			stop()
			s.hold(ctx, p, got)
			return true
		case ctx.Err() != nil:
			s.takeBack(ctx, p, err)
			return false
		}
		s.log.Debug("port not mapped", "protocol", p.name(), "err", err)
		race.failed[p.name()] = err
	}
	if ctx.Err() == nil {
		s.failed(said{outerOf(s.protocols), race.failed.inOrder(s.protocols)})
	}
	return false
}

// takeBack has the router forget what it may have mapped although its answer did
// not come before the end.
func (s *site) takeBack(ctx context.Context, p protocol, err error) {
	if _, refused := errors.AsType[*refusal](err); refused || errors.Is(err, errEnded) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWait)
	defer cancel()
	err = p.remove(ctx, grant{})
	s.log.Debug("mapping on its way taken back", "protocol", p.name(), "err", err)
}

var errEnded = errors.New("everything ends")

// ask outlives ctx for lastWait, so that a mapping that the router is about to make
// is known, and can be removed.
func (s *site) ask(ctx context.Context, p protocol, w want) (grant, error) {
	if ctx.Err() != nil {
		return grant{}, errEnded
	}
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(lastWait, cancel) })()
	got, err := p.ask(asking, w)
	if err != nil {
		return grant{}, err
	}
	if !sound(got.external) {
		return grant{}, &refusal{err: errExternal}
	}
	got.lifetime = min(max(got.lifetime, minLifetime), maxLifetime)
	return got, nil
}

var errExternal = errors.New("the router names no address that can be reached")

// sound reports whether an address can be that of a way in.
func sound(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.Port() != 0 && ip.IsGlobalUnicast() && !ip.Is4In6() && (!ip.Is4() || ip.As4()[0] != 0 && ip.As4()[0] < 224)
}

// hold renews the mapping, and makes it anew when the router forgot it, until
// that fails or ctx ends.
func (s *site) hold(ctx context.Context, p protocol, got grant) {
	defer s.report(nil)
	h := holding{at: time.Now()}
	s.tell(p, got)
	for {
		if !h.wait(ctx, s.looks, got.lifetime) {
			s.remove(ctx, p, got)
			return
		}
		now := time.Now()
		h.tried = now
		gone := now.Sub(h.at) >= got.lifetime
		if now.Sub(h.at) < got.lifetime/2 {
			still, err := s.alive(ctx, p, got)
			if still || err != nil {
				if h.missed(err) && ctx.Err() == nil {
					return
				}
				continue
			}
			s.log.Debug("the router forgot the mapped port", "protocol", p.name(), "external", got.external)
			gone = true
		}
		next, err := s.ask(ctx, p, want{s.want.port, got.external, s.want.lifetime})
		_, refused := errors.AsType[*refusal](err)
		switch {
		case err == nil: // also at the end: then this is what is to be removed
		case ctx.Err() != nil:
			continue
		case refused, h.missed(err) && gone:
			s.log.Debug("mapped port lost", "protocol", p.name(), "err", err)
			return
		default:
			continue
		}
		h = holding{at: now, tried: now}
		if next.external != got.external {
			s.tell(p, next)
		}
		got = next
	}
}

// holding is when something was asked of the router last.
type holding struct {
	at     time.Time // granted
	tried  time.Time
	misses int // answers that did not come, in a row
}

// missed notes the outcome of a request, and reports whether it is the last
// that may fail.
func (h *holding) missed(err error) bool {
	if err == nil {
		h.misses = 0
		return false
	}
	h.misses++
	return h.misses >= checkMisses
}

// wait returns when the router is to be asked again; false: never again.
func (h *holding) wait(ctx context.Context, looks <-chan struct{}, granted time.Duration) bool {
	due := h.tried
	if due.IsZero() {
		due = h.at
	}
	least := due.Add(min(lookPause, granted/4))
	if h.misses > 0 {
		due = due.Add(min(checkRetry<<min(h.misses-1, maxShift), checkEvery))
	} else {
		due = due.Add(checkEvery)
		if half := h.at.Add(granted / 2); half.Before(due) {
			due = half
		}
	}
	t := time.NewTimer(time.Until(due))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	case <-looks:
	}
	t.Reset(time.Until(least))
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
	}
	return true
}

func (s *site) alive(ctx context.Context, p protocol, got grant) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return p.alive(ctx, got)
}

// remove takes the mapping back, which the end of ctx does not stop.
func (s *site) remove(ctx context.Context, p protocol, got grant) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if err := p.remove(ctx, got); err != nil {
		s.log.Debug("mapped port not removed", "protocol", p.name(), "err", err)
		return
	}
	s.log.Debug("mapped port removed", "protocol", p.name(), "external", got.external)
}

func (s *site) tell(p protocol, got grant) {
	s.log.Debug("port mapped", "protocol", p.name(), "external", got.external, "lifetime", got.lifetime)
	s.report(&Mapping{
		External: got.external, Protocol: p.name(), Lifetime: got.lifetime, DoubleNAT: inner(got.external.Addr()),
	})
}

// inner reports whether an address is of a home network or of a carrier's
// (RFC 1918, RFC 6598, RFC 4193).
func inner(ip netip.Addr) bool {
	return ip.IsPrivate() || netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64}), 10).Contains(ip)
}
