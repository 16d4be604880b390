package natlab

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/overlay"
)

const (
	holeMTU = 1280
	holeBar = 3 * time.Second

	badLoss    = 30 // percent, in each direction
	badBar     = 15 * time.Second
	healedWait = 2 * time.Minute
	moderate   = 50 * time.Millisecond
)

// TestBadLinesAreWhatTheyClaim measures what a black hole and a bad line let pass.
func TestBadLinesAreWhatTheyClaim(t *testing.T) {
	lab := newLab(t, Options{Delay: 5 * time.Millisecond})
	server := mustServer(t, lab, "server")
	one, two := mustHome(t, lab, "one", Masquerade), mustHome(t, lab, "two", Masquerade)
	laptops := [2]*Host{mustLaptop(t, one, "a"), mustLaptop(t, two, "b")}
	passes := func(from, to *Host, payload int) bool {
		return from.Command(t.Context(), "ping", "-c", "1", "-W", "1", "-M", "do", "-s", fmt.Sprint(payload), to.Addr().String()).Run() == nil
	}
	const headers = 28
	for i, step := range []struct {
		do    func() error
		large bool
	}{
		{func() error { return nil }, true},
		{func() error { return one.BlackHole(t.Context(), holeMTU) }, false},
		{func() error { return one.Heal(t.Context()) }, true},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if !passes(laptops[0], server, holeMTU-headers) || passes(laptops[0], server, holeMTU-headers+1) != step.large {
			t.Errorf("step %d: large packets do not pass, or pass: %v", i, !step.large)
		}
		if !passes(laptops[1], server, holeMTU) {
			t.Errorf("step %d: the other home suffers", i)
		}
	}
	if err := lab.Lose(t.Context(), one.WAN(), server.Addr(), badLoss); err != nil {
		t.Fatal(err)
	}
	for i, l := range laptops {
		ping := startPing(t, l, server.Addr(), quickPing)
		time.Sleep(3 * time.Second)
		echoes := ping.stop(t)
		share := lostShare(t, echoes)
		if want := float64(1-i) * (1 - 0.7*0.7); share < want-0.15 || share > want+0.15 {
			t.Errorf("%s loses %.2f of pings, want %.2f", l.Name(), share, want)
		}
	}
}

// mtuTo asks whether the MTU of the direct path to a node is known, and is one.
func mtuTo(name string, mtu int) func(overlay.Status) bool {
	return func(st overlay.Status) bool { p := pathTo(st, name); return p.Kind == "direct" && p.MTU == mtu }
}

// TestBlackHole has the line of a home pass no large packet any more, without a
// word: TCP goes on, between nodes that cut their messages and such that do not.
func TestBlackHole(t *testing.T) {
	needLab(t)
	var all figures
	for _, args := range [][]string{nil, {"--offloads=-large"}} {
		t.Run(strings.Join(append([]string{"up"}, args...), " "), func(t *testing.T) { blackHole(t, &all, args) })
	}
	all.report(t)
	all.of("detected after").atMost(t, holeBar, holeBar)
}

func blackHole(t *testing.T, all *figures, args []string) {
	_, a, b := pair(t, Masquerade, Masquerade)
	if len(args) > 0 {
		if err := b.up(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	mustDirect(t, a, b)
	ping := startPing(t, a.Host, b.addr, slowPing)
	for from, to := range map[*member]*member{a: b, b: a} {
		if _, err := from.await(t.Context(), directWait, mtuTo(to.nodeName, 1500)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.home.BlackHole(t.Context(), holeMTU); err != nil {
		t.Fatal(err)
	}
	began, hole := time.Now(), ping.now()
	size := int64(runs(5, 100)) << 20
	var g errgroup.Group
	var took time.Duration
	g.Go(func() (err error) {
		took, err = a.await(t.Context(), directWait, mtuTo(b.nodeName, holeMTU))
		return err
	})
	transfer(t, a.Host, b.Host, b.addr, size)
	t.Logf("%d MB after %v", size>>20, time.Since(began))
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	all.add(fmt.Sprintf("up %v", args), "detected after", took)
	began = time.Now()
	transfer(t, b.Host, a.Host, a.addr, size)
	t.Logf("%d MB back after %v", size>>20, time.Since(began))
	transfer(t, a.Host, b.Host, b.status(t).Self.IPv6, size)
	time.Sleep(hole + holeBar + 2*time.Second - ping.now())
	// A ping may share a message with others that is too long until the hole is found.
	if some := sentBetween(ping.stop(t), hole+holeBar, ping.now()-inFlight); lostShare(t, some) > 0.05 {
		t.Errorf("%d of %d pings lost after the hole was found", lost(some), len(some))
	}
	mustDirect(t, a, b)
	route := output(t, a.Host, "ip", "route", "get", b.addr.String())
	if got := strings.Contains(route, "mtu lock 1216"); got != (len(args) > 0) {
		t.Errorf("route to the peer: %s", route)
	}
}

// TestBadDirect has the direct path of two nodes lose packets, and theirs to the
// relay none: they move to the relay, and come back when the path is well again.
func TestBadDirect(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("punch/nattest has the short form, of the same name")
	}
	m, a, b := mix{Masquerade, Masquerade, false}.pair(t, Options{})
	mustDirect(t, a, b)
	both := func(limit time.Duration, kind func(string) func(overlay.Status) bool) time.Duration {
		t.Helper()
		u := &upgrade{mesh: m, a: a, b: b}
		return u.await(t, kind, limit)
	}
	ping := startPing(t, a.Host, b.addr, moderate)
	time.Sleep(5 * time.Second)
	bad := ping.now()
	ends := [2]netip.Addr{a.outside(), b.outside()}
	if err := m.Lose(t.Context(), ends[0], ends[1], badLoss); err != nil {
		t.Fatal(err)
	}
	took := both(badBar, relayedTo)
	moved := ping.now()
	reason := pathTo(a.status(t), b.nodeName).Reason
	if !strings.Contains(reason, "the direct path loses") {
		t.Errorf("reason in status: %q", reason)
	}
	time.Sleep(time.Minute)
	if !relayedTo(b.nodeName)(a.status(t)) || !relayedTo(a.nodeName)(b.status(t)) {
		t.Error("back on the direct path, which is bad")
	}
	well := ping.now()
	if err := m.Lose(t.Context(), ends[0], ends[1], 0); err != nil {
		t.Fatal(err)
	}
	back := both(healedWait, directTo)
	again := ping.now()
	time.Sleep(5 * time.Second)
	echoes := ping.stop(t)
	part := func(from, to time.Duration) string {
		some := sentBetween(echoes, from, to-inFlight)
		return fmt.Sprintf("%d of %d", lost(some), len(some))
	}
	t.Logf("moved after %v: %s; pings lost: before %s, until moved %s, on the relay %s, after the return in %v %s",
		took, reason, part(0, bad), part(bad, moved), part(moved, well), back, part(again, again+5*time.Second))
	if share := lostShare(t, sentBetween(echoes, moved+time.Second, well)); share > 0 {
		t.Errorf("%.3f of the pings lost over the relay", share)
	}
	if share := lostShare(t, sentBetween(echoes, again, again+5*time.Second-inFlight)); share > 0 {
		t.Errorf("%.3f of the pings lost after the return", share)
	}
}

// TestJumbo has two laptops of one LAN use its large frames, where both have them.
func TestJumbo(t *testing.T) {
	m := newMesh(t)
	home := mustHome(t, m.Lab, "home", Masquerade)
	a := m.join(t, mustLaptop(t, home, "a"))
	b := m.join(t, mustLaptop(t, home, "b"))
	mustDirect(t, a, b)
	widen := func(h *Host, mtu int) {
		t.Helper()
		var port, self script
		port.add("ip link set %s mtu %d", h.port, mtu)
		port.add("ip link set %s mtu %d", lanDevice, mtu)
		self.add("ip link set eth0 mtu %d", mtu)
		if err := errors.Join(home.sh(t.Context(), port), h.sh(t.Context(), self)); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct{ a, b, want int }{{9000, 1500, 1500}, {9000, 9000, 9000}} {
		widen(a.Host, step.a)
		widen(b.Host, step.b)
		for _, n := range []*member{a, b} {
			if err := errors.Join(n.down(t.Context()), n.up(t.Context())); err != nil {
				t.Fatal(err)
			}
		}
		mustDirect(t, a, b)
		// b was restarted after a: what a sends first may be for the session before.
		firstReply(t, a, b)
		ping := startPing(t, a.Host, b.addr, slowPing)
		for from, to := range map[*member]*member{a: b, b: a} {
			if _, err := from.await(t.Context(), directWait, mtuTo(to.nodeName, step.want)); err != nil {
				t.Error(err)
			}
		}
		size := int64(runs(16, 256)) << 20
		transfer(t, a.Host, b.Host, b.addr, size)
		transfer(t, b.Host, a.Host, a.addr, size)
		if n := lost(ping.stop(t)); n > 0 {
			t.Errorf("mtu %d: %d pings lost", step.want, n)
		}
	}
}
