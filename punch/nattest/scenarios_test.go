package nattest_test

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

const interval = 50 * time.Millisecond

func homeLink() nattest.Link { return nattest.Link{Delay: 10 * time.Millisecond} }

// homes makes a world of two laptops behind masquerade, 20 ms apart.
func homes(seed uint64) (*nattest.World, *nattest.Node, *nattest.Node) {
	w := nattest.NewWorld(seed, homeLink())
	a, _ := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
	b, _ := laptop(w, 1, kinds()[1], homeLink(), "192.168.2.2/24")
	return w, a, b
}

// connect starts both laptops and returns when they have had paths for 10 s.
func connect(t *testing.T, a, b *nattest.Node) {
	t.Helper()
	start(t, a)
	start(t, b)
	if took, ok := met(a, b, 3*time.Second); !ok {
		t.Fatalf("no path after %v", took)
	}
	time.Sleep(10 * time.Second)
}

// talk lets both laptops send, returns after 10 s of it, and stops at the end of
// the test's bubble.
func talk(a, b *nattest.Node) (stop func()) {
	stopA, stopB := a.Stream(b, interval), b.Stream(a, interval)
	time.Sleep(10 * time.Second)
	return func() { stopA(); stopB() }
}

// expectTraffic wants data in both directions within most after now, and then
// for ten seconds without a gap.
func expectTraffic(t *testing.T, a, b *nattest.Node, most time.Duration) {
	t.Helper()
	begin := time.Now()
	time.Sleep(most)
	late := time.Now()
	time.Sleep(10 * time.Second)
	for i, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
		last := late.Add(-500 * time.Millisecond)
		arrivals := append(pair[0].Arrivals(pair[1], last), time.Now())
		for _, at := range arrivals {
			if gap := at.Sub(last); gap > time.Second {
				t.Errorf("side %d received nothing for %v, %v after the event; paths %v, %v",
					i, gap, last.Sub(begin), a.Path(b).Addr, b.Path(a).Addr)
				return
			}
			last = at
		}
	}
}

func expectNoFaults(t *testing.T, w *nattest.World) {
	t.Helper()
	for _, f := range w.Faults() {
		t.Error(f)
	}
}

func TestRoaming(t *testing.T) {
	for _, to := range kinds() {
		for _, peer := range kinds() {
			if to.hard() || peer.hard() {
				continue
			}
			t.Run(fmt.Sprintf("to %s, peer %s", to.name, peer.name), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := nattest.NewWorld(2, homeLink())
					defer w.Stop()
					a, _ := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
					b, _ := laptop(w, 1, peer, homeLink(), "192.168.2.2/24")
					connect(t, a, b)
					defer talk(a, b)()
					roam(w, a, to)
					expectTraffic(t, a, b, 2*time.Second)
					expectNoFaults(t, w)
				})
			})
		}
	}
}

// roam moves a laptop to a new place of kind k.
func roam(w *nattest.World, n *nattest.Node, k kind) {
	wan := netip.MustParseAddr("203.0.113.77")
	if k.nat == nil {
		n.Roam(w.Internet(), homeLink(), netip.PrefixFrom(wan, 32))
		return
	}
	addrs := []netip.Prefix{netip.MustParsePrefix("10.1.2.3/16")}
	if k.ipv6 {
		addrs = append(addrs, netip.MustParsePrefix("2001:db8:77::2/64"))
	}
	n.Roam(w.Internet().NewRouter(*k.nat, wan, homeLink()).LAN(), homeLink(), addrs...)
}

// TestUnannounced changes the network in ways that the laptop is not told.
func TestUnannounced(t *testing.T) {
	for _, event := range []struct {
		what string
		do   func(*nattest.Router)
	}{
		{"reboot", (*nattest.Router).Reboot},
		{"new address", func(r *nattest.Router) { r.SetWAN(netip.MustParseAddr("203.0.113.88")) }},
	} {
		for _, k := range kinds() {
			if k.nat == nil || k.hard() {
				continue
			}
			peer := kinds()[1]
			if k.nat.OpenInput {
				// What the peer still sends to the old port clashes with the new flow,
				// so only a peer that takes strangers can be reached again.
				peer = kinds()[0]
			}
			t.Run(event.what+" of "+k.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := nattest.NewWorld(3, homeLink())
					defer w.Stop()
					a, router := laptop(w, 0, k, homeLink(), "192.168.1.2/24")
					b, _ := laptop(w, 1, peer, homeLink(), "192.168.2.2/24")
					connect(t, a, b)
					defer talk(a, b)()
					event.do(router)
					expectTraffic(t, a, b, 3*time.Second)
					expectNoFaults(t, w)
				})
			})
		}
	}
}

// TestPoisoned changes the outer address of a laptop whose peer's router takes
// the data, which goes on until the path is doubted, for its own: only silence
// helps.
func TestPoisoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := nattest.NewWorld(13, homeLink())
		defer w.Stop()
		a, router := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
		b, _ := laptop(w, 1, kinds()[2], homeLink(), "192.168.2.2/24")
		connect(t, a, b)
		defer talk(a, b)()
		router.SetWAN(netip.MustParseAddr("203.0.113.88"))
		expectTraffic(t, a, b, 5*time.Minute)
		expectNoFaults(t, w)
	})
}

func TestLinkCut(t *testing.T) {
	for _, length := range []time.Duration{time.Second, 5 * time.Second, 20 * time.Second, 2 * time.Minute} {
		t.Run(length.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := nattest.NewWorld(4, homeLink())
				defer w.Stop()
				a, router := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
				b, _ := laptop(w, 1, kinds()[1], homeLink(), "192.168.2.2/24")
				connect(t, a, b)
				defer talk(a, b)()
				down := homeLink()
				down.Down = true
				router.SetLink(down)
				time.Sleep(length)
				router.SetLink(homeLink())
				// Under traffic an attempt is made at least every 60 s.
				expectTraffic(t, a, b, min(2*time.Second+length, 62*time.Second))
				expectNoFaults(t, w)
			})
		})
	}
}

// TestWithoutSignals lets the server die and the network change after it.
func TestWithoutSignals(t *testing.T) {
	t.Run("reboot", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := nattest.NewWorld(5, homeLink())
			defer w.Stop()
			a, router := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
			b, _ := laptop(w, 1, kinds()[1], homeLink(), "192.168.2.2/24")
			connect(t, a, b)
			w.CutSignals(true)
			defer talk(a, b)()
			router.Reboot()
			expectTraffic(t, a, b, 2*time.Second)
			expectNoFaults(t, w)
		})
	})
	t.Run("roaming to a public peer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := nattest.NewWorld(6, homeLink())
			defer w.Stop()
			a, _ := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
			b, _ := laptop(w, 1, kinds()[0], homeLink(), "")
			connect(t, a, b)
			w.CutSignals(true)
			defer talk(a, b)()
			roam(w, a, kinds()[1])
			expectTraffic(t, a, b, 2*time.Second)
			expectNoFaults(t, w)
		})
	})
	t.Run("return of the server", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, a, b := homes(7)
			defer w.Stop()
			connect(t, a, b)
			w.CutSignals(true)
			defer talk(a, b)()
			roam(w, a, kinds()[1])
			time.Sleep(30 * time.Second)
			w.CutSignals(false)
			expectTraffic(t, a, b, 2*time.Second)
			expectNoFaults(t, w)
		})
	})
}

func TestPeerRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, a, b := homes(8)
		defer w.Stop()
		connect(t, a, b)
		defer talk(a, b)()
		b.Crash()
		time.Sleep(time.Second)
		start(t, b)
		expectTraffic(t, a, b, 2*time.Second)
		expectNoFaults(t, w)
	})
}

func TestServerRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, a, b := homes(9)
		defer w.Stop()
		connect(t, a, b)
		begin := time.Now()
		defer talk(a, b)()
		w.RestartServer(time.Second)
		expectTraffic(t, a, b, time.Second)
		if n := len(a.Moves(b, begin)) + len(b.Moves(a, begin)); n > 0 {
			t.Errorf("%d moves of the path", n)
		}
		roam(w, a, kinds()[1]) // needs the new session to gather
		expectTraffic(t, a, b, 2*time.Second)
		expectNoFaults(t, w)
	})
}

// TestSteady wants no move of the path in ten minutes.
func TestSteady(t *testing.T) {
	lossy := homeLink()
	lossy.Loss, lossy.Jitter = 0.106, 3*time.Millisecond // 20 % from end to end
	for _, test := range []struct {
		what    string
		link    nattest.Link
		streams int
	}{
		{"idle", homeLink(), 0},
		{"one way", homeLink(), 1},
		{"both ways", homeLink(), 2},
		{"one way with loss", lossy, 1},
		{"both ways with loss", lossy, 2},
	} {
		t.Run(test.what, func(t *testing.T) {
			for seed := range uint64(5) {
				synctest.Test(t, func(t *testing.T) { steady(t, seed, test.link, test.streams) })
			}
		})
	}
}

func steady(t *testing.T, seed uint64, l nattest.Link, streams int) {
	w := nattest.NewWorld(seed, homeLink())
	defer w.Stop()
	a, _ := laptop(w, 0, kinds()[1], l, "192.168.1.2/24")
	b, _ := laptop(w, 1, kinds()[1], l, "192.168.2.2/24")
	start(t, a)
	start(t, b)
	if took, ok := met(a, b, 20*time.Second); !ok {
		t.Fatalf("seed %d: no path after %v", seed, took)
	}
	time.Sleep(10 * time.Second)
	begin := time.Now()
	pairs := [][2]*nattest.Node{{a, b}, {b, a}}
	for _, pair := range pairs[:streams] {
		defer pair[0].Stream(pair[1], interval)()
	}
	time.Sleep(10 * time.Minute)
	for _, pair := range pairs {
		if moves := pair[0].Moves(pair[1], begin); len(moves) > 0 {
			t.Errorf("seed %d: %d moves, the first to %v after %v", seed, len(moves), moves[0].Path.Addr, moves[0].At.Sub(begin))
		}
	}
	expectNoFaults(t, w)
	after := time.Now() // the way is still open, in both directions, at once
	defer a.Stream(b, interval)()
	defer b.Stream(a, interval)()
	time.Sleep(time.Second)
	for i, pair := range pairs {
		if n := len(pair[0].Arrivals(pair[1], after)); n < 8 {
			t.Errorf("seed %d: after ten minutes side %d received %d of 20 packets", seed, i, n)
		}
	}
}

// TestLAN wants laptops behind one NAT to use the LAN, with hairpin and without.
func TestLAN(t *testing.T) {
	for _, hairpin := range []bool{false, true} {
		t.Run(fmt.Sprintf("hairpin %v", hairpin), func(t *testing.T) {
			for seed := range uint64(20) {
				synctest.Test(t, func(t *testing.T) { lan(t, seed, hairpin) })
			}
		})
	}
}

func lan(t *testing.T, seed uint64, hairpin bool) {
	w := nattest.NewWorld(seed, homeLink())
	defer w.Stop()
	nat := nattest.Masquerade()
	nat.Hairpin = hairpin
	router := w.Internet().NewRouter(nat, netip.MustParseAddr("203.0.113.20"), homeLink())
	wire := nattest.Link{Delay: 100 * time.Microsecond}
	var nodes []*nattest.Node
	for _, addr := range []string{"192.168.1.2/24", "192.168.1.3/24"} {
		nodes = append(nodes, w.NewNode(router.LAN().NewHost(wire, netip.MustParsePrefix(addr)), homeLink()))
	}
	a, b := nodes[0], nodes[1]
	start(t, a)
	time.Sleep(time.Duration(seed*20) * time.Millisecond)
	start(t, b)
	// One way to the server and back, twice: the netmap, then the signal.
	if took, ok := met(a, b, 100*time.Millisecond+4*2*homeLink().Delay); !ok {
		t.Fatalf("seed %d: no path after %v", seed, took)
	}
	time.Sleep(2 * time.Second)
	for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
		if p := pair[0].Path(pair[1]); !p.Addr.Addr().IsPrivate() || p.RTT > 5*time.Millisecond {
			t.Errorf("seed %d: path is %v with %v", seed, p.Addr, p.RTT)
		}
	}
	expectNoFaults(t, w)
}

// TestDoubleNATWorld puts one laptop behind a home router behind a carrier's.
func TestDoubleNATWorld(t *testing.T) {
	for _, k := range kinds() {
		if k.hard() {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := nattest.NewWorld(10, homeLink())
				defer w.Stop()
				carrier := w.Internet().NewRouter(nattest.NAT{Filtering: apdm}, netip.MustParseAddr("203.0.113.50"), homeLink())
				home := carrier.LAN().NewRouter(nattest.Masquerade(), netip.MustParseAddr("100.64.0.9"), nattest.Link{})
				a := w.NewNode(home.LAN().NewHost(nattest.Link{}, netip.MustParsePrefix("192.168.1.2/24")), homeLink())
				b, _ := laptop(w, 1, k, homeLink(), "192.168.2.2/24")
				connect(t, a, b)
				expectNoFaults(t, w)
			})
		})
	}
}

// TestCarrier puts two homes behind one carrier that hairpins: nothing but the
// carrier's own outer addresses leads from one to the other.
func TestCarrier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := nattest.NewWorld(12, homeLink())
		defer w.Stop()
		nat := nattest.NAT{Filtering: apdm, Hairpin: true}
		carrier := w.Internet().NewRouter(nat, netip.MustParseAddr("203.0.113.50"), homeLink())
		var nodes []*nattest.Node
		for _, wan := range []string{"100.64.0.9", "100.64.0.10"} {
			home := carrier.LAN().NewRouter(nattest.Masquerade(), netip.MustParseAddr(wan), homeLink())
			host := home.LAN().NewHost(nattest.Link{}, netip.MustParsePrefix("192.168.1.2/24"))
			nodes = append(nodes, w.NewNode(host, homeLink()))
		}
		connect(t, nodes[0], nodes[1])
		defer talk(nodes[0], nodes[1])()
		expectTraffic(t, nodes[0], nodes[1], time.Second)
	})
}

func TestPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, a, b := homes(11)
		defer w.Stop()
		start(t, a)
		start(t, b)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		time.Sleep(100 * time.Millisecond) // the netmap comes
		p, err := a.Agent().Ping(ctx, b.Key())
		if err != nil || p.RTT < 40*time.Millisecond || p.RTT > 60*time.Millisecond {
			t.Errorf("ping: %v, %v, want 40 ms", p, err)
		}
		b.Crash()
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if p, err = a.Agent().Ping(ctx, b.Key()); err == nil {
			t.Errorf("ping of a dead peer: %v", p)
		}
		if _, err = a.Agent().Ping(ctx, punch.Key{1}); err == nil {
			t.Error("ping of an unknown peer succeeds")
		}
	})
}
