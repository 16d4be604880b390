package nattest_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

// badLine returns two laptops with a direct path and a relay, and what makes the
// direct one lose packets in each direction.
func badLine(t *testing.T, seed uint64, relay nattest.Link) (w *nattest.World, a, b *nattest.Node, lose func(float64)) {
	w = nattest.NewWorld(seed, nattest.Link{Delay: 5 * time.Millisecond})
	w.NewRelay(relay)
	a, router := laptop(w, 0, kinds()[1], leg(), "192.168.1.2/24")
	b, _ = laptop(w, 1, kinds()[1], leg(), "192.168.2.2/24")
	lose = func(share float64) {
		link := leg()
		link.Loss = share
		router.SetLink(link)
	}
	connectDirect(t, a, b)
	return w, a, b, lose
}

// rarely is how often in all seeds may happen what chance does once in 50 of them.
func rarely() int { return max(1, int(inShort(*seeds, 4)/50)) }

// TestBadDirect has the direct path lose 20 to 40 % of packets beside a clean
// relay: both sides move there, stay, and come back when it is well again. By
// chance a look at the path now and then finds nothing.
func TestBadDirect(t *testing.T) {
	const soon, most = 12 * time.Second, 25 * time.Second
	late := 0
	eachSeed(t, func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 8))
		w, a, b, lose := badLine(t, seed, nattest.Link{})
		defer w.Stop()
		for _, pair := range bothWays(a, b) {
			defer pair[0].Stream(pair[1], busy)()
		}
		time.Sleep(10*time.Second + time.Duration(rng.IntN(5000))*time.Millisecond)
		loss, begin := 0.2+0.2*rng.Float64(), time.Now()
		lose(loss)
		took := [2]time.Duration{}
		for time.Since(begin) < most {
			time.Sleep(10 * time.Millisecond)
			for i, pair := range bothWays(a, b) {
				if took[i] == 0 && pair[0].Path(pair[1]).Left.Loss > 0 {
					took[i] = time.Since(begin)
				}
			}
		}
		t.Logf("seed %d: loss %.2f, moved after %v", seed, loss, took)
		moved := time.Now()
		time.Sleep(time.Minute)
		for i, pair := range bothWays(a, b) {
			p := pair[0].Path(pair[1])
			if took[i] > soon {
				late++
			}
			if took[i] == 0 || p.Type != punch.Relayed || p.Also.IsValid() {
				t.Errorf("seed %d: loss %.2f, side %d moved after %v to %+v", seed, loss, i, took[i], p)
			}
			if n := len(pair[0].Moves(pair[1], moved)); n > 0 {
				t.Errorf("seed %d: side %d moved %d times more", seed, i, n)
			}
			if n := pair[0].Missing(pair[1], moved, time.Now().Add(-time.Second)); n > 0 {
				t.Errorf("seed %d: side %d misses %d packets over the relay", seed, i, n)
			}
		}
		well := time.Now()
		lose(0)
		if took, ok := metDirect(a, b, 90*time.Second); !ok || took < 15*time.Second {
			t.Errorf("seed %d: back after %v", seed, took)
		} else {
			t.Logf("seed %d: back after %v", seed, took)
		}
		time.Sleep(2 * time.Minute)
		for i, pair := range bothWays(a, b) {
			if moves := pair[0].Moves(pair[1], well); len(moves) != 1 {
				t.Errorf("seed %d: side %d moved %d times: %v", seed, i, len(moves), describe(moves, well))
			}
		}
		expectNoFaults(t, w)
	})
	if late > rarely() {
		t.Errorf("%d times it took longer than %v", late, soon)
	}
}

// TestFairDirect has a direct path that is a little bad, or no worse than the
// relay, or used in one direction only: it stays. Where both are bad alike, the
// comparison is of chance (4 standard deviations).
func TestFairDirect(t *testing.T) {
	for name, c := range map[string]struct {
		loss, relay float64
		oneWay      bool
	}{
		"2 %":          {loss: 0.02},
		"both":         {loss: 0.12, relay: 0.06}, // which each packet crosses twice
		"one way":      {oneWay: true},
		"one way, 2 %": {loss: 0.02, oneWay: true},
	} {
		t.Run(name, func(t *testing.T) {
			moved := 0
			eachSeed(t, func(t *testing.T, seed uint64) {
				w, a, b, lose := badLine(t, seed, nattest.Link{Loss: c.relay})
				defer w.Stop()
				defer a.Stream(b, 4*busy)()
				if !c.oneWay {
					defer b.Stream(a, 4*busy)()
				}
				time.Sleep(10 * time.Second)
				begin := time.Now()
				lose(c.loss)
				time.Sleep(2 * time.Minute)
				for i, pair := range bothWays(a, b) {
					if moves := pair[0].Moves(pair[1], begin); len(moves) > 0 {
						moved++
						t.Logf("seed %d: side %d moved %d times: %v", seed, i, len(moves), describe(moves, begin))
					}
				}
				expectNoFaults(t, w)
			})
			if moved > 0 && (c.relay == 0 || moved > rarely()) {
				t.Errorf("%d sides moved", moved)
			}
		})
	}
}

// TestWavering makes a path bad and good again and again: it is used less and
// less.
func TestWavering(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64) {
		w, a, b, lose := badLine(t, seed, nattest.Link{})
		defer w.Stop()
		for _, pair := range bothWays(a, b) {
			defer pair[0].Stream(pair[1], 4*busy)()
		}
		begin := time.Now()
		for range 10 {
			lose(0.3)
			time.Sleep(20 * time.Second)
			lose(0)
			time.Sleep(40 * time.Second)
		}
		for i, pair := range bothWays(a, b) {
			if n := len(pair[0].Moves(pair[1], begin)); n > 6 {
				t.Errorf("seed %d: side %d moved %d times in 10 minutes", seed, i, n)
			}
		}
	})
}
