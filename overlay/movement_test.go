package overlay

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
)

// A sleeper is a clock that goes on while the bubble's does not: a machine that
// sleeps.
type sleeper struct {
	start time.Time

	mu    sync.Mutex
	slept time.Duration
	woken []time.Duration
}

func (s *sleeper) now() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.start) + s.slept
}

func (s *sleeper) sleep(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slept += d
}

func (s *sleeper) woke(d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.woken = append(s.woken, d)
	return nil
}

// watch starts to look at the clock, until stop is called.
func (s *sleeper) watch(t *testing.T, w sleepWatch) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	time.Sleep(wakeTick / 2)
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// take gives how long the sleeps were that were noticed since the last take.
func (s *sleeper) take() []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	woken := s.woken
	s.woken = nil
	return woken
}

func TestSleepIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sleeper{start: time.Now()}
		defer s.watch(t, sleepWatch{now: s.now, woke: s.woke})()
		for _, c := range []struct {
			slept time.Duration
			want  []time.Duration
		}{
			{0, nil},
			{wakeLate, nil},
			{wakeLate + time.Millisecond, []time.Duration{wakeTick + wakeLate + time.Millisecond}},
			{0, nil},
			{10 * time.Minute, []time.Duration{10*time.Minute + wakeTick}},
			{-time.Hour, nil}, // no clock of this kind goes back
			{0, nil},
		} {
			s.sleep(c.slept)
			time.Sleep(wakeTick) // half of a tick later
			if got := s.take(); !slices.Equal(got, c.want) {
				t.Errorf("slept %v: noticed %v, want %v", c.slept, got, c.want)
			}
		}
		time.Sleep(time.Hour)
		if got := s.take(); got != nil {
			t.Errorf("noticed %v while awake", got)
		}
	})
}

// Sockets that could not be opened after a sleep are tried again, ever more seldom,
// until it succeeds; the next sleep begins anew.
func TestReopenIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sleeper{start: time.Now()}
		var begin time.Time
		var tried []int // seconds after waking up
		fails := 0
		again := func() error {
			tried = append(tried, int(time.Since(begin).Round(time.Second).Seconds()))
			if fails--; fails >= 0 {
				return errors.New("no sockets")
			}
			return nil
		}
		woke := func(time.Duration) error {
			begin, tried = time.Now(), nil
			return again()
		}
		defer s.watch(t, sleepWatch{s.now, woke, again})()
		for _, c := range []struct {
			fails int
			awake time.Duration
			want  []int
		}{
			{0, time.Minute, []int{0}},
			{3, time.Minute, []int{0, 1, 3, 7}},
			{100, 5 * time.Minute, []int{0, 1, 3, 7, 15, 31, 63, 123, 183, 243}},
			{1, time.Minute, []int{0, 1}},
		} {
			fails = c.fails
			s.sleep(time.Minute)
			time.Sleep(c.awake)
			synctest.Wait()
			if !slices.Equal(tried, c.want) {
				t.Errorf("of which %d fail: tried after %v s, want %v", c.fails, tried, c.want)
			}
		}
	})
}

// After a sleep handshakes are started on every path, relayed or not.
func TestHandshakesAfterSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f fakeEndpoints
		e, end := startEndpoints(t, &f, slog.New(slog.DiscardHandler))
		defer end()
		e.resume() // without a path: nothing
		for i, p := range []punch.Path{
			{Peer: punch.Key{1}, Addr: netip.MustParseAddrPort("[fd00::2]:32769"), Type: punch.Relayed},
			{Peer: punch.Key{2}, Addr: netip.MustParseAddrPort("192.0.2.9:5"), Type: punch.Host},
		} {
			e.set(p)
			time.Sleep(time.Minute)
			synctest.Wait()
			f.take()
			e.resume()
			synctest.Wait()
			if got := f.take(); len(got) != i+1 || slices.ContainsFunc(got, func(s string) bool { return s != "handshake" }) {
				t.Errorf("with %d paths: did %q", i+1, got)
			}
			time.Sleep(time.Minute)
			f.take()
		}
	})
}
