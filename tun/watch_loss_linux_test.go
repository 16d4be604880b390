package tun

import (
	"context"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A call of Watch's function, and when it came.
type call struct {
	at     time.Time
	routes bool
}

// watchCalls collects the calls of Watch in the namespace, from when it is ready
// until the test ends: it sees addresses that the link gets.
func watchCalls(t *testing.T, s *space, l netlink.Link) chan call {
	t.Helper()
	calls := make(chan call, 64)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(s.fd, unix.CLONE_NEWNET)
		if err == nil {
			err = Watch(ctx, func(routes bool) { calls <- call{time.Now(), routes} })
		}
		done <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
	for i := 1; ; i++ {
		addr := mustAddr(t, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200, 0, byte(i)}), 32).String())
		s.do(t, func() error { return netlink.AddrAdd(l, addr) })
		if c, ok := next(calls); ok {
			if c.routes {
				t.Error("an address is told as a change of routes")
			}
			drain(calls)
			return calls
		}
		if i == 200 {
			t.Fatal("Watch tells nothing")
		}
	}
}

// next is the next call, or false when there is none for a while.
func next(calls chan call) (call, bool) {
	select {
	case c := <-calls:
		return c, true
	case <-time.After(5 * burst):
		return call{}, false
	}
}

// drain waits until nothing is told any more.
func drain(calls chan call) {
	for ok := true; ok; _, ok = next(calls) {
	}
}

// The loss of the default route is told at once. Collected, it would never be
// told sooner than after a burst.
func TestLostDefaultRouteIsToldAtOnce(t *testing.T) {
	s := newSpace(t)
	eth := cable("eth0")
	s.addLink(t, eth, "10.3.0.1/24")
	gateway := &netlink.Route{Gw: netip.MustParseAddr("10.3.0.254").AsSlice()}
	calls := watchCalls(t, s, eth)
	best := time.Hour
	for range 20 { // a busy machine may be late every now and then
		s.do(t, func() error { return netlink.RouteReplace(gateway) })
		drain(calls)
		var begin time.Time
		s.do(t, func() error {
			begin = time.Now()
			return netlink.RouteDel(gateway)
		})
		c, ok := next(calls)
		if !ok || !c.routes {
			t.Fatalf("told: %v, as a change of routes: %v", ok, c.routes)
		}
		best = min(best, c.at.Sub(begin))
		drain(calls)
	}
	t.Logf("told %v after the route was deleted", best)
	if best >= burst {
		t.Errorf("told %v after the route was deleted, at best", best)
	}
}

// A default route that comes moves paths although no address changes.
func TestNewDefaultRouteIsToldAsOne(t *testing.T) {
	s := newSpace(t)
	eth := cable("eth0")
	s.addLink(t, eth, "10.3.0.1/24")
	calls := watchCalls(t, s, eth)
	s.do(t, func() error { return netlink.RouteAdd(&netlink.Route{Gw: netip.MustParseAddr("10.3.0.254").AsSlice()}) })
	if c, ok := next(calls); !ok || !c.routes {
		t.Errorf("told: %v, as a change of routes: %v", ok, c.routes)
	}
}

// The first loss is told, and those that come with it are one call more.
func TestLossesOfOneBurst(t *testing.T) {
	var told []bool
	w := watcher{changed: func(routes bool) { told = append(told, routes) }}
	now := time.Now()
	w.note(moved, now)
	w.note(lost, now.Add(time.Millisecond))
	if len(told) != 1 || !told[0] || !w.due.IsZero() {
		t.Fatalf("a loss within a burst: told %v, the rest due %v", told, w.due)
	}
	for i := range 3 {
		w.note(lost, now.Add(time.Duration(2+i)*time.Millisecond))
	}
	if len(told) != 1 || !w.due.Equal(now.Add(2*time.Millisecond+burst)) {
		t.Fatalf("losses that follow: told %v, due %v", told, w.due.Sub(now))
	}
	w.tell()
	w.note(moved, now.Add(time.Second))
	w.tell()
	w.note(lost, now.Add(2*time.Second))
	if len(told) != 4 || !told[1] || told[2] || !told[3] {
		t.Fatalf("told %v", told)
	}
}
