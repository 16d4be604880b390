package overlay

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
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
	fail   chan error // of the socket; nil: it works for ever
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
		case err := <-f.fail:
			return err
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

// A socket that cannot be opened, or fails, is opened again, ever more seldom, and
// at once after a change of the network.
func TestLANOpensAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		f := &fakeLAN{start: time.Now(), in: make(chan []byte), fail: make(chan error)}
		var mu sync.Mutex
		var opened []int
		failures := 4
		l := &lan{
			open: func() (lanSocket, error) {
				mu.Lock()
				defer mu.Unlock()
				opened = append(opened, int(time.Since(f.start).Seconds()))
				if failures--; failures >= 0 {
					return nil, broken
				}
				return f, nil
			},
			announce: func() []byte { return []byte{1} },
			log:      slog.New(slog.DiscardHandler), changed: make(chan struct{}, 1),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.run(ctx) }()
		at := func(second, more int) {
			time.Sleep(time.Duration(second)*time.Second - time.Since(f.start))
			mu.Lock()
			failures = more
			mu.Unlock()
		}
		at(100, 0)
		f.fail <- broken // a second later it is opened again
		at(110, 100)
		f.fail <- broken // too soon to have forgotten that
		time.Sleep(time.Hour)
		mu.Lock()
		n := len(opened)
		mu.Unlock()
		at(4000, 0)
		l.networkChanged()
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if want := []int{0, 1, 3, 7, 15, 101, 112, 116}; !slices.Equal(opened[:len(want)], want) {
			t.Errorf("opened after %v s, want %v", opened[:len(want)], want)
		}
		if n < 60 || n > 75 {
			t.Errorf("opened %d times in an hour", n)
		}
		if opened[len(opened)-1] != 4000 || f.sent[len(f.sent)-1] != 4000*time.Second {
			t.Errorf("opened after %v s, sent after %v", opened[len(opened)-1], f.sent[len(f.sent)-1])
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
