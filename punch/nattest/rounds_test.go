package nattest_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

// roundsOf is what a node says of its hard rounds with another.
func roundsOf(t *testing.T, n, peer *nattest.Node) punch.Rounds {
	t.Helper()
	e, ok := n.Agent().Explain(peer.Key())
	if !ok {
		t.Fatal("no such peer")
	}
	return e.Rounds
}

// during runs two laptops behind the cell's NATs, with traffic both ways.
func (c cell) during(t *testing.T, seed uint64, look func(t *testing.T, a, b *nattest.Node)) {
	synctest.Test(t, func(t *testing.T) {
		w, a, b := c.world(seed, rand.New(rand.NewPCG(seed, 3)))
		defer w.Stop()
		start(t, a)
		start(t, b)
		defer a.Stream(b, time.Second)()
		defer b.Stream(a, time.Second)()
		time.Sleep(time.Second) // they know each other
		look(t, a, b)
		for _, f := range w.Faults() {
			t.Errorf("seed %d: %s", seed, f)
		}
	})
}

// TestRoundsFound has a round that finds the peer say so afterwards, and what it
// took.
func TestRoundsFound(t *testing.T) {
	nats := [2]nattest.NAT{{Mapping: apdm, Filtering: apdm, Sequential: 1}, nattest.Masquerade()}
	cell{nats: nats}.during(t, 1, func(t *testing.T, a, b *nattest.Node) {
		if _, ok := metDirect(a, b, 5*time.Second); !ok {
			t.Fatal("never direct")
		}
		time.Sleep(2 * time.Second)
		for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
			r := roundsOf(t, pair[0], pair[1])
			if r.State != punch.RoundNone || r.Ended != punch.RoundFound || r.Kind != punch.Predicted || r.Targets == 0 || r.Low == 0 || r.High < r.Low {
				t.Errorf("%+v", r)
			}
			if since := time.Since(r.Began); since < 2*time.Second || since > 10*time.Second {
				t.Errorf("began %v ago", since)
			}
			if r.Packets == 0 || r.Spent != r.Packets || r.Packets > 1200 || r.InVain != 0 {
				t.Errorf("packets: %+v", r)
			}
		}
	})
}

// TestRoundsFoundAtOnce has a round say that it found the peer as soon as it did,
// while its last answers are still waited for.
func TestRoundsFoundAtOnce(t *testing.T) {
	nats := [2]nattest.NAT{{Mapping: apdm, Filtering: apdm, Sequential: 1}, nattest.Masquerade()}
	cell{nats: nats}.during(t, 1, func(t *testing.T, a, b *nattest.Node) {
		for range 800 {
			time.Sleep(10 * time.Millisecond)
			for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
				r, direct := roundsOf(t, pair[0], pair[1]), isDirect(pair[0], pair[1])
				if r.InVain != 0 || direct && (r.State != punch.RoundNone || r.Packets > 0 && r.Ended != punch.RoundFound) {
					t.Fatalf("direct %v: %+v", direct, r)
				}
			}
		}
		if !isDirect(a, b) {
			t.Error("never direct")
		}
	})
}

// TestRoundsInVain has rounds within blocks of ports that are not the peer's any
// more: they say what they try while they are at work, and when the next may begin.
func TestRoundsInVain(t *testing.T) {
	block := nattest.NAT{Mapping: apdm, Filtering: apdm, Block: 1024}
	seen := map[punch.RoundState]bool{}
	vain := false // ten minutes later, too
	for seed := uint64(1); seed < 20 && !vain; seed++ {
		cell{nats: [2]nattest.NAT{block, block}}.during(t, seed, func(t *testing.T, a, b *nattest.Node) {
			for range 1500 {
				time.Sleep(10 * time.Millisecond)
				r := roundsOf(t, a, b)
				seen[r.State] = true
				if r.State == punch.RoundRunning && (r.Kind != punch.Birthday || r.Sockets == 0 || r.Targets == 0 || int(r.High)-int(r.Low) > 1024 || r.Packets > 1200) {
					t.Fatalf("seed %d: at work: %+v", seed, r)
				}
			}
			r := roundsOf(t, a, b)
			if r.Ended != punch.RoundSpent {
				return
			}
			if wait := time.Until(r.Next); r.State != punch.RoundPaused || r.InVain != 1 || r.Packets == 0 || wait <= 0 || wait > time.Minute {
				t.Errorf("seed %d: after it: %+v, next in %v", seed, r, time.Until(r.Next))
			}
			if _, packets := a.Hard(); r.Spent < packets || r.Spent > 1200 {
				t.Errorf("seed %d: spent %d, seen on the wire %d", seed, r.Spent, packets)
			}
			time.Sleep(10 * time.Minute)
			if r = roundsOf(t, a, b); r.Ended != punch.RoundSpent {
				return
			}
			vain = true
			if r.State != punch.RoundBackoff || time.Until(r.Next) > time.Hour || r.Spent <= r.Packets {
				t.Errorf("seed %d: after ten minutes: %+v, next in %v", seed, r, time.Until(r.Next))
			}
		})
	}
	if !vain || !seen[punch.RoundRunning] || !seen[punch.RoundPreparing] && !seen[punch.RoundAsked] {
		t.Errorf("in vain: %v, states %v", vain, seen)
	}
}

// TestRoundsUseless has nothing planned where nobody's ports can be guessed.
func TestRoundsUseless(t *testing.T) {
	random := nattest.NAT{Mapping: apdm, Filtering: apdm}
	cell{nats: [2]nattest.NAT{random, random}}.during(t, 1, func(t *testing.T, a, b *nattest.Node) {
		time.Sleep(10 * time.Second)
		for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
			if r := roundsOf(t, pair[0], pair[1]); r.State != punch.RoundUseless || r.Targets != 0 || r.Spent != 0 || !r.Began.IsZero() {
				t.Errorf("%+v", r)
			}
		}
	})
}
