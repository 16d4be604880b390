package relay

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"overlay/punch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestUDPFirst(t *testing.T) {
	synced(t, func(w *world) {
		w.after(4*leg + time.Millisecond)
		w.wantStates("udp")
		if s := w.last; s.Addr != w.addrs[0] || s.Observed != w.node || s.RTT != 2*leg || s.Err != nil {
			t.Errorf("state %+v", s)
		}
		w.after(10 * time.Minute)
		w.wantStates("udp")
		w.carries()
		if w.dials != 0 {
			t.Errorf("%d connections to a relay that answers over UDP", w.dials)
		}
		if n := w.count(kindHello); n < 54 || n > 68 {
			t.Errorf("%d HELLOs in ten minutes", n)
		}
		if n := w.count(kindAdmit); n != 1 {
			t.Errorf("%d ADMITs", n)
		}
	})
}

func TestTLSWhereUDPIsBlocked(t *testing.T) {
	synced(t, func(w *world) {
		w.udp = false
		w.after(raceAfter + 6*leg + 2*time.Millisecond) // a pipe has no delay
		w.wantStates("tls")
		if w.last.Err == nil || w.last.Addr.IsValid() {
			t.Errorf("state %+v", w.last)
		}
		w.carries()
		w.after(5 * time.Minute)
		w.wantStates("tls")
		if w.dials != 1 {
			t.Errorf("%d connections", w.dials)
		}
		if n := w.count(kindHello); n > 70 {
			t.Errorf("%d HELLOs into nowhere in five minutes", n)
		}
		w.udp = true
		w.after(trialEvery*11/10 + time.Second)
		w.wantStates("tls", "udp")
		w.carries()
		w.after(lingers + time.Second)
		if n := w.server.bySession(w.client.session.id); n.tls.Load() != nil {
			t.Error("the connection is still there")
		}
		w.wantStates("tls", "udp")
	})
}

// TestUDPWinsLate: UDP that answers after the race began is used all the same.
func TestUDPWinsLate(t *testing.T) {
	for _, late := range []time.Duration{120, 160, 200, 230, 240, 241, 250, 300, 700} {
		synced(t, func(w *world) {
			w.udp = false
			w.after(late * time.Millisecond)
			w.udp = true
			w.after(4 * time.Second)
			if w.last.Transport != UDP {
				t.Errorf("UDP after %d ms: %q", late, w.states)
			}
			w.carries()
			w.after(time.Minute)
			w.carries()
			if w.last.Transport != UDP || len(w.states) > 2 {
				t.Errorf("UDP after %d ms: %q", late, w.states)
			}
		})
	}
}

func TestDoubt(t *testing.T) {
	synced(t, func(w *world) {
		w.after(time.Second)
		w.udp = false
		w.client.Doubt()
		w.after(minPatience + 6*leg + 5*time.Millisecond)
		w.wantStates("udp", "tls")
		w.carries()
		w.udp = true
		w.client.NetworkChanged()
		w.after(8*leg + 5*time.Millisecond)
		w.wantStates("udp", "tls", "udp")
		w.carries()
	})
}

// TestDoubtIsCheap: while the relay answers, doubts cost some packets.
func TestDoubtIsCheap(t *testing.T) {
	synced(t, func(w *world) {
		w.after(time.Second)
		w.sent = nil
		for range 1000 {
			w.client.Doubt()
			w.after(time.Millisecond)
		}
		w.after(time.Second)
		w.wantStates("udp")
		if n := w.count(kindHello); n == 0 || n > 5 || w.dials > 0 {
			t.Errorf("%d HELLOs and %d connections in a second of doubt", n, w.dials)
		}
	})
}

// TestSilentDeath: nobody doubts, and UDP dies; the next HELLO finds out.
func TestSilentDeath(t *testing.T) {
	synced(t, func(w *world) {
		w.after(time.Second)
		w.udp = false
		w.after(helloEvery*11/10 + time.Second)
		w.wantStates("udp", "tls")
		w.carries()
	})
}

func TestAllDead(t *testing.T) {
	synced(t, func(w *world) {
		w.after(time.Second)
		w.udp, w.tcp = false, false
		w.client.Doubt()
		w.after(minDead + time.Millisecond)
		w.wantStates("udp", "")
		if !errors.Is(w.last.Err, errNoAnswer) {
			t.Errorf("without a way because of %v", w.last.Err)
		}
		w.sent = nil
		w.after(10 * time.Minute)
		if n := w.count(kindHello); n < 100 || n > 150 || w.dials > 60 {
			t.Errorf("%d HELLOs and %d connections in ten minutes", n, w.dials)
		}
		w.udp = true
		w.after(maxBackoff*11/10 + time.Second)
		w.wantStates("udp", "", "udp")
		w.carries()
	})
}

// TestConnectionLost: the connection ends, UDP is blocked still.
func TestConnectionLost(t *testing.T) {
	synced(t, func(w *world) {
		w.udp = false
		w.after(time.Second)
		_ = w.conns[0].Close()
		w.after(time.Millisecond)
		w.wantStates("tls", "")
		w.after(time.Second)
		w.wantStates("tls", "", "tls")
		w.carries()
		w.client.Doubt() // it answers: nothing happens
		w.after(5 * time.Second)
		w.wantStates("tls", "", "tls")
		if w.dials != 2 {
			t.Errorf("%d connections", w.dials)
		}
	})
}

// TestConnectionSilent: what is written to the connection is lost.
func TestConnectionSilent(t *testing.T) {
	for name, test := range map[string]struct {
		tell func(w *world)
		wait time.Duration
	}{
		"doubt":   {func(w *world) { w.client.Doubt() }, minPatienceTLS},
		"network": {func(w *world) { w.client.NetworkChanged() }, minPatience},
		"nobody":  {func(*world) {}, pingEvery*11/10 + minPatienceTLS},
	} {
		synced(t, func(w *world) {
			w.udp = false
			w.after(time.Second)
			w.stuck.stuck.Store(true)
			test.tell(w)
			w.after(test.wait + 6*leg + 5*time.Millisecond)
			w.wantStates("tls")
			if w.dials != 2 {
				t.Errorf("%s: %d connections", name, w.dials)
			}
			w.carries()
			w.stuck.stuck.Store(true)
			w.tcp = false
			w.after(time.Second)
			test.tell(w)
			w.after(test.wait + minDeadTLS)
			w.wantStates("tls", "")
			if !errors.Is(w.last.Err, errSilent) && !errors.Is(w.last.Err, context.DeadlineExceeded) { // of a dial since
				t.Errorf("%s: no way because of %v", name, w.last.Err)
			}
		})
	}
}

// TestBackAtOnce: UDP takes over and dies while the connection is still there.
func TestBackAtOnce(t *testing.T) {
	synced(t, func(w *world) {
		w.udp = false
		w.after(time.Second)
		w.udp = true
		w.client.NetworkChanged()
		w.after(lingers / 2)
		w.wantStates("tls", "udp")
		w.udp = false
		w.client.Doubt()
		w.after(minPatience + 3*leg)
		w.wantStates("tls", "udp", "tls")
		w.carries()
		w.after(time.Minute)
		w.wantStates("tls", "udp", "tls")
		if w.dials != 1 {
			t.Errorf("%d connections", w.dials)
		}
	})
}

// TestSendFails: the reason is told.
func TestSendFails(t *testing.T) {
	synced(t, func(w *world) {
		w.sendErr = errors.New("network is unreachable")
		w.tcp = false
		w.after(time.Second)
		if !errors.Is(w.last.Err, w.sendErr) {
			t.Errorf("no way because of %v", w.last.Err)
		}
	})
}

// TestRebinding: the node's NAT gives it another address.
func TestRebinding(t *testing.T) {
	synced(t, func(w *world) {
		w.after(time.Second)
		w.sent = nil
		w.node = netip.MustParseAddrPort("198.51.100.7:50000")
		w.client.Doubt()
		w.after(4*leg + time.Millisecond)
		w.wantStates("udp")
		w.carries()
		if w.last.Observed != w.node || w.count(kindAdmit) != 0 || w.count(kindHello) != 2 {
			t.Errorf("after %v, observed %v", w.sent, w.last.Observed)
		}
	})
}

func TestRelayRestarted(t *testing.T) {
	synced(t, func(w *world) {
		w.client.SetPeers([]punch.Key{{5}})
		w.after(time.Second)
		w.restart()
		w.sent = nil
		w.client.Doubt()
		w.after(8*leg + time.Millisecond)
		w.wantStates("udp")
		w.carries()
		if want := []kind{kindHello, kindHello, kindAdmit, kindOpen}; w.count(kindOpen) != 1 || w.count(kindAdmit) != 1 {
			t.Errorf("sent %v, want %v", w.sent, want)
		}
	})
}

func TestTwoAddresses(t *testing.T) {
	synced(t, func(w *world) {
		second := netip.MustParseAddrPort("[2001:db8::1]:3478")
		w.deadAddrs[w.addrs[0]] = true
		w.client.SetAddrs(append(w.addrs, second))
		w.after(4*leg + time.Millisecond)
		if w.last.Transport != UDP || w.last.Addr != second {
			t.Errorf("state %+v", w.last)
		}
		w.deadAddrs[second] = true
		delete(w.deadAddrs, w.addrs[0])
		w.client.Doubt()
		w.after(minPatience - time.Millisecond)
		if w.last.Transport != UDP || w.last.Addr != w.addrs[0] || w.dials > 0 {
			t.Errorf("state %+v after %d connections", w.last, w.dials)
		}
		w.carries()
	})
}

// An address that a relay only says is its own is not asked for ever.
func TestTries(t *testing.T) {
	victim := netip.MustParseAddrPort("203.0.113.5:53")
	for _, alive := range []bool{false, true} {
		prepare := func(w *world) {
			w.addrs = append(w.addrs, victim)
			w.deadAddrs[victim], w.deadAddrs[w.addrs[0]] = true, !alive
			w.client.cfg.Tries, w.client.cfg.Dial = 5, nil
		}
		syncedWith(t, prepare, func(w *world) {
			asked := func(a netip.AddrPort, want int) {
				t.Helper()
				n := 0
				for _, to := range w.asked {
					if to == a {
						n++
					}
				}
				if n != want {
					t.Errorf("alive %v: %d HELLOs to %v, want %d", alive, n, a, want)
				}
				w.asked = nil
			}
			for range 20 {
				w.deadAddrs[w.addrs[0]] = true
				w.client.Doubt()
				w.after(time.Minute)
				w.deadAddrs[w.addrs[0]] = !alive
				w.client.Doubt()
				w.after(time.Minute)
			}
			asked(victim, 5)
			w.client.NetworkChanged()
			w.after(time.Minute)
			if alive != (w.last.Transport == UDP) {
				t.Errorf("alive %v: state %+v", alive, w.last)
			}
			if !alive {
				asked(victim, 5)
				w.client.SetAddrs([]netip.AddrPort{victim})
				w.after(time.Minute)
				asked(victim, 5)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for _, udp := range []bool{true, false} {
		synced(t, func(w *world) {
			w.udp = udp
			w.verify = func([]byte) (Identity, error) { return Identity{}, errors.New("a stranger") }
			w.after(time.Minute)
			if w.last.Transport != None || !errors.Is(w.last.Err, errStranger) {
				t.Errorf("udp %v: state %+v", udp, w.last)
			}
			if n := w.count(kindAdmit); n > 10 || w.dials > 10 {
				t.Errorf("udp %v: %d ADMITs, %d connections in a minute", udp, n, w.dials)
			}
			w.verify = verifyNode
			w.after(maxRefused*11/10 + time.Second)
			if w.last.Transport == None {
				t.Errorf("udp %v: a member is still out: %+v", udp, w.last)
			}
		})
	}
}

func TestFlows(t *testing.T) {
	synced(t, func(w *world) {
		_, other, device := nodeKeys(t, 2)
		loss := 0
		w.loseUp = func(b []byte) bool {
			if kindOf(b) == kindOpen {
				loss++
			}
			return kindOf(b) == kindOpen && loss == 1
		}
		w.client.SetPeers([]punch.Key{other, {5}})
		w.after(4*leg + time.Millisecond)
		if w.count(kindOpen) != 1 {
			t.Fatalf("sent %v", w.sent)
		}
		w.after(minOpenRetry*11/10 + 2*leg)
		slices.Sort(w.peers)
		if want := []string{name(other) + " false", name(punch.Key{5}) + " false"}; !slices.Equal(w.peers, sorted(want)) {
			t.Errorf("peers %q, want %q", w.peers, want)
		}
		w.peers = nil
		w.admitOther(other, device)
		w.after(maxAbsent)
		if !slices.Equal(w.peers, []string{name(other) + " true"}) {
			t.Errorf("peers %q", w.peers)
		}
		if f := w.server.flow(FlowOf(other, w.client.public).number()); f == nil {
			t.Error("the flow is not open")
		}
		w.after(10 * time.Minute) // the other node expires at the relay
		if !slices.Equal(w.peers, []string{name(other) + " true", name(other) + " false"}) {
			t.Errorf("peers %q", w.peers)
		}
	})
}

func sorted(all []string) []string {
	slices.Sort(all)
	return all
}

// TestManyPeers: all flows are opened, a few messages at a time.
func TestManyPeers(t *testing.T) {
	for _, udp := range []bool{true, false} {
		synced(t, func(w *world) {
			w.udp = udp
			peers := make([]punch.Key, 1000)
			for i := range peers {
				peers[i] = punch.Key{byte(i), byte(i >> 8), 1}
			}
			w.client.SetPeers(peers)
			w.after(5 * time.Second)
			if len(w.peers) != len(peers) {
				t.Errorf("udp %v: %d of %d peers are known", udp, len(w.peers), len(peers))
			}
		})
	}
}

// TestFramesOverTLS: what is offered arrives at the other node's transport, and
// what it sends is delivered.
func TestFramesOverTLS(t *testing.T) {
	synced(t, func(w *world) {
		w.udp = false
		_, other, device := nodeKeys(t, 2)
		w.after(time.Second)
		w.admitOther(other, device)
		w.client.SetPeers([]punch.Key{other})
		w.after(time.Second)
		header := FlowOf(other, w.client.public)
		run := numbered(1, 100)
		copy(run[framePrefix:], header[:])
		w.client.Offer(run)
		w.after(time.Second)
		if s := w.server.Stats(); s.Datagrams != 1 || s.Drops != (Drops{}) {
			t.Errorf("%+v", s)
		}
		n := w.server.bySession(w.client.session.id)
		n.active.Load().conn.offer(append(run, run...))
		w.after(time.Second)
		if !slices.Equal(w.delivered, []int{1, 1}) {
			t.Errorf("delivered %v", w.delivered)
		}
	})
}
