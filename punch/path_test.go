package punch

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"
)

// connected returns two nodes with paths, after the first rounds.
func connected(w *world) (a, b *node) {
	w.t.Helper()
	a, b = w.gathered(1, outerA), w.gathered(2, outerB)
	meet(a, b)
	rest(3 * time.Second)
	a.wantPath(b, b.outer)
	b.wantPath(a, a.outer)
	return a, b
}

// TestSuspect cuts the path under traffic: calls begin within 0.7 s, the path
// stays until giveUp, and comes back by itself.
func TestSuspect(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		a.talk(b, 2*time.Second, true)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		cut, signals := time.Now(), w.talked()
		a.talk(b, 700*time.Millisecond, false)
		if w.talked() == signals {
			t.Error("no call")
		}
		a.wantPath(b, b.outer)
		a.talk(b, 7*time.Second, false)
		a.wantPath(b, netip.AddrPort{})
		last := len(a.toldPaths()) - 1
		if took := a.toldAt(last).Sub(cut); a.toldPaths()[last].Addr.IsValid() || took < giveUp {
			t.Errorf("told %v after %v", a.toldPaths()[last], took)
		}
		w.setDrop(nil)
		a.talk(b, 11*time.Second, false)
		a.wantPath(b, b.outer)
	})
}

// TestChecksKillNothing drops all checks while data arrives both ways.
func TestChecksKillNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		a.talk(b, 2*time.Minute, true)
		a.wantPath(b, b.outer)
		if len(a.toldPaths()) != 1 {
			t.Errorf("told %v", a.toldPaths())
		}
	})
}

// TestLossKillsNothing loses every third packet of a one-way stream.
func TestLossKillsNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		count := 0
		w.setDrop(func(x wire) bool {
			count++
			return count%3 == 0
		})
		a.talk(b, time.Minute, false)
		if len(a.toldPaths()) != 1 {
			t.Errorf("told %v", a.toldPaths())
		}
	})
}

// TestConsent counts packets under traffic and when idle.
func TestConsent(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		begin := time.Now()
		a.talk(b, time.Minute, true)
		busy := requests(w.between(a.outer, b.outer, begin))
		if busy < 11 || busy > 14 {
			t.Errorf("%d checks in a minute of traffic", busy)
		}
		rest(time.Minute)
		begin = time.Now()
		rest(10 * time.Minute)
		idle := w.between(a.outer, b.outer, begin)
		for i, x := range idle[1:] {
			if gap := x.at.Sub(idle[i].at); gap > keepalive+time.Millisecond {
				t.Errorf("nothing sent for %v", gap)
			}
		}
		if n := requests(idle); n > 25 {
			t.Errorf("%d checks in 10 idle minutes", n)
		}
	})
}

func requests(list []wire) int {
	n := 0
	for _, x := range list {
		if x.request() {
			n++
		}
	}
	return n
}

// TestIdleDeath lets the peer vanish while nothing is sent.
func TestIdleDeath(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		rest(keepalive + consentExpiry + giveUp)
		a.wantPath(b, netip.AddrPort{})
	})
}

// TestBetterPath offers a second path: one that is hardly better is not taken,
// one that is clearly better is.
func TestBetterPath(t *testing.T) {
	for _, test := range []struct {
		delay time.Duration
		want  bool
	}{{oneWay - time.Millisecond/2, false}, {oneWay / 2, true}} {
		t.Run(test.delay.String(), func(t *testing.T) {
			inWorld(t, func(w *world) {
				a, b := connected(w)
				second := netip.MustParseAddrPort("203.0.113.3:3000")
				b.alias(second)
				w.delay = func(x wire) time.Duration {
					if x.to == second || x.from == second {
						return test.delay
					}
					return oneWay
				}
				b.SetLocal([]netip.Prefix{netip.PrefixFrom(second.Addr(), 32)}, second.Port())
				a.talk(b, 30*time.Second, true)
				want := b.outer
				if test.want {
					want = second
				}
				a.wantPath(b, want)
			})
		})
	}
}

// TestFailover cuts the path in use while another one answers.
func TestFailover(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		second := netip.MustParseAddrPort("203.0.113.3:3000")
		b.alias(second)
		b.SetLocal([]netip.Prefix{netip.PrefixFrom(second.Addr(), 32)}, second.Port())
		a.talk(b, 10*time.Second, true)
		a.wantPath(b, b.outer)
		w.setDrop(func(x wire) bool { return x.to == b.outer })
		a.talk(b, 700*time.Millisecond, false)
		a.wantPath(b, second)
	})
}

// TestRoaming moves a node to another address, which its system tells it.
func TestRoaming(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		b.move("203.0.113.77:7777")
		b.NetworkChanged()
		rest(200 * time.Millisecond)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
		if path, _ := b.Path(a.key); path.RTT > 4*oneWay {
			t.Errorf("RTT %v", path.RTT)
		}
	})
}

// TestRoamingWithoutSignals is TestRoaming under traffic and without the server:
// the check from the new address suffices.
func TestRoamingWithoutSignals(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		b.talk(a, time.Second, true)
		w.carry = func(_, _ *node) error { return errNoCarrier }
		b.move("203.0.113.77:7777")
		b.NetworkChanged()
		a.talk(b, 200*time.Millisecond, true)
		a.wantPath(b, b.outer)
	})
}

// TestAddressLost wants a path through NATs to end at once when our address is
// gone, and no packet at full TTL before the peer has opened.
func TestAddressLost(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		local := func(addr string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(addr)} }
		b.SetLocal(local("192.168.1.5/24"), 2000)
		a.talk(b, 2*time.Second, true)
		b.talk(a, 2*time.Second, true)
		begin := time.Now()
		b.move("203.0.113.77:7777")
		b.SetLocal(local("192.168.2.5/24"), 2000)
		b.wantPath(a, netip.AddrPort{})
		rest(200 * time.Millisecond)
		b.wantPath(a, a.outer)
		a.wantPath(b, b.outer)
		w.wantOpenedFirst(a, b, begin)
	})
}

// TestAddressLostWithSignals has the connection that carries signals move too,
// which takes half a second: until then nothing may reach the peer's NAT unasked.
func TestAddressLostWithSignals(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		local := func(addr string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(addr)} }
		b.SetLocal(local("192.168.1.5/24"), 2000)
		rest(5 * time.Second)
		w.setCarry(func(_, _ *node) error { return errNoCarrier })
		begin := time.Now()
		b.move("203.0.113.77:7777")
		b.SetLocal(local("192.168.2.5/24"), 2000)
		rest(500 * time.Millisecond)
		for _, x := range w.between(b.outer, a.outer, begin) {
			if x.ttl == 0 {
				t.Errorf("full TTL after %v without a signal", x.at.Sub(begin))
			}
		}
		w.setCarry(nil)
		b.SetServers([]Server{{Addr: stunAddr(), Username: []byte{2}, Key: []byte("secret")}})
		rest(300 * time.Millisecond)
		b.wantPath(a, a.outer)
		a.wantPath(b, b.outer)
	})
}

// TestPeerGone has the server lose a peer that does not answer either: its idle
// path ends within seconds. One that answers keeps its path, whatever the server
// says.
func TestPeerGone(t *testing.T) {
	for _, gone := range []bool{true, false} {
		inWorld(t, func(w *world) {
			a, b := connected(w)
			rest(5 * time.Second)
			if gone {
				w.setDrop(func(x wire) bool { return x.to == b.outer })
			}
			b.online = false
			a.SetPeer(b.info())
			rest(10 * time.Second)
			if _, ok := a.Path(b.key); ok == gone {
				t.Errorf("gone: %v, path: %v", gone, ok)
			}
		})
	}
}

// TestLocalChange wants the same of SetLocal, and nothing when it repeats itself.
func TestLocalChange(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		local := []netip.Prefix{netip.MustParsePrefix("192.168.1.5/24"), netip.MustParsePrefix("127.0.0.1/8")}
		signals := w.talked()
		a.SetLocal(local, 1000)
		rest(time.Second)
		if w.talked() == signals {
			t.Error("no call after a change")
		}
		if got := a.Candidates(); len(got) != 2 || got[0].Addr.String() != "192.168.1.5:1000" || got[0].Type != Host {
			t.Errorf("candidates %v", got)
		}
		a.wantPath(b, b.outer)
		signals = w.talked()
		a.SetLocal(local, 1000)
		rest(time.Second)
		if w.talked() != signals {
			t.Error("a call without a change")
		}
	})
}

// TestRestart restarts a peer: its checks are believed, and messages of before the
// restart are not.
func TestRestart(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		old := w.between(b.outer, a.outer, time.Time{})
		b.stop()
		b.stop = func() {}
		b.move("0.0.0.0:0")
		again := w.gathered(2, outerB)
		w.mu.Lock()
		w.nodes = append(w.nodes[:1], again)
		w.mu.Unlock()
		again.SetPeer(a.info())
		rest(200 * time.Millisecond)
		again.wantPath(a, a.outer)
		a.wantPath(again, again.outer)
		elsewhere := netip.MustParseAddrPort("203.0.113.66:6666")
		for _, x := range old {
			a.Receive(x.b, elsewhere, netip.AddrPort{})
		}
		rest(time.Minute)
		if n := len(w.between(a.outer, elsewhere, time.Time{})); n > 0 {
			t.Errorf("%d packets in reply to messages of before the restart", n)
		}
	})
}

func TestPing(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		a.online, b.online = false, false
		meet(a, b)
		begin := time.Now()
		path, err := a.Ping(context.Background(), b.key)
		if err != nil || path.Addr != b.outer || path.RTT != 2*oneWay {
			t.Errorf("Ping = %v, %v", path, err)
		}
		// Signal there, check here, check there and back, ping there and back.
		if took := time.Since(begin); took > 6*oneWay {
			t.Errorf("took %v", took)
		}
		lost := 0
		w.setDrop(func(wire) bool { lost++; return lost < 3 })
		begin = time.Now()
		if _, err := a.Ping(context.Background(), b.key); err != nil || time.Since(begin) > 3*pingInterval {
			t.Errorf("with loss: %v after %v", err, time.Since(begin))
		}
		w.setDrop(func(wire) bool { return true })
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := a.Ping(ctx, b.key); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without an answer: %v", err)
		}
		if _, err := a.Ping(context.Background(), Key{9}); !errors.Is(err, errUnknownPeer) {
			t.Errorf("unknown peer: %v", err)
		}
	})
}

func TestRemovePeer(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		a.RemovePeer(b.key)
		a.RemovePeer(b.key)
		a.wantPath(b, netip.AddrPort{})
		begin := time.Now()
		b.NetworkChanged()
		rest(time.Minute)
		a.Agent.mu.Lock()
		defer a.Agent.mu.Unlock()
		checks := 0 // a request to the server may be on its way
		for _, sent := range a.sent {
			if sent.peer != nil {
				checks++
			}
		}
		if n := len(w.between(a.outer, b.outer, begin)); n > 0 || checks > 0 || len(a.users) > 0 {
			t.Errorf("%d packets, %d checks, %d users of a removed peer", n, checks, len(a.users))
		}
	})
}
