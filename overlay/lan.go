package overlay

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/tun"
)

// Announcements go to groups of the local scope: RFC 2365 section 6.1, and a
// transient link-local one of RFC 4291 section 2.7.
const (
	lanGroup4 = "239.255.111.118"
	lanGroup6 = "ff12::6f76:6c79"
	lanPort   = 41646
)

const (
	// announceGap is the pause behind the first announcement after a change; it
	// doubles until it is announceEvery.
	announceGap   = 500 * time.Millisecond
	announceEvery = 30 * time.Second
	// lanAgain is how soon a socket is opened again that failed; the time doubles up
	// to lanMost, until one works for that long.
	lanAgain = time.Second
	lanMost  = time.Minute
)

// lanSocket is what lan needs of a tun.Multicast.
type lanSocket interface {
	Join() error
	Send(b []byte) error
	Run(ctx context.Context, receive func(b []byte)) error
}

// lan makes members that are in one LAN known to each other, server or not: it
// announces this node by multicast, often after a change of the network and
// seldom later.
type lan struct {
	// open opens the socket, and again after it failed.
	open     func() (lanSocket, error)
	announce func() []byte // nil: nothing to say
	hear     func(b []byte) error
	log      *slog.Logger
	changed  chan struct{}
}

func (s *session) newLAN() *lan {
	return &lan{
		open: func() (lanSocket, error) {
			return tun.OpenMulticast(netip.MustParseAddr(lanGroup4), netip.MustParseAddr(lanGroup6), lanPort)
		},
		announce: s.agent.Announcement,
		hear:     s.agent.HandleAnnouncement,
		log:      s.log,
		changed:  make(chan struct{}, 1),
	}
}

// networkChanged has the node announced anew at once.
func (l *lan) networkChanged() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// run announces and listens until ctx ends. Without multicast the node does all
// else.
func (l *lan) run(ctx context.Context) error {
	gap := lanAgain
	for warned := false; ; gap = min(2*gap, lanMost) {
		began := time.Now()
		err := l.serve(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		if time.Since(began) >= lanMost {
			gap, warned = lanAgain, false
		}
		if !warned {
			warned = true
			l.log.Warn("members in the same LAN are found only through the server", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-l.changed: // a link may have come
		case <-time.After(gap):
		}
	}
}

// serve announces and listens with one socket, until it fails or ctx ends.
func (l *lan) serve(ctx context.Context) error {
	socket, err := l.open()
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return socket.Run(ctx, func(b []byte) {
			if err := l.hear(b); err != nil {
				l.log.Debug("announcement dropped", "err", err)
			}
		})
	})
	g.Go(func() error {
		l.tell(ctx, socket)
		return nil
	})
	return g.Wait()
}

func (l *lan) tell(ctx context.Context, socket lanSocket) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	gap := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.changed:
			gap = 0
		case <-timer.C:
		}
		if gap == 0 {
			gap = announceGap
			if err := socket.Join(); err != nil {
				l.log.Debug("links not joined", "err", err)
			}
		}
		if b := l.announce(); b != nil {
			if err := socket.Send(b); err != nil {
				l.log.Debug("announcement not sent", "err", err)
			}
		}
		timer.Reset(gap - gap/10 + rand.N(gap/5))
		gap = min(2*gap, announceEvery)
	}
}
