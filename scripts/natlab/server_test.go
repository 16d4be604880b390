package natlab

import (
	"testing"
	"time"
)

const (
	slowPing = 100 * time.Millisecond

	cacheBar  = 2 * time.Second
	onlineBar = 3 * time.Second
)

// TestServerDies kills the server: tunnels go on, restarted nodes find each
// other from what they remember, and a server that returns is used again.
func TestServerDies(t *testing.T) {
	needLab(t)
	var all figures
	for _, one := range kinds() {
		if testing.Short() && one != Masquerade {
			continue
		}
		t.Run(string(one), func(t *testing.T) { serverDies(t, &all, one) })
	}
	all.report(t)
	all.of("reply without server").atMost(t, cacheBar, cacheBar)
	all.of("online again").atMost(t, onlineBar, onlineBar)
}

func serverDies(t *testing.T, all *figures, kind NAT) {
	m, a, b := pair(t, kind, Masquerade)
	mustDirect(t, a, b)
	if err := m.coord.Kill(); err != nil {
		t.Fatal(err)
	}
	pingFor(t, a, b, time.Duration(runs(10, 60))*time.Second)
	for i := range runs(2, 5) {
		all.add(string(kind), "reply without server", restartBoth(t, a, b, i))
	}
	for range runs(1, 3) {
		start := time.Now()
		m.restartCoord(t)
		for _, n := range []*member{a, b} {
			if _, err := n.await(t.Context(), directWait, online); err != nil {
				t.Fatal(err)
			}
			all.add(string(kind), "online again", time.Since(start))
		}
		pingFor(t, b, a, time.Second)
		if err := m.coord.Kill(); err != nil {
			t.Fatal(err)
		}
	}
}

// pingFor sends ten pings a second and wants every one of them answered.
func pingFor(t *testing.T, from, to *member, d time.Duration) {
	t.Helper()
	ping := startPing(t, from.Host, to.addr, slowPing)
	time.Sleep(d)
	echoes := ping.stop(t)
	if n := lost(echoes); n > 0 {
		t.Errorf("%d of %d pings from %s to %s got no reply", n, len(echoes), from.nodeName, to.nodeName)
	}
}

// firstReply pings until there is a reply.
func firstReply(t *testing.T, from, to *member) {
	t.Helper()
	ping := startPing(t, from.Host, to.addr, slowPing)
	defer ping.stop(t)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatal(err)
	}
}

// restartBoth takes both nodes down and up, and returns when, after the
// return of the later up, the first ping was answered. Every other run their
// routers forget everything in between.
func restartBoth(t *testing.T, a, b *member, run int) time.Duration {
	t.Helper()
	ctx := t.Context()
	if err := both(a, b, func(n *member) error { return n.down(ctx) }); err != nil {
		t.Fatal(err)
	}
	if run%2 == 1 {
		if err := both(a, b, func(n *member) error { return n.home.Reboot(ctx) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := both(a, b, func(n *member) error { return n.up(ctx) }); err != nil {
		t.Fatal(err)
	}
	if run%2 == 1 {
		a, b = b, a
	}
	ping := startPing(t, a.Host, b.addr, fastPing)
	reply, err := ping.firstReply(directWait)
	ping.stop(t)
	if err != nil {
		t.Error(err)
		return directWait
	}
	t.Logf("run %d: up %v %v, reply %v", run, a.took, b.took, reply)
	return reply
}
