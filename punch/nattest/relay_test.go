package nattest_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

// go test ./punch/nattest -run TestRelay -seeds 1000
var seeds = flag.Uint64("seeds", 10, "how many seeds each of the relay tests runs")

const busy = 5 * time.Millisecond

// leg is half of a laptop's way to everywhere; relayed round trips take 30 ms.
func leg() nattest.Link { return nattest.Link{Delay: 7500 * time.Microsecond} }

// relayed makes two laptops of the given kinds, 30 ms apart both ways, with a
// relay, which stands beside the direct way.
func relayed(seed uint64, one, other kind, l nattest.Link) (w *nattest.World, r *nattest.Relay, a, b *nattest.Node, cut func(bool)) {
	w = nattest.NewWorld(seed, nattest.Link{Delay: 5 * time.Millisecond})
	r = w.NewRelay(l)
	a, routerA := laptop(w, 0, one, leg(), "192.168.1.2/24")
	b, _ = laptop(w, 1, other, leg(), "192.168.2.2/24")
	cut = func(down bool) {
		link := leg()
		link.Down = down
		routerA.SetLink(link)
	}
	return w, r, a, b, cut
}

func isDirect(n, to *nattest.Node) bool {
	p := n.Path(to)
	return p.Addr.IsValid() && p.Type != punch.Relayed
}

// metDirect is met for paths that need no relay.
func metDirect(a, b *nattest.Node, most time.Duration) (time.Duration, bool) {
	begin := time.Now()
	for time.Since(begin) < most {
		if isDirect(a, b) && isDirect(b, a) {
			return time.Since(begin), true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begin), false
}

// gap returns the longest time without data of a peer since begin.
func gap(n, from *nattest.Node, begin time.Time) time.Duration {
	longest, last := time.Duration(0), begin
	for _, at := range append(n.Arrivals(from, begin), time.Now()) {
		longest, last = max(longest, at.Sub(last)), at
	}
	return longest
}

func bothWays(a, b *nattest.Node) [][2]*nattest.Node { return [][2]*nattest.Node{{a, b}, {b, a}} }

// inShort bounds a number of runs in the short form.
func inShort(runs, most uint64) uint64 {
	if testing.Short() {
		return min(runs, most)
	}
	return runs
}

func eachSeed(t *testing.T, f func(t *testing.T, seed uint64)) {
	for seed := range inShort(*seeds, 4) {
		synctest.Test(t, func(t *testing.T) { f(t, seed) })
	}
}

// TestRelayUpgrade streams from the first moment, over the relay, while a direct
// path is found: nothing is lost, and there is no way back.
func TestRelayUpgrade(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 3))
		jittery := nattest.Link{Delay: time.Duration(rng.IntN(30)) * time.Millisecond, Jitter: time.Duration(1+rng.IntN(20)) * time.Millisecond}
		w, _, a, b, _ := relayed(seed, kinds()[1], kinds()[rng.IntN(7)], jittery)
		defer w.Stop()
		start(t, a)
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
		start(t, b)
		time.Sleep(12 * time.Millisecond) // the netmap comes after 25
		for !a.Path(b).Addr.IsValid() || !b.Path(a).Addr.IsValid() {
			time.Sleep(time.Millisecond)
		}
		begin := time.Now()
		for _, pair := range bothWays(a, b) {
			if p := pair[0].Path(pair[1]); p.Type != punch.Relayed {
				t.Errorf("seed %d: the first path is %v", seed, p)
			}
			defer pair[0].Stream(pair[1], busy)()
		}
		if took, ok := metDirect(a, b, time.Second); !ok {
			t.Errorf("seed %d: no direct path after %v", seed, took)
		}
		time.Sleep(10 * time.Second)
		for i, pair := range bothWays(a, b) {
			if n := pair[0].Missing(pair[1], begin, time.Now().Add(-time.Second)); n > 0 {
				t.Errorf("seed %d: side %d misses %d packets", seed, i, n)
			}
			if moves := pair[0].Moves(pair[1], begin.Add(1)); len(moves) > 1 || pair[0].Path(pair[1]).Also.IsValid() {
				t.Errorf("seed %d: side %d moved %d times: %v", seed, i, len(moves), describe(moves, begin))
			}
		}
		expectNoFaults(t, w)
	})
}

// TestRelayFallback cuts a direct path that carries data every 5 ms.
func TestRelayFallback(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 4))
		w, _, a, b, cut := relayed(seed, kinds()[1], kinds()[1], nattest.Link{Loss: 0.05 * rng.Float64(), Jitter: 3 * time.Millisecond})
		defer w.Stop()
		connectDirect(t, a, b)
		for _, pair := range bothWays(a, b) {
			defer pair[0].Stream(pair[1], busy)()
		}
		time.Sleep(5*time.Second + time.Duration(rng.IntN(5000))*time.Millisecond)
		begin := time.Now()
		cut(true)
		time.Sleep(20 * time.Second)
		for i, pair := range bothWays(a, b) {
			if d := gap(pair[0], pair[1], begin); d > 500*time.Millisecond {
				t.Errorf("seed %d: side %d received nothing for %v", seed, i, d)
			}
			if p := pair[0].Path(pair[1]); p.Type != punch.Relayed || p.Also.IsValid() {
				t.Errorf("seed %d: side %d has path %v", seed, i, p)
			}
		}
		back := time.Now()
		cut(false)
		if took, ok := metDirect(a, b, 65*time.Second); !ok {
			t.Errorf("seed %d: no direct path %v after it is possible again", seed, took)
		}
		time.Sleep(5 * time.Second)
		for i, pair := range bothWays(a, b) {
			if d := gap(pair[0], pair[1], back); d > 250*time.Millisecond {
				t.Errorf("seed %d: side %d received nothing for %v on the way back", seed, i, d)
			}
		}
		expectNoFaults(t, w)
	})
}

func connectDirect(t *testing.T, a, b *nattest.Node) {
	t.Helper()
	start(t, a)
	start(t, b)
	if took, ok := metDirect(a, b, 3*time.Second); !ok {
		t.Fatalf("no direct path after %v", took)
	}
	time.Sleep(2 * time.Second)
}

// TestRelayDies has one of two relays fail, silently or not, while it carries
// data between laptops that have no other way.
func TestRelayDies(t *testing.T) {
	for _, silent := range []bool{true, false} {
		t.Run(fmt.Sprintf("silent %v", silent), func(t *testing.T) {
			eachSeed(t, func(t *testing.T, seed uint64) {
				w, first, a, b, _ := relayed(seed, kinds()[7], kinds()[7], nattest.Link{})
				w.NewRelay(nattest.Link{Delay: 3 * time.Millisecond, Loss: 0.02})
				defer w.Stop()
				start(t, a)
				start(t, b)
				time.Sleep(time.Second)
				for _, pair := range bothWays(a, b) {
					defer pair[0].Stream(pair[1], busy)()
				}
				time.Sleep(time.Duration(5000+seed*97%5000) * time.Millisecond)
				before, begin, most := a.Path(b).Addr, time.Now(), 200*time.Millisecond
				if silent {
					first.SetLink(nattest.Link{Down: true})
					most = 500 * time.Millisecond
				} else {
					first.Withdraw(true)
				}
				time.Sleep(time.Second)
				for i, pair := range bothWays(a, b) {
					if d := gap(pair[0], pair[1], begin); d > most {
						t.Errorf("seed %d: side %d received nothing for %v", seed, i, d)
					}
				}
				if now := a.Path(b); now.Addr == before || now.Type != punch.Relayed {
					t.Errorf("seed %d: path was %v, is %v", seed, before, now)
				}
				time.Sleep(20 * time.Second)
				for i, pair := range bothWays(a, b) {
					if d := gap(pair[0], pair[1], begin.Add(time.Second)); d > 200*time.Millisecond {
						t.Errorf("seed %d: side %d received nothing for %v afterwards", seed, i, d)
					}
				}
				expectNoFaults(t, w)
			})
		})
	}
}

// TestRelaySteady wants no move of a direct path beside a relay in ten minutes.
func TestRelaySteady(t *testing.T) {
	for _, test := range []struct {
		what    string
		link    nattest.Link
		streams int
	}{
		{"idle", leg(), 0},
		{"one way", leg(), 1},
		{"both ways", leg(), 2},
		{"one way with jitter", nattest.Link{Delay: 5 * time.Millisecond, Jitter: 30 * time.Millisecond}, 1},
		{"one way with loss", nattest.Link{Delay: 10 * time.Millisecond, Loss: 0.106, Jitter: 3 * time.Millisecond}, 1},
		{"both ways with loss", nattest.Link{Delay: 5 * time.Millisecond, Loss: 0.05, Jitter: 5 * time.Millisecond}, 2},
	} {
		t.Run(test.what, func(t *testing.T) {
			for seed := range uint64(2) {
				synctest.Test(t, func(t *testing.T) { relaySteady(t, seed, test.link, test.streams) })
			}
		})
	}
}

func relaySteady(t *testing.T, seed uint64, l nattest.Link, streams int) {
	w := nattest.NewWorld(seed, homeLink())
	defer w.Stop()
	r := w.NewRelay(nattest.Link{})
	a, _ := laptop(w, 0, kinds()[1], l, "192.168.1.2/24")
	b, _ := laptop(w, 1, kinds()[1], l, "192.168.2.2/24")
	connectDirect(t, a, b)
	begin, before := time.Now(), r.Forwarded()
	pairs := bothWays(a, b)
	for _, pair := range pairs[:streams] {
		defer pair[0].Stream(pair[1], interval)()
	}
	time.Sleep(10 * time.Minute)
	for _, pair := range pairs {
		if moves := pair[0].Moves(pair[1], begin); len(moves) > 0 {
			t.Errorf("seed %d: %d moves, the first to %v after %v", seed, len(moves), moves[0].Path.Addr, moves[0].At.Sub(begin))
		}
	}
	if n := r.Forwarded() - before; l.Loss == 0 && n > 1000 {
		t.Errorf("seed %d: %d packets over the relay", seed, n)
	}
	expectNoFaults(t, w)
}

// TestRelayRoaming moves a laptop to another network: the relay carries on while
// a direct path is looked for.
func TestRelayRoaming(t *testing.T) {
	for _, to := range kinds() {
		t.Run("to "+to.name, func(t *testing.T) {
			for seed := range uint64(5) {
				synctest.Test(t, func(t *testing.T) {
					w, _, a, b, _ := relayed(seed, kinds()[1], kinds()[1], nattest.Link{})
					defer w.Stop()
					connectDirect(t, a, b)
					for _, pair := range bothWays(a, b) {
						defer pair[0].Stream(pair[1], busy)()
					}
					time.Sleep(5 * time.Second)
					begin := time.Now()
					roam(w, a, to)
					time.Sleep(10 * time.Second)
					for i, pair := range bothWays(a, b) {
						if d := gap(pair[0], pair[1], begin); d > 400*time.Millisecond {
							t.Errorf("seed %d: side %d received nothing for %v", seed, i, d)
						}
						if !isDirect(pair[0], pair[1]) && !to.hard() { // else ports have to be guessed
							t.Errorf("seed %d: side %d has path %v", seed, i, pair[0].Path(pair[1]))
						}
					}
					expectNoFaults(t, w)
				})
			}
		})
	}
}

// TestRelayWorlds is TestWorlds with a relay: data flows from the first packet in
// all of them, and a direct path is found as soon as without.
func TestRelayWorlds(t *testing.T) {
	eachWorld(t, inShort(*worlds, 100), func(t *testing.T, seed uint64) { drawSpec(seed).runRelayed(t) })
}

func (s spec) runRelayed(t *testing.T) {
	w := nattest.NewWorld(s.seed, s.server)
	defer w.Stop()
	w.NewRelay(nattest.Link{Delay: s.server.Delay, Loss: s.server.Loss})
	a, _ := laptop(w, 0, s.kinds[0], s.links[0], "192.168.1.2/24")
	b, _ := laptop(w, 1, s.kinds[1], s.links[1], s.lan)
	start(t, a)
	time.Sleep(s.skew)
	start(t, b)
	begin := time.Now()
	if took, ok := met(a, b, 5*time.Second); !ok {
		t.Errorf("%v: no path at all after %v", s, took)
		return
	}
	began := time.Now()
	const every = 50 * time.Millisecond
	stops := []func(){a.Stream(b, every), b.Stream(a, every)}
	if s.direct() {
		if took, ok := metDirect(a, b, s.patience()-began.Sub(begin)); !ok {
			t.Errorf("%v: no direct path after %v", s, took)
		}
	}
	time.Sleep(30 * time.Second)
	for _, stop := range stops {
		stop()
	}
	loss := 1 - (1-s.loss())*(1-s.server.Loss)*(1-s.server.Loss)
	for i, pair := range bothWays(a, b) {
		sent := time.Since(began).Seconds() / every.Seconds()
		if n := len(pair[0].Arrivals(pair[1], began)); float64(n) < (1-loss-0.15)*sent {
			t.Errorf("%v: side %d received %d of %.0f packets", s, i, n, sent)
		}
		if moves := pair[0].Moves(pair[1], began.Add(s.patience())); !s.guessable() && (lost(moves) || s.loss() == 0 && len(moves) > 0) {
			t.Errorf("%v: side %d moved %d times, last to %v", s, i, len(moves), moves[len(moves)-1].Path)
		}
		if isDirect(pair[0], pair[1]) && !s.direct() && !s.guessable() {
			t.Errorf("%v: a direct path where none can be: %v", s, pair[0].Path(pair[1]))
		}
	}
	for _, f := range w.Faults() {
		t.Errorf("%v: %s", s, f)
	}
}

// describe says when moves were made and where to.
func describe(moves []nattest.Move, begin time.Time) (list []string) {
	for _, m := range moves {
		list = append(list, fmt.Sprintf("%v: %v also %v rtt %v", m.At.Sub(begin), m.Path.Addr, m.Path.Also, m.Path.RTT))
	}
	return list
}
