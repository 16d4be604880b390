package overlay

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

// settleAfter is when a mapping is used a second time: many NATs keep one longer
// that was used for more than a moment.
const settleAfter = 2500 * time.Millisecond

// Lifetime is how long a UDP mapping lives that nothing is sent through: at least
// AtLeastS and less than BelowS seconds. BelowS is null when it outlived the
// measurement.
type Lifetime struct {
	AtLeastS int  `json:"atLeastS"`
	BelowS   *int `json:"belowS"`
}

// newLifetime puts the result of a test into words; nil: nothing is known.
func newLifetime(least, below time.Duration) *Lifetime {
	if least == 0 && below == 0 {
		return nil
	}
	l := &Lifetime{AtLeastS: int(least.Seconds())}
	if below > 0 {
		s := int(below.Seconds())
		l.BelowS = &s
	}
	return l
}

// lifetimeTest leaves one mapping after the other alone for longer, all at the same
// time, until one is gone. The server is asked from another socket to answer through
// it.
type lifetimeTest struct {
	network  string
	server   punch.Server
	silences []time.Duration // ascending
	settle   time.Duration
}

func newLifetimeTest(network string, server punch.Server) lifetimeTest {
	t := lifetimeTest{network: network, server: server, settle: settleAfter}
	for _, s := range []int{10, 20, 28, 40, 58, 75, 90, 115, 150, 175, 240, 300} {
		t.silences = append(t.silences, time.Duration(s)*time.Second)
	}
	return t
}

// length bounds how long the test takes.
func (l lifetimeTest) length() time.Duration {
	return l.silences[len(l.silences)-1] + 2*l.settle + netcheckWait
}

// run tells how long mappings live: at least, and below what; 0: not known. Both
// are 0 when the server cannot help.
func (l lifetimeTest) run(ctx context.Context) (least, below time.Duration, err error) {
	list, err := openSpares(l.network, len(l.silences))
	defer closeAll(list)
	if err != nil {
		return 0, 0, err
	}
	outer, start, err := l.prepare(ctx, list)
	if err != nil {
		return 0, 0, err
	}
	for i, s := range list {
		if outer[i] == 0 {
			continue
		}
		if err := sleep(ctx, time.Until(start.Add(l.silences[i]))); err != nil {
			return 0, 0, err
		}
		alive, can, err := l.reaches(ctx, mappedSocket{s, outer[i]})
		switch {
		case err != nil || !can:
			return 0, 0, err
		case !alive:
			return least, l.silences[i], nil
		}
		least = l.silences[i]
	}
	return least, 0, nil
}

// prepare uses the mapping of every socket twice, and tells their outer ports; 0:
// the server did not answer.
func (l lifetimeTest) prepare(ctx context.Context, list []*spare) (outer []uint16, end time.Time, err error) {
	outer = make([]uint16, len(list))
	for round := range 2 {
		if round > 0 {
			if err := sleep(ctx, l.settle); err != nil {
				return nil, time.Time{}, err
			}
		}
		g, gctx := errgroup.WithContext(ctx)
		for i, s := range list {
			g.Go(func() error {
				replies, err := s.ask(gctx, []punch.Server{l.server}, punch.Ask{})
				if len(replies) > 0 {
					outer[i] = replies[0].mapped.Port()
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return nil, time.Time{}, err
		}
	}
	return outer, time.Now(), nil
}

func sleep(ctx context.Context, d time.Duration) error {
	wait := time.NewTimer(d)
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mappedSocket is a socket and the port that its NAT gave it.
type mappedSocket struct {
	*spare
	outer uint16
}

// reaches has the server answer a question of another socket to a mapping.
// can is false when the answer comes to the asker: the server does not know how.
func (l lifetimeTest) reaches(ctx context.Context, to mappedSocket) (alive, can bool, err error) {
	asker, err := openSpare(l.network)
	if err != nil {
		return false, false, err
	}
	defer closeAll([]*spare{asker})
	q, err := punch.NewQuestion(l.server, punch.Ask{To: to.outer})
	if err != nil {
		return false, false, err
	}
	for try := range probeTries {
		_, _ = asker.conn.WriteToUDPAddrPort(q.Raw, l.server.Addr)
		b, _, err := to.read(ctx, time.Now().Add(probeGap<<try))
		if err != nil {
			return false, false, err
		}
		if _, ok := q.Answered(b); ok {
			return true, true, nil
		}
		b, _, err = asker.read(ctx, time.Now().Add(time.Millisecond))
		if _, ok := q.Answered(b); ok || err != nil {
			return false, false, err
		}
	}
	return false, true, nil
}
