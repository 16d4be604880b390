package portmap

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
)

// fake is a protocol of a router in memory.
type fake struct {
	label string

	mu      sync.Mutex
	after   time.Duration // find answers; negative: never
	slow    time.Duration // ask maps at once, and answers after that
	fails   error         // find, ask and alive
	life    time.Duration
	outer   netip.AddrPort
	has     bool
	asked   []time.Time
	wished  []netip.AddrPort
	checked int
	removed int
	gave    grant // removed last
}

func newFake(label string) *fake {
	return &fake{label: label, life: lifetime, outer: netip.MustParseAddrPort("203.0.113.7:1000")}
}

var errSilent = errors.New("silent")

func (f *fake) name() string { return f.label }

func (f *fake) find(ctx context.Context) error {
	f.mu.Lock()
	after, err := f.after, f.fails
	f.mu.Unlock()
	if after < 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(after):
		return err
	}
}

func (f *fake) ask(ctx context.Context, w want) (grant, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, time.Now())
	f.wished = append(f.wished, w.external)
	if f.fails != nil {
		return grant{}, f.fails
	}
	f.has = true
	got := grant{f.outer, f.life}
	if f.slow == 0 {
		return got, nil
	}
	f.mu.Unlock()
	defer f.mu.Lock()
	select {
	case <-ctx.Done():
		return grant{}, ctx.Err()
	case <-time.After(f.slow):
		return got, nil
	}
}

func (f *fake) alive(context.Context, grant) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.checked++
	return f.has, f.fails
}

func (f *fake) remove(_ context.Context, got grant) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.removed++
	f.gave = got
	f.has = false
	return nil
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// trial is a site under a fake clock.
type trial struct {
	*site
	mu   sync.Mutex
	told []string
	end  func()
}

func startSite(t *testing.T, protocols ...protocol) *trial {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &trial{site: newSite(protocols, wanted(), slog.New(slog.DiscardHandler))}
	s.report = func(m *Mapping) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if m == nil {
			s.told = append(s.told, "")
		} else {
			s.told = append(s.told, m.Protocol+" "+m.External.String())
		}
	}
	var running sync.WaitGroup
	running.Go(func() { s.run(ctx) })
	s.end = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(s.end)
	return s
}

func (s *trial) want(t *testing.T, told ...string) {
	t.Helper()
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.told, told) {
		t.Errorf("after %v told %q, want %q", time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)), s.told, told)
	}
}

func TestBestProtocolWins(t *testing.T) {
	const never = -1
	for _, test := range []struct {
		name          string
		one, two, tri time.Duration
		at            time.Duration
		want          string
	}{
		{"the best answers first", 5, 10, 20, 5, "one"},
		{"the best answers last, in time", 299, 10, 20, 299, "one"},
		{"the best answers too late", 301, 10, 20, 300, "two"},
		{"only the last answers", never, never, 20, 300, "tri"},
		{"the second and the last, late", never, 700, 500, 500, "tri"},
		{"nobody", never, never, never, 3000, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				list := []*fake{newFake("one"), newFake("two"), newFake("tri")}
				for i, after := range []time.Duration{test.one, test.two, test.tri} {
					list[i].after = after * time.Millisecond
				}
				s := startSite(t, list[0], list[1], list[2])
				time.Sleep(test.at*time.Millisecond - time.Microsecond)
				s.want(t)
				time.Sleep(time.Microsecond)
				if test.want == "" {
					s.want(t)
				} else {
					s.want(t, test.want+" 203.0.113.7:1000")
				}
				s.end()
			})
		})
	}
}

// A protocol that is ruled out is not waited for, and one that is spoken but
// refuses gives way to the next.
func TestNextProtocol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closed, refuses, works := newFake("closed"), newFake("refuses"), newFake("works")
		closed.fails = errSilent
		refuses.after = 50 * time.Millisecond
		works.after = 100 * time.Millisecond
		s := startSite(t, closed, &refusing{refuses}, works)
		time.Sleep(100*time.Millisecond - time.Nanosecond)
		s.want(t)
		time.Sleep(time.Nanosecond)
		s.want(t, "works 203.0.113.7:1000")
		s.end()
	})
}

type refusing struct{ *fake }

func (r refusing) ask(ctx context.Context, _ want) (grant, error) {
	r.mu.Lock()
	slow := r.slow
	r.mu.Unlock()
	select {
	case <-ctx.Done():
		return grant{}, ctx.Err()
	case <-time.After(slow):
		return grant{}, &refusal{err: errSilent}
	}
}

func TestRenewalAndRemoval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("pcp")
		s := startSite(t, f)
		begin := time.Now()
		time.Sleep(5*time.Hour + time.Minute)
		synctest.Wait()
		s.want(t, "pcp 203.0.113.7:1000")
		f.set(func() {
			for i, at := range f.asked {
				if want := time.Duration(i) * lifetime / 2; at.Sub(begin) != want {
					t.Errorf("asked after %v, want %v", at.Sub(begin), want)
				}
			}
			if len(f.asked) != 6 || f.wished[5] != f.outer {
				t.Errorf("asked %d times, for %v", len(f.asked), f.wished)
			}
			if f.checked < 290 || f.checked > 301 {
				t.Errorf("checked %d times in five hours", f.checked)
			}
		})
		s.end()
		s.want(t, "pcp 203.0.113.7:1000", "")
		if f.removed != 1 || f.has {
			t.Errorf("removed %d times", f.removed)
		}
	})
}

func TestRouterForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("pcp")
		s := startSite(t, f)
		time.Sleep(10 * time.Second)
		f.set(func() { f.has, f.outer = false, netip.MustParseAddrPort("203.0.113.9:2000") })
		s.look() // an announcement
		time.Sleep(time.Millisecond)
		s.want(t, "pcp 203.0.113.7:1000", "pcp 203.0.113.9:2000")
		f.set(func() { f.has, f.outer = false, netip.MustParseAddrPort("203.0.113.9:3000") })
		time.Sleep(checkEvery)
		s.want(t, "pcp 203.0.113.7:1000", "pcp 203.0.113.9:2000", "pcp 203.0.113.9:3000")
		s.end()
	})
}

// Announcements do not make us ask more than once a second.
func TestLooksAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("pcp")
		s := startSite(t, f)
		for range 1000 {
			s.look()
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		f.set(func() {
			if f.checked > 11 || f.checked < 8 {
				t.Errorf("checked %d times in 10 s", f.checked)
			}
		})
		s.end()
	})
}

func TestRouterFallsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("pcp")
		s := startSite(t, f)
		time.Sleep(time.Second)
		f.set(func() { f.fails = errSilent })
		time.Sleep(checkEvery + 10*time.Second)
		s.want(t, "pcp 203.0.113.7:1000", "")
		f.set(func() { f.fails = nil })
		time.Sleep(30 * time.Second)
		s.want(t, "pcp 203.0.113.7:1000", "", "pcp 203.0.113.7:1000")
		s.end()
	})
}

// A renewal that fails is repeated, and the mapping is kept as long as it lasts.
func TestRenewalFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("pcp")
		s := startSite(t, f)
		time.Sleep(lifetime/2 - time.Second)
		f.set(func() { f.fails = errSilent })
		time.Sleep(30 * time.Minute)
		s.want(t, "pcp 203.0.113.7:1000")
		f.set(func() {
			if len(f.asked) < 20 || len(f.asked) > 50 {
				t.Errorf("asked %d times in half an hour", len(f.asked))
			}
		})
		time.Sleep(31*time.Minute + checkEvery)
		s.want(t, "pcp 203.0.113.7:1000", "")
		s.end()
	})
}

// A router that has nothing for us is asked ever less, until something changes.
func TestBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("pcp")
		f.fails = errSilent
		counted := &counting{fake: f}
		s := startSite(t, counted)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if n := counted.count(); n < 80 || n > 220 {
			t.Errorf("looked for %d times a day", n)
		}
		f.set(func() { f.fails = nil })
		s.look()
		time.Sleep(2 * time.Second)
		s.want(t, "pcp 203.0.113.7:1000")
		s.end()
	})
}

type counting struct {
	*fake
	mu    sync.Mutex
	finds int
}

func (c *counting) find(ctx context.Context) error {
	c.mu.Lock()
	c.finds++
	c.mu.Unlock()
	return c.fake.find(ctx)
}

func (c *counting) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.finds
}

func TestUnsoundMappings(t *testing.T) {
	for addr, want := range map[string]bool{
		"203.0.113.7:1": true, "10.1.2.3:1": true, "100.64.0.1:1": true, "[2001:db8::1]:1": true,
		"203.0.113.7:0": false, "0.0.0.0:1": false, "127.0.0.1:1": false, "224.0.0.1:1": false,
		"255.255.255.255:1": false, "240.0.0.1:1": false, "[::]:1": false, "[ff02::1]:1": false, "[fe80::1]:1": false,
	} {
		if got := sound(netip.MustParseAddrPort(addr)); got != want {
			t.Errorf("sound(%s) = %v", addr, got)
		}
	}
	for addr, want := range map[string]bool{
		"10.1.2.3": true, "192.168.1.1": true, "172.16.0.1": true, "100.64.0.1": true, "100.127.1.1": true, "fd00::1": true,
		"203.0.113.7": false, "100.128.0.1": false, "2001:db8::1": false,
	} {
		if got := inner(netip.MustParseAddr(addr)); got != want {
			t.Errorf("inner(%s) = %v", addr, got)
		}
	}
}

// What a router is about to map when everything ends is taken back: when its answer
// comes soon, and when it does not.
func TestEndWhileAsking(t *testing.T) {
	for slow, want := range map[time.Duration]struct {
		took time.Duration
		gave bool
	}{200 * time.Millisecond: {200 * time.Millisecond, true}, time.Minute: {lastWait, false}} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake("a")
			f.slow = slow
			s := startSite(t, f)
			synctest.Wait() // it asks
			start := time.Now()
			s.end()
			if took := time.Since(start); took != want.took {
				t.Errorf("the end took %v, not %v", took, want.took)
			}
			if f.removed != 1 || f.has || (f.gave.external == f.outer) != want.gave {
				t.Errorf("removed %d times, there is one: %v, gave %v", f.removed, f.has, f.gave)
			}
		})
	}
}

// A renewal that is on its way at the end is waited for: it may have made another
// mapping.
func TestEndWhileRenewing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("a")
		f.life = time.Minute
		s := startSite(t, f)
		synctest.Wait()
		other := netip.MustParseAddrPort("203.0.113.7:2000")
		f.set(func() { f.slow, f.outer = 200*time.Millisecond, other })
		time.Sleep(30 * time.Second) // half of its life
		synctest.Wait()
		s.end()
		if f.removed != 1 || f.gave.external != other {
			t.Errorf("removed %d times, the last %v", f.removed, f.gave)
		}
	})
}

// Nothing is asked of a router that was not asked before, or refuses at the end.
func TestEndAfterRefusal(t *testing.T) {
	for name, set := range map[string]func(f *fake){
		"not asked": func(f *fake) { f.after = time.Second },
		"refused":   func(f *fake) { f.slow = 200 * time.Millisecond },
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake("a")
			set(f)
			s := startSite(t, &refusing{f})
			time.Sleep(100 * time.Millisecond)
			s.end()
			if f.removed != 0 {
				t.Errorf("%s: removed all the same", name)
			}
		})
	}
}
