package nattest_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"overlay/punch/nattest"
)

// TestSpoiled has routers that accept input hold the very ports that two laptops
// are about to need, because packets came too early: of an earlier life, or a
// check that overtook a lost signal. They meet all the same, from other sockets.
func TestSpoiled(t *testing.T) {
	const worlds, limit = 50, 3 * time.Second
	masquerade, open := nattest.Masquerade(), nattest.Masquerade()
	open.OpenInput = true
	for _, c := range []struct {
		name   string
		nats   [2]nattest.NAT // the second one is always spoiled, the first one if it can be
		loss   float64
		missed int // at most
	}{
		{"open × open", [2]nattest.NAT{open, open}, 0, 0},
		{"masquerade × open", [2]nattest.NAT{masquerade, open}, 0, 0},
		{"open × open, 20 % loss", [2]nattest.NAT{open, open}, 0.2, 1},
		{"masquerade × open, 20 % loss", [2]nattest.NAT{masquerade, open}, 0.2, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wantInTime(t, worlds, c.missed, func(t *testing.T, seed uint64) (time.Duration, bool) {
				return spoiled(t, seed, c.nats, c.loss, limit)
			})
		})
	}
}

func spoiled(t *testing.T, seed uint64, nats [2]nattest.NAT, loss float64, limit time.Duration) (time.Duration, bool) {
	rng := rand.New(rand.NewPCG(seed, 0x73706f696c))
	c := cell{nats: nats, loss: loss}
	w, a, b := c.world(seed, rng)
	defer w.Stop()
	spoil(w, a, b, nats[0].OpenInput)
	start(t, a)
	time.Sleep(time.Duration(rng.IntN(501)) * time.Millisecond)
	start(t, b)
	defer a.Stream(b, 50*time.Millisecond)()
	took, ok := metDirect(a, b, limit)
	for _, f := range w.Faults() {
		t.Errorf("seed %d: %s", seed, f)
	}
	return took, ok
}

// spoil has each router take the port of its laptop for the one of the other, the
// first one only if it takes ports at all.
func spoil(w *nattest.World, a, b *nattest.Node, both bool) {
	ends := [2]netip.AddrPort{}
	for i, n := range []*nattest.Node{a, b} {
		ends[i] = netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("203.0.113.%d", 20+i)), n.Port())
	}
	w.Stray(ends[0], ends[1])
	if both {
		w.Stray(ends[1], ends[0])
	}
	time.Sleep(100 * time.Millisecond)
}

// TestSpoiledForGood has two laptops whose packets never arrive try on and on from
// fresh sockets, a few packets each time.
func TestSpoiledForGood(t *testing.T) {
	c := cell{nats: [2]nattest.NAT{nattest.Masquerade(), nattest.Masquerade()}, parted: true}
	c.during(t, 3, func(t *testing.T, a, b *nattest.Node) {
		time.Sleep(10 * time.Minute)
		for _, n := range []*nattest.Node{a, b} {
			rounds, _ := n.Hard()
			if n.Spare() > 4 || rounds > 0 {
				t.Errorf("%d sockets are open, %d hard rounds", n.Spare(), rounds)
			}
		}
		if a, b := a.Lone(), b.Lone(); min(a, b) == 0 || max(a, b) > 200 {
			t.Errorf("%d and %d packets from fresh sockets", a, b)
		}
	})
}
