package natlab

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlay/overlay"
)

const (
	relayKilledBar = 2 * time.Second
	restartedBar   = 500 * time.Millisecond
	directAgain    = 15 * time.Second

	whatAfterUp     = "after up returned"
	whatDirectAgain = "direct again"
	whatLinksAgain  = "links again"
)

// TestRelayKilled kills the relay a pair uses, under 5 ms pings, and starts it
// again: the pair moves to another, and the links come back by themselves. One
// relay is the server's, or the server is dead all the time.
func TestRelayKilled(t *testing.T) {
	needLab(t)
	var all figures
	for _, x := range []mix{{Masquerade, Masquerade, true}, {UDPBlocked, Masquerade, true}} {
		if testing.Short() && x.one == UDPBlocked {
			continue
		}
		t.Run(x.String(), func(t *testing.T) { relaysDie(t, &all, x) })
	}
	all.report(t)
	all.of(whatGap).atMost(t, relayKilledBar, relayKilledBar)
}

func relaysDie(t *testing.T, all *figures, x mix) {
	m, a, b := x.pair(t, Options{})
	m.addRelay(t, "r1")
	k := &relayKiller{mesh: m, all: all, a: a, b: b, cell: x.String() + ", server's and another"}
	for i := range runs(2, 10) {
		k.run(t, i)
	}
	m.addRelay(t, "r2")
	// Each tells the other through the server where it is to be found.
	time.Sleep(relaySettle)
	if err := m.coord.Kill(); err != nil {
		t.Fatal(err)
	}
	k.cell = x.String() + ", two others, no server"
	time.Sleep(relaySettle)
	for i := range runs(1, 10) {
		k.run(t, i)
	}
}

// relayKiller kills the relay that the first of two nodes uses.
type relayKiller struct {
	*mesh
	all  *figures
	cell string
	a, b *member
}

func (k *relayKiller) run(t *testing.T, i int) {
	t.Helper()
	ping := startPing(t, k.a.Host, k.b.addr, quickPing)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatalf("%s, run %d: %v", k.cell, i, err)
	}
	time.Sleep(2 * time.Second)
	used := k.a.relayTo(t, k.b)
	if used.Kind != "relay" {
		t.Fatalf("%s, run %d: path is %+v", k.cell, i, used)
	}
	at := ping.now()
	k.killRelay(t, used.Relay)
	time.Sleep(2*relayKilledBar + time.Second)
	gap := longestGap(answeredSince(ping.stop(t), at-inFlight))
	next := k.a.relayTo(t, k.b)
	t.Logf("%s, run %d: %s killed, gap %v, then %s", k.cell, i, used.Relay, gap, next.Relay)
	k.all.add(k.cell, whatGap, gap)
	if next.Relay == used.Relay || next.Relay == "" || gap > relayKilledBar {
		t.Errorf("%s, run %d: path was %+v and is %+v", k.cell, i, used, next)
	}
	k.startRelay(t, used.Relay)
	start := time.Now()
	for _, n := range []*member{k.a, k.b} {
		if _, err := n.awaitRelay(t.Context(), used.Relay, true); err != nil {
			t.Errorf("%s, run %d: %v", k.cell, i, err)
		}
	}
	k.all.add(k.cell, whatLinksAgain, time.Since(start))
}

// TestServerDownRelay kills the server while a relay lives: nodes that roam or
// restart find each other, and direct paths, through it.
func TestServerDownRelay(t *testing.T) {
	m, a, b := mix{Masquerade, Masquerade, false}.pair(t, Options{})
	mustDirect(t, a, b)
	m.addRelay(t, "r1")
	var homes []*Home
	for i := range 3 {
		homes = append(homes, mustHome(t, m.Lab, fmt.Sprintf("to-%d", i), Masquerade))
	}
	if err := m.coord.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	var all figures
	for i := range runs(2, 10) {
		roamDown(t, &all, a, b, homes[i%len(homes)])
	}
	for i := range runs(1, 5) {
		restartDown(t, &all, a, b, i)
	}
	all.report(t)
	all.of(whatGap).atMost(t, roamBar, roamBar)
	all.of(whatReply).atMost(t, cacheBar, cacheBar)
	all.of(whatDirectAgain).atMost(t, 0, directAgain)
}

// roamDown carries a laptop into another home and waits until the peer has a
// direct path to it there.
func roamDown(t *testing.T, all *figures, a, b *member, to *Home) {
	t.Helper()
	ping := startPing(t, a.Host, b.addr, 2*chunkPace)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatal(err)
	}
	time.Sleep(roamSettle)
	at := ping.now()
	if err := a.MoveTo(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	took, err := b.await(t.Context(), directAgain, func(st overlay.Status) bool {
		p := pathTo(st, a.nodeName)
		addr, _ := netip.ParseAddrPort(p.Endpoint)
		return p.Kind == "direct" && addr.Addr() == to.WAN()
	})
	if err != nil {
		t.Errorf("to %s: %v", to.name, err)
		took = directAgain
	}
	time.Sleep(roamSettle)
	gap := longestGap(answeredSince(ping.stop(t), at-inFlight))
	t.Logf("to %s: gap %v, direct after %v", to.name, gap, took)
	all.add("roam without server", whatGap, gap)
	all.add("roam without server", whatDirectAgain, took)
}

// restartDown takes both nodes down and up with routers that forgot them.
func restartDown(t *testing.T, all *figures, a, b *member, run int) {
	t.Helper()
	r := &race{t: t, all: all, a: a, b: b}
	r.restart(0)
	from, to := a, b
	if run%2 == 1 {
		from, to = b, a
	}
	ping := startPing(t, from.Host, to.addr, fastPing)
	reply, err := ping.firstReply(directWait)
	if err != nil {
		t.Error(err)
	}
	start := time.Now()
	if _, err := awaitDirect(t.Context(), a, b); err != nil {
		t.Error(err)
	}
	ping.stop(t)
	all.add("restart without server", whatReply, reply)
	all.add("restart without server", whatDirectAgain, time.Since(start))
}

// TestRestartedPeer kills a daemon under traffic and takes it up again: what is
// sent to it arrives as soon as `overlay up` has returned, over any path.
func TestRestartedPeer(t *testing.T) {
	needLab(t)
	var all figures
	for _, x := range []mix{{Masquerade, Masquerade, true}, {UDPBlocked, Masquerade, true}, {Masquerade, Masquerade, false}} {
		if testing.Short() && x.one == UDPBlocked {
			continue
		}
		t.Run(x.String(), func(t *testing.T) {
			_, low, high := x.pair(t, Options{})
			if bytes.Compare(wireGuardKey(t, low), wireGuardKey(t, high)) > 0 {
				low, high = high, low
			}
			for i := range runs(1, 10) {
				restarted(t, &all, x.String()+", lower key", low, high, i)
				restarted(t, &all, x.String()+", higher key", high, low, i)
			}
		})
	}
	all.report(t)
	all.of(whatAfterUp).atMost(t, restartedBar, restartedBar)
}

// restarted measures from the return of up to the first reply; one that came
// before counts as none.
func restarted(t *testing.T, all *figures, cell string, victim, peer *member, run int) {
	t.Helper()
	ping := startPing(t, peer.Host, victim.addr, 4*quickPing)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := unix.Kill(victim.daemon(t), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Duration(1+3*(run%2)) * time.Second)
	start := ping.now()
	if err := victim.up(t.Context()); err != nil {
		t.Fatal(err)
	}
	up := ping.now()
	back, err := ping.replyAfter(start, directWait)
	if err != nil {
		t.Errorf("%s, run %d: %v", cell, run, err)
	}
	t.Logf("%s, run %d: up took %v, reply %v after its return", cell, run, victim.took, back-up)
	all.add(cell, whatAfterUp, max(0, back-up))
	all.add(cell, whatUp, victim.took)
	ping.stop(t)
}
