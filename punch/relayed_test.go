package punch

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// firstHandle is the port of handles for the first relay. That they are no
// private addresses here shows that nothing depends on it.
const firstHandle = 0x8000

func overRelay(addr netip.AddrPort) bool {
	return netip.MustParsePrefix("2001:db8:aa::/48").Contains(addr.Addr()) && addr.Port() >= firstHandle
}

// handle is the address of n over the i-th relay.
func (n *node) handle(i int) netip.AddrPort {
	ip := netip.MustParseAddr("2001:db8:aa::").As16()
	copy(ip[8:], n.key[:8])
	return netip.AddrPortFrom(netip.AddrFrom16(ip), uint16(firstHandle+i))
}

// relays gives both nodes some relays to each other.
func relays(a, b *node, count int) {
	for _, pair := range [][2]*node{{a, b}, {b, a}} {
		var list []Relay
		for i := range count {
			list = append(list, Relay{Addr: pair[1].handle(i), RTT: time.Duration(50+10*i) * time.Millisecond, Here: true})
		}
		pair[0].SetRelays(pair[1].key, list)
	}
}

// onlyRelays drops what goes directly.
func onlyRelays(x wire) bool { return x.to != stunAddr() && !overRelay(x.to) }

// isolated returns two nodes that have relays, and nothing else.
func isolated(w *world, count int) (a, b *node) {
	a, b = w.gathered(1, outerA), w.gathered(2, outerB)
	w.setDrop(onlyRelays)
	meet(a, b)
	relays(a, b, count)
	rest(3 * time.Second)
	return a, b
}

// sends counts a packet that leaves n.
func (n *node) sends() {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.activity.Sent++
}

func (n *node) doubted() []netip.AddrPort {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return slices.Clone(n.doubts)
}

func (n *node) last() Path { return n.toldPaths()[len(n.toldPaths())-1] }

// TestRelayFirst wants the relay as the path at once, for those who are online or
// wanted; nothing but checks goes over it, and no opener.
func TestRelayFirst(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(onlyRelays)
		a.online = false
		meet(a, b)
		relays(a, b, 2)
		rest(time.Microsecond)
		a.wantPath(b, b.handle(0))
		if p := a.last(); p.Type != Relayed || p.RTT != 50*time.Millisecond || p.Also.IsValid() {
			t.Errorf("path %v", p)
		}
		b.wantPath(a, netip.AddrPort{})
		b.Demand(a.key)
		rest(time.Microsecond)
		b.wantPath(a, a.handle(0))
		rest(3 * time.Second)
		if p, _ := a.Path(b.key); p.RTT != 2*oneWay || len(a.toldPaths()) != 1 {
			t.Errorf("path %v after %v", p, a.toldPaths())
		}
		for _, x := range w.all() {
			if overRelay(x.to) && x.ttl != 0 {
				t.Errorf("opener over a relay")
			}
		}
		quietFrom := time.Now()
		rest(time.Hour)
		// A keepalive, and the answer to the other side's when both send at once.
		if n := len(w.between(a.handle(0), b.handle(0), quietFrom)); n > 2*int(time.Hour/keepalive) {
			t.Errorf("%d packets in an idle hour", n)
		}
	})
}

// TestRelayChoice wants a relay where the peer is before a near one, and the next
// one as soon as it is gone.
func TestRelayChoice(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(func(wire) bool { return true })
		meet(a, b)
		near := Relay{Addr: b.handle(0), RTT: 10 * time.Millisecond}
		far := Relay{Addr: b.handle(1), RTT: 20 * time.Millisecond, Here: true}
		farther := Relay{Addr: b.handle(2), RTT: 30 * time.Millisecond, Here: true}
		for _, step := range []struct {
			list []Relay
			want netip.AddrPort
		}{
			{[]Relay{near}, near.Addr},
			{[]Relay{near, farther, far}, far.Addr},
			{[]Relay{near, farther}, farther.Addr},
			{[]Relay{near}, near.Addr},
			{nil, netip.AddrPort{}},
			{[]Relay{{}, near}, near.Addr},
		} {
			a.SetRelays(b.key, step.list)
			rest(time.Microsecond)
			a.wantPath(b, step.want)
			if got := a.last(); got.Addr != step.want {
				t.Errorf("told %v, want %v", got, step.want)
			}
		}
		a.SetRelays(Key{9}, []Relay{near})
		a.SetRelays(b.key, slices.Repeat([]Relay{near, far}, MaxRelays))
		many := make([]Relay, 2*MaxRelays)
		for i := range many {
			many[i].Addr = b.handle(i)
		}
		a.SetRelays(b.key, many)
		a.Agent.mu.Lock()
		defer a.Agent.mu.Unlock()
		if n := len(a.peers[b.key].pairs); n != 1+MaxRelays {
			t.Errorf("%d pairs", n)
		}
	})
}

// TestRelaysAreNoCandidates fills the list of candidates beside relays, and names
// handles as candidates.
func TestRelaysAreNoCandidates(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 2)
		info := b.info()
		info.Candidates = []Candidate{{Addr: b.handle(0), Type: Host}, {Addr: b.handle(7), Type: Relayed}}
		for i := range MaxCandidates - 2 {
			addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 7)
			info.Candidates = append(info.Candidates, Candidate{Addr: addr, Type: ServerReflexive})
		}
		a.SetPeer(info)
		rest(time.Second)
		a.Agent.mu.Lock()
		p := a.peers[b.key]
		count, sources := 0, source(0)
		for _, q := range p.pairs {
			if q.relayed() {
				count++
				sources |= q.source
			}
		}
		if count != 2 || sources != relay || p.find(b.handle(7), 0) != nil {
			t.Errorf("%d relayed pairs of sources %v", count, sources)
		}
		a.Agent.mu.Unlock()
		a.SetRelays(b.key, nil)
		rest(time.Second)
		a.wantPath(b, netip.AddrPort{})
	})
}

// TestUpgrade lets a direct path answer: it is taken at once, and copies go over
// the relay until it answered again.
func TestUpgrade(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		w.setDrop(nil)
		told := len(a.toldPaths())
		begin := time.Now()
		a.SetServers([]Server{{Addr: stunAddr(), Username: []byte{1}, Key: []byte("secret")}}) // an event
		rest(time.Second)
		paths := a.toldPaths()[told:]
		if len(paths) != 2 || paths[0].Addr != b.outer || paths[0].Also != b.handle(0) || paths[1].Also.IsValid() {
			t.Fatalf("told %v", paths)
		}
		if d := a.toldAt(told + 1).Sub(a.toldAt(told)); d != 2*oneWay {
			t.Errorf("copies for %v", d)
		}
		if d := a.toldAt(told).Sub(begin); d > 4*oneWay {
			t.Errorf("direct after %v", d)
		}
		if e, _ := a.Explain(b.key); e.Attempt != (Attempt{}) {
			t.Errorf("attempt %v beside a direct path", e.Attempt)
		}
		w.mu.Lock() // a relay that is much better is no reason
		w.delay = func(x wire) time.Duration {
			if overRelay(x.to) {
				return time.Millisecond
			}
			return oneWay
		}
		w.mu.Unlock()
		told = len(a.toldPaths())
		a.talk(b, time.Minute, true)
		a.wantPath(b, b.outer)
		if moves := a.toldPaths()[told:]; len(moves) > 0 {
			t.Errorf("told %v", moves)
		}
	})
}

// TestUnconfirmed has the new direct path fail before it answers again.
func TestUnconfirmed(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		w.setDrop(nil)
		told := len(a.toldPaths())
		a.NetworkChanged()
		for len(a.toldPaths()) == told || a.last().Type == Relayed {
			rest(time.Millisecond)
		}
		w.setDrop(onlyRelays)
		a.talk(b, 700*time.Millisecond, false)
		a.wantPath(b, b.handle(0))
		for _, p := range a.toldPaths()[told:] {
			if p.Addr != b.handle(0) && p.Also != b.handle(0) {
				t.Errorf("without the relay on %v", p)
			}
		}
	})
}

// TestSearchGoesOn wants calls with back-off while data comes over a relay.
func TestSearchGoesOn(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		b.stop() // its calls would be answered
		b.stop = func() {}
		rest(20 * time.Second)
		signals := w.talked()
		a.talk(b, 10*time.Minute, true)
		if n := w.talked() - signals; n < 8 || n > 14 {
			t.Errorf("%d calls in ten minutes", n)
		}
		a.wantPath(b, b.handle(0))
		e, _ := a.Explain(b.key)
		attempt := e.Attempt
		if attempt.Calls < 8 || attempt.Since.IsZero() || !attempt.Answered || !attempt.Public || !attempt.Mapped {
			t.Errorf("attempt %+v", attempt)
		}
	})
}

// TestCut cuts the direct path under traffic, in one direction or in both, while
// data of the peer goes on arriving: it could come over the relay.
func TestCut(t *testing.T) {
	for _, test := range []struct {
		what   string
		oneWay bool
		most   time.Duration
	}{{"both directions", false, 450 * time.Millisecond}, {"one direction", true, 900 * time.Millisecond}} {
		t.Run(test.what, func(t *testing.T) {
			inWorld(t, func(w *world) {
				a, b := connected(w)
				relays(a, b, 1)
				b.Demand(a.key)
				a.talk(b, time.Second, true)
				cut := time.Now()
				w.setDrop(func(x wire) bool { return x.to == b.outer || !test.oneWay && x.to == a.outer })
				for time.Since(cut) < 10*time.Second {
					a.talk(b, 20*time.Millisecond, true)
					b.sends() // and hears nothing
				}
				told := a.toldPaths()
				i := slices.IndexFunc(told, func(p Path) bool { return p.Also.IsValid() || p.Type == Relayed })
				if i < 0 || a.toldAt(i).Sub(cut) > test.most {
					t.Errorf("told %v, copies at %d", told, i)
				}
				a.wantPath(b, b.handle(0))
				if last := a.last(); last.Also.IsValid() {
					t.Errorf("copies to %v for ever", last.Also)
				}
				rest(3 * time.Second)
			})
		})
	}
}

// TestCopiesProveNothing lets data arrive just after the path in use, direct or a
// relay, came into doubt: it could be a copy that came over the other one.
func TestCopiesProveNothing(t *testing.T) {
	for _, direct := range []bool{true, false} {
		inWorld(t, func(w *world) {
			var a, b *node
			if direct {
				a, b = connected(w)
				relays(a, b, 1)
			} else {
				a, b = isolated(w, 2)
			}
			a.talk(b, time.Second, true)
			dead := a.last().Addr
			w.setDrop(func(x wire) bool { return x.to == dead || x.from == b.outer || x.from.Addr() == b.handle(0).Addr() })
			for begin := time.Now(); !a.last().Also.IsValid(); {
				a.talk(b, 20*time.Millisecond, false)
				if time.Since(begin) > time.Second {
					t.Fatal("no doubt")
				}
			}
			a.talk(b, 450*time.Millisecond, true)
			if p := a.last(); p.Addr == dead {
				t.Errorf("path %v, which is dead, because data arrives", p)
			}
		})
	}
}

// TestRelayReleasesNothing wants checks towards a NAT held although checks of the
// peer come over a relay, whose handles are of the same family.
func TestRelayReleasesNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, "[2001:db8:1::1]:1000"), w.gathered(2, "[2001:db8:2::1]:2000")
		w.setCarry(func(_, _ *node) error { return errLost })
		begin := time.Now()
		meet(a, b)
		relays(a, b, 1)
		rest(maxHold - time.Millisecond)
		if p, _ := a.Path(b.key); p.RTT != 2*oneWay {
			t.Fatalf("path %v", p)
		}
		for _, x := range w.between(a.outer, b.outer, begin) {
			if x.ttl == 0 {
				t.Errorf("full TTL after %v", x.at.Sub(begin))
			}
		}
	})
}

// TestSignalsNameNoHandles reads what a says its NAT is open towards.
func TestSignalsNameNoHandles(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 2)
		w.setCarry(nil)
		a.NetworkChanged()
		rest(200 * time.Millisecond)
		b.Agent.mu.Lock()
		defer b.Agent.mu.Unlock()
		opened := b.peers[a.key].openTo
		if len(opened) == 0 || slices.ContainsFunc(opened, overRelay) {
			t.Errorf("open towards %v", opened)
		}
	})
}

// TestChangeWithRelay changes the network: the relay takes over at once, the
// direct path gets copies unless its address is lost, and comes back.
func TestChangeWithRelay(t *testing.T) {
	for _, lost := range []bool{false, true} {
		inWorld(t, func(w *world) {
			a, b := connected(w)
			relays(a, b, 1)
			local := func(addr string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(addr)} }
			b.SetLocal(local("192.168.1.5/24"), 2000)
			rest(5 * time.Second)
			b.wantPath(a, a.outer)
			told := len(b.toldPaths())
			b.move("203.0.113.77:7777")
			if lost {
				b.SetLocal(local("192.168.2.5/24"), 2000)
			} else {
				b.NetworkChanged()
			}
			rest(time.Millisecond)
			if p := b.toldPaths()[told]; p.Addr != a.handle(0) || p.Also.IsValid() == lost {
				t.Errorf("lost %v: told %v", lost, p)
			}
			rest(time.Second)
			b.wantPath(a, a.outer)
			a.wantPath(b, b.outer)
		})
	}
}

// TestRelayAfterLoss gives a relay to one who has only a dead direct path, and
// takes it away again.
func TestRelayAfterLoss(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		a.talk(b, time.Second, true)
		w.setDrop(onlyRelays)
		a.talk(b, time.Second, false)
		a.wantPath(b, b.outer)
		relays(a, b, 1)
		rest(time.Microsecond)
		a.wantPath(b, b.handle(0))
		if a.last().Also != b.outer {
			t.Errorf("told %v", a.last())
		}
		a.SetRelays(b.key, nil)
		rest(time.Microsecond)
		a.wantPath(b, b.outer)
		a.talk(b, giveUp+time.Second, false)
		a.wantPath(b, netip.AddrPort{})
		relays(a, b, 1)
		rest(time.Microsecond)
		a.wantPath(b, b.handle(0))
	})
}

// TestRelayGivenUp has a peer go offline that has only a relay: the path ends when
// nobody wants it any more.
func TestRelayGivenUp(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		w.setDrop(func(wire) bool { return true })
		a.talk(b, time.Second, false)
		b.online = false
		a.SetPeer(b.info())
		a.talk(b, 30*time.Second, false)
		a.wantPath(b, b.handle(0))
		rest(3 * time.Minute)
		a.wantPath(b, netip.AddrPort{})
	})
}

// TestDoubt wants a word about a relay whose answers are late, once a second at
// most, and none about one that answers.
func TestDoubt(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		a.talk(b, 20*time.Second, false)
		if len(a.doubted()) > 0 {
			t.Errorf("doubts about %v", a.doubted())
		}
		w.setDrop(func(x wire) bool { return true })
		begin := time.Now()
		for len(a.doubted()) == 0 && time.Since(begin) < time.Second {
			a.talk(b, 20*time.Millisecond, false)
		}
		if took := time.Since(begin); took > 320*time.Millisecond || a.doubted()[0] != b.handle(0) {
			t.Errorf("after %v: %v", took, a.doubted())
		}
		a.talk(b, 10*time.Second, false)
		if n := len(a.doubted()); n > 11 {
			t.Errorf("%d doubts in 10 s", n)
		}
	})
}

// TestCallWhenSignalsPass has a call that nothing could carry repeated as soon as
// the peer is seen at a relay, which carries it.
func TestCallWhenSignalsPass(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(func(x wire) bool { return x.to == a.outer || x.to == b.outer })
		w.setCarry(func(_, _ *node) error { return errNoCarrier })
		meet(a, b)
		a.SetRelays(b.key, []Relay{{Addr: b.handle(0)}})
		rest(300 * time.Millisecond)
		w.setCarry(nil)
		heard := func() int {
			e, _ := b.Explain(a.key)
			return e.Signals.Heard
		}
		rest(300 * time.Millisecond)
		if n := heard(); n > 0 {
			t.Fatalf("%d signals heard before anything happened", n)
		}
		a.SetRelays(b.key, []Relay{{Addr: b.handle(0), Here: true}})
		rest(2 * oneWay)
		if n := heard(); n == 0 {
			t.Error("the peer came to a relay and was not called")
		}
	})
}

// TestCallRepeated has the first signals of a call lost, as a relay over UDP loses
// some: they are said again, a few times, until the peer says anything.
func TestCallRepeated(t *testing.T) {
	for _, test := range []struct {
		lost, want int
		within     time.Duration
	}{{1, 2, 300 * time.Millisecond}, {2, 3, 900 * time.Millisecond}, {100, 1 + maxRepeats, 4500 * time.Millisecond}} {
		inWorld(t, func(w *world) {
			a, b := w.gathered(1, outerA), w.gathered(2, outerB)
			a.online = false // b does not call
			if test.lost > maxRepeats {
				w.setDrop(func(x wire) bool { return x.to == b.outer })
			}
			count := 0
			w.setCarry(func(from, _ *node) error {
				if from != a {
					return nil
				}
				if count++; count <= test.lost {
					return errLost
				}
				return nil
			})
			meet(a, b)
			rest(test.within)
			if count != test.want {
				t.Errorf("%d lost: %d signals in %v, want %d", test.lost, count, test.within, test.want)
			}
			if test.lost < test.want {
				rest(8 * oneWay)
				a.wantPath(b, b.outer)
			}
		})
	}
}
