package punch

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// TestQualityCounts holds a window of checks against plain counting.
func TestQualityCounts(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var k quality
	var all []uint64
	for range 1000 {
		if rng.IntN(4) == 0 {
			k.run++
			all = append(all, 1)
		} else {
			k.hit()
			all = append(all, 0)
		}
		if all[len(all)-1] == 1 {
			continue // counts when the next is answered
		}
		want := 0
		last := all[max(0, len(all)-windowChecks):]
		for _, lost := range last {
			want += int(lost)
		}
		if k.losses() != want || k.count != len(last) {
			t.Fatalf("%d of %d lost, want %d of %d", k.losses(), k.count, want, len(last))
		}
	}
	if k.share() < 0.1 || k.share() > 0.5 || math.Abs((1-k.loss())*(1-k.loss())-(1-k.share())) > 1e-9 {
		t.Errorf("share %f, loss %f", k.share(), k.loss())
	}
	k = quality{}
	for range 30 {
		k.hit()
	}
	k.run = outage + 1
	k.hit()
	if k.losses() != 0 || k.lossy() {
		t.Errorf("an interruption counts as %d losses", k.losses())
	}
}

func TestLossyIsNoChance(t *testing.T) {
	for _, c := range []struct {
		lost, count int
		want        bool
	}{{19, 19, false}, {3, 20, false}, {4, 20, true}, {8, 64, false}, {9, 64, true}, {0, 64, false}} {
		k := quality{count: c.count, lost: 1<<c.lost - 1}
		if k.lossy() != c.want {
			t.Errorf("%d of %d lost: %v", c.lost, c.count, !c.want)
		}
	}
}

// Two ways over one bad line differ by chance.
func TestExceedsIsNoChance(t *testing.T) {
	k := func(lost, count int) *quality { return &quality{count: count, lost: 1<<lost - 1} }
	for _, c := range []struct {
		bad, good *quality
		want      bool
	}{
		{k(8, 41), k(1, 41), false},
		{k(15, 41), k(0, 41), true},
		{k(14, 50), k(0, 50), true},
		{k(19, 64), k(3, 64), false},
		{k(30, 64), k(3, 64), true},
		{k(30, 64), k(9, 64), false}, // not good enough
	} {
		if c.bad.exceeds(c.good) != c.want {
			t.Errorf("%d of %d and %d of %d: %v", c.bad.losses(), c.bad.count, c.good.losses(), c.good.count, !c.want)
		}
	}
}

// besides returns two nodes with a direct path and a relay beside it.
func besides(w *world) (a, b *node) {
	a, b = w.gathered(1, outerA), w.gathered(2, outerB)
	meet(a, b)
	relays(a, b, 1)
	rest(3 * time.Second)
	return a, b
}

// TestSlowPath makes the direct path slower than the relay by more than is
// borne, by less, and then well again.
func TestSlowPath(t *testing.T) {
	for _, c := range []struct {
		oneWay time.Duration
		moves  bool
	}{{90 * time.Millisecond, true}, {55 * time.Millisecond, false}} {
		inWorld(t, func(w *world) {
			a, b := besides(w)
			a.talk(b, 5*time.Second, true)
			slow := func(d time.Duration) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.delay = func(x wire) time.Duration {
					if overRelay(x.to) {
						return oneWay
					}
					return d
				}
			}
			slow(c.oneWay)
			told := len(a.toldPaths())
			a.talk(b, time.Minute, true)
			if !c.moves {
				if n := len(a.toldPaths()) - told; n > 0 {
					t.Fatalf("moved %d times", n)
				}
				return
			}
			a.wantPath(b, b.handle(0))
			if p, _ := a.Path(b.key); p.Left.RTT < 150*time.Millisecond || p.Left.Loss > 0 || p.Also.IsValid() {
				t.Errorf("path %+v", p)
			}
			if n := len(a.toldPaths()) - told; n != 1 {
				t.Errorf("moved %d times: %v", n, a.toldPaths()[told:])
			}
			slow(oneWay)
			a.talk(b, 2*time.Minute, true)
			a.wantPath(b, b.outer)
		})
	}
}

// TestLossReported has the data plane tell of losses: checks find none, and the
// path stays.
func TestLossReported(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := besides(w)
		a.talk(b, 5*time.Second, true)
		told, begin := len(a.toldPaths()), time.Now()
		w.mu.Lock()
		a.activity.Lost += 10
		w.mu.Unlock()
		a.talk(b, 10*time.Second, true)
		if n := len(a.toldPaths()) - told; n > 0 {
			t.Errorf("moved %d times", n)
		}
		n := len(w.between(a.handle(0), b.handle(0), begin))
		if n < trialChecks || n > 4*trialChecks {
			t.Errorf("%d packets over the relay for one suspicion", n)
		}
	})
}

// TestQuietQuality wants no checks of a path that nobody uses.
func TestQuietQuality(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := besides(w)
		a.talk(b, 5*time.Second, true)
		rest(time.Minute)
		begin := time.Now()
		rest(time.Hour)
		if n := len(w.between(a.outer, b.outer, begin)); n > 2*3600/25+10 {
			t.Errorf("%d packets in an idle hour", n)
		}
		a.wantPath(b, b.outer)
	})
}
