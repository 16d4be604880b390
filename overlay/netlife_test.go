package overlay

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"
)

// lifetimes are quick ones, against a server on the loopback.
func lifetimes(s *stunServer) lifetimeTest {
	l := newLifetimeTest("udp4", s.servers[0])
	l.settle, l.silences = time.Millisecond, []time.Duration{10 * time.Millisecond, 20 * time.Millisecond, 30 * time.Millisecond}
	return l
}

func TestLifetime(t *testing.T) {
	var asked atomic.Int32
	for name, x := range map[string]struct {
		replies      func() bool
		least, below time.Duration
	}{
		"outlives the test":     {func() bool { return true }, 30 * time.Millisecond, 0},
		"ends":                  {func() bool { return asked.Add(1) == 1 }, 10 * time.Millisecond, 20 * time.Millisecond},
		"unknown to the server": {nil, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSTUN(t, &stunServer{replies: x.replies})
			least, below, err := lifetimes(s).run(t.Context())
			if err != nil || least != x.least || below != x.below {
				t.Errorf("%v to %v (%v), want %v to %v", least, below, err, x.least, x.below)
			}
		})
	}
}

func TestLifetimeEndsWithItsContext(t *testing.T) {
	s := startSTUN(t, &stunServer{replies: func() bool { return true }})
	l := lifetimes(s)
	l.silences = []time.Duration{time.Hour}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := l.run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestLifetimeInSeconds(t *testing.T) {
	if l := newLifetime(0, 0); l != nil {
		t.Errorf("%+v", l)
	}
	if l := newLifetime(28*time.Second, 40*time.Second); l.AtLeastS != 28 || l.BelowS == nil || *l.BelowS != 40 {
		t.Errorf("%+v", l)
	}
	if l := newLifetime(300*time.Second, 0); l.AtLeastS != 300 || l.BelowS != nil {
		t.Errorf("%+v", l)
	}
}
