package overlay

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeLAN notes when something was sent.
type fakeLAN struct {
	joined int
	sent   []time.Duration
	start  time.Time
	in     chan []byte
}

func (f *fakeLAN) Join() error { f.joined++; return nil }

func (f *fakeLAN) Send([]byte) error {
	f.sent = append(f.sent, time.Since(f.start).Round(time.Second))
	return errors.New("no address")
}

func (f *fakeLAN) Run(ctx context.Context, receive func([]byte)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case b := <-f.in:
			receive(b)
		}
	}
}

func TestLANAnnouncesOftenThenSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLAN{start: time.Now(), in: make(chan []byte)}
		heard := ""
		var mute atomic.Bool
		l := &lan{
			open: func() (lanSocket, error) { return f, nil },
			announce: func() []byte {
				if mute.Load() {
					return nil
				}
				return []byte{1}
			},
			hear: func(b []byte) error { heard += string(b); return errors.New("of another mesh") },
			log:  slog.New(slog.DiscardHandler), changed: make(chan struct{}, 1),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.run(ctx) }()
		f.in <- []byte("hello")
		time.Sleep(100 * time.Second)
		synctest.Wait()
		if n := len(f.sent); n < 7 || n > 10 || f.joined != 1 || heard != "hello" {
			t.Errorf("sent at %v, joined %d times, heard %q", f.sent, f.joined, heard)
		}
		l.networkChanged()
		synctest.Wait()
		if !slices.Contains(f.sent, 100*time.Second) || f.joined != 2 {
			t.Errorf("after a change sent at %v, joined %d times", f.sent, f.joined)
		}
		n := len(f.sent)
		mute.Store(true)
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(f.sent) != n {
			t.Error("nothing was sent")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestNoMulticastIsNoFailure(t *testing.T) {
	l := &lan{open: func() (lanSocket, error) { return nil, errors.New("not here") }, log: slog.New(slog.DiscardHandler)}
	if err := l.run(t.Context()); err != nil {
		t.Error(err)
	}
}
