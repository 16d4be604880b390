package punch

import (
	"net/netip"
	"testing"
	"time"
)

const (
	outerA = "203.0.113.1:1000"
	outerB = "203.0.113.2:2000"
)

func TestNewRefuses(t *testing.T) {
	send := func([]byte, netip.AddrPort, netip.AddrPort, int) error { return nil }
	if _, err := New(Config{Send: send}); err == nil {
		t.Error("a private key of zero is accepted")
	}
	if _, err := New(Config{PrivateKey: [32]byte{1}}); err == nil {
		t.Error("no Send is accepted")
	}
}

// TestDirect wants a path after 1.5 round trips when both call at once: signal,
// check, answer.
func TestDirect(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		begin := time.Now()
		meet(a, b)
		rest(3*oneWay + time.Millisecond)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
		for _, n := range []*node{a, b} {
			if len(n.toldPaths()) != 1 || n.toldPaths()[0].RTT != 2*oneWay || n.toldPaths()[0].Type != ServerReflexive {
				t.Errorf("paths told: %v", n.toldPaths())
			}
		}
		first := w.between(a.outer, b.outer, begin)
		if first[0].ttl != openerTTL || first[1].ttl != 0 || first[1].at.Sub(begin) != oneWay {
			t.Errorf("first packets: TTL %d, %d after %v", first[0].ttl, first[1].ttl, first[1].at.Sub(begin))
		}
		rest(2 * time.Second)
		settled := time.Now()
		rest(20 * time.Second)
		if n := len(w.between(a.outer, b.outer, settled)); n > 0 {
			t.Errorf("%d packets in 20 s of silence", n)
		}
	})
}

// TestOneSideCalls wants the called side to have its path after 1.5 round trips,
// too, and the caller after two.
func TestOneSideCalls(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		a.online = false
		meet(a, b)
		rest(3*oneWay + time.Millisecond)
		b.wantPath(a, a.outer)
		rest(oneWay)
		a.wantPath(b, b.outer)
	})
}

// TestHold looks at when the first packet leaves at full TTL.
func TestHold(t *testing.T) {
	for _, test := range []struct {
		name  string
		carry func(from, to *node) error
		since time.Duration // the start
		want  time.Duration
	}{
		{"opened", nil, 100 * time.Millisecond, 2 * oneWay},
		{"silence", func(_, _ *node) error { return errLost }, 100 * time.Millisecond, maxHold},
		{"no carrier yet", func(_, _ *node) error { return errNoCarrier }, 300 * time.Millisecond, 2*maxHold - 300*time.Millisecond},
		{"no carrier", func(_, _ *node) error { return errNoCarrier }, 2 * maxHold, shortHold},
	} {
		t.Run(test.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				b := w.gathered(2, outerB)
				a := w.gathered(1, outerA)
				rest(test.since - 100*time.Millisecond)
				w.carry = test.carry
				w.setDrop(func(x wire) bool { return x.from == b.outer })
				a.online = false // b does not call
				begin := time.Now()
				meet(a, b)
				rest(2 * time.Second)
				sent := w.between(a.outer, b.outer, begin)
				if sent[0].ttl != openerTTL || sent[0].at != begin {
					t.Errorf("first packet has TTL %d after %v", sent[0].ttl, sent[0].at.Sub(begin))
				}
				for _, x := range sent {
					if x.ttl == 0 {
						if got := x.at.Sub(begin); got != test.want {
							t.Errorf("full TTL after %v, want %v", got, test.want)
						}
						return
					}
				}
				t.Error("no packet at full TTL")
			})
		})
	}
}

// TestCallOfStranger has a caller who does not know our address: its call proves
// nothing, it is called back, and full TTL waits until it has opened.
// Who does not know its own address yet cannot know that the peer has opened its
// NAT for it, whatever the peer says.
func TestHeldUntilTheOwnAddressIsKnown(t *testing.T) {
	inWorld(t, func(w *world) {
		b := w.gathered(2, "203.0.113.2:4002")
		a := w.join(1, "203.0.113.1:4001")
		a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.1.2/24")}, 4001)
		past := a.info()
		past.Candidates[0].Addr = netip.MustParseAddrPort("203.0.113.1:9999")
		b.SetPeer(past)
		a.SetPeer(b.info())
		rest(5 * oneWay)
		w.wantOpeners(a, b)
		a.SetServers([]Server{{Addr: stunAddr(), Username: []byte{1}, Key: []byte("secret")}})
		rest(8 * oneWay)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
	})
}

// A NAT that shows servers two addresses of ours may show the peer either.
func TestHeldUntilAllOwnAddressesAreCovered(t *testing.T) {
	inWorld(t, func(w *world) {
		b := w.gathered(2, "203.0.113.2:4002")
		a := w.join(1, "203.0.113.1:4001")
		var servers []Server
		for _, addr := range []netip.AddrPort{stunAddr(), nextPort(stunAddr())} {
			servers = append(servers, Server{Addr: addr, Username: []byte{1}, Key: []byte("secret")})
		}
		a.SetServers(servers)
		rest(100 * time.Millisecond)
		w.setCarry(func(from, _ *node) error {
			if from == a {
				return errLost
			}
			return nil
		})
		meet(a, b)
		rest(5 * oneWay)
		w.wantOpeners(a, b)
		w.setCarry(nil)
		a.NetworkChanged()
		rest(10 * oneWay)
		if len(w.between(b.outer, nextPort(a.outer), time.Time{})) == 0 {
			t.Error("b has not opened for the second address")
		}
		a.wantPath(b, b.outer)
	})
}

// Where nothing carries signals, no call waits for a way to carry them.
func TestCallWithoutSignals(t *testing.T) {
	inWorld(t, func(w *world) {
		w.speechless = true
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		meet(a, b)
		rest(shortHold + 4*oneWay)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
	})
}

// wantOpeners wants that all a sent to b died on the way.
func (w *world) wantOpeners(a, b *node) {
	w.t.Helper()
	sent := w.between(a.outer, b.outer, time.Time{})
	if len(sent) == 0 {
		w.t.Error("nothing was sent")
	}
	for _, x := range sent {
		if x.ttl == 0 {
			w.t.Errorf("full TTL at %v", x.at)
		}
	}
}

func TestCallOfStranger(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		begin := time.Now()
		a.SetPeer(Peer{Key: b.key, Nonce: b.nonce, Online: true})
		offline := a.info()
		offline.Online = false
		b.SetPeer(offline)
		rest(time.Second)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
		w.wantOpenedFirst(a, b, begin)
	})
}

// TestCadence looks at a round of checks that nobody answers.
func TestCadence(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.carry = func(_, _ *node) error { return errNoCarrier }
		w.setDrop(func(wire) bool { return true })
		b.online = true
		begin := time.Now()
		a.SetPeer(b.info())
		rest(4 * time.Second)
		var offsets []time.Duration
		sent := w.between(a.outer, b.outer, begin)
		for _, x := range sent[1:] {
			offsets = append(offsets, x.at.Sub(sent[1].at))
		}
		want := []time.Duration{0, 20, 60, 140, 300, 620, 1260}
		if len(offsets) != len(want) {
			t.Fatalf("checks at %v", offsets)
		}
		for i, offset := range offsets {
			at := want[i] * time.Millisecond
			if offset < at*4/5 || offset > at*6/5 {
				t.Errorf("check %d after %v, want %v", i, offset, at)
			}
		}
		rest(2 * time.Hour)
		last := time.Now().Add(-maxBackoff - time.Second)
		if len(w.between(a.outer, b.outer, last)) == 0 {
			t.Error("an online peer is given up")
		}
	})
}

// TestPrivateCandidates wants a private address probed on-link or behind the same
// public address, and nowhere else.
func TestPrivateCandidates(t *testing.T) {
	const lan = "192.168.7.2:2000"
	for _, test := range []struct {
		name   string
		local  string
		public string // the peer's
		want   bool
	}{
		{"on-link", "192.168.7.9/24", outerB, true},
		{"elsewhere", "192.168.8.9/24", outerB, false},
		{"same public address", "192.168.8.9/24", "203.0.113.1:7777", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				a := w.gathered(1, outerA)
				a.SetLocal([]netip.Prefix{netip.MustParsePrefix(test.local)}, 1000)
				rest(100 * time.Millisecond)
				_, key := keyPair(t, 2)
				begin := time.Now()
				a.SetPeer(Peer{Key: key, Online: true, Candidates: []Candidate{
					{Addr: netip.MustParseAddrPort(lan), Type: Host},
					{Addr: netip.MustParseAddrPort(test.public), Type: ServerReflexive},
				}})
				rest(3 * time.Second)
				sent := w.between(a.outer, netip.MustParseAddrPort(lan), begin)
				if got := len(sent) > 0; got != test.want {
					t.Fatalf("%d packets", len(sent))
				}
				if test.want && (sent[0].ttl != 0 || sent[0].at != begin) {
					t.Errorf("first packet with TTL %d after %v", sent[0].ttl, sent[0].at.Sub(begin))
				}
			})
		})
	}
}

// TestLANPreferred wants the path inside the LAN, although the router's hairpin
// is nearly as fast.
func TestLANPreferred(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, "203.0.113.1:2000")
		w.delay = func(wire) time.Duration { return time.Millisecond }
		inside := netip.MustParseAddrPort("192.168.7.2:2000")
		a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.7.9/24")}, 1000)
		meet(a, b)
		rest(time.Second)
		a.wantPath(b, b.outer)
		b.alias(inside)
		b.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.7.2/24")}, 2000)
		rest(time.Second)
		a.wantPath(b, inside)
	})
}

func TestForbiddenAndTooMany(t *testing.T) {
	inWorld(t, func(w *world) {
		mesh := netip.MustParseAddrPort("203.0.113.99:1")
		a := w.join(1, outerA, mesh)
		a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.7.9/24")}, 1000)
		_, key := keyPair(t, 2)
		peer := Peer{Key: key, Online: true}
		for _, addr := range []string{
			mesh.String(), stunAddr().String(), "127.0.0.1:1", "0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1",
			"203.0.113.5:0", "[fe80::1]:1", "192.168.7.255:1", "192.168.7.9:1000", "[::ffff:127.0.0.1]:1",
		} {
			peer.Candidates = append(peer.Candidates, Candidate{Addr: netip.MustParseAddrPort(addr), Type: ServerReflexive})
		}
		a.SetPeer(peer)
		rest(10 * time.Second)
		if len(w.all()) > 0 {
			t.Errorf("a packet left for %v", w.all()[0].to)
		}
		for i := range MaxCandidates + 1 {
			addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 7)
			peer.Candidates = append(peer.Candidates[:i:i], Candidate{Addr: addr, Type: Host})
		}
		a.SetPeer(peer)
		rest(10 * time.Second)
		if len(w.all()) > 0 {
			t.Errorf("a list of %d was not refused whole: a packet left for %v", len(peer.Candidates), w.all()[0].to)
		}
	})
}

// TestPeerReflexive has a peer whose NAT uses another mapping towards us than
// towards the server.
func TestPeerReflexive(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		published := b.outer
		b.move("203.0.113.2:54321")
		info := b.info()
		info.Candidates[0].Addr = published
		a.SetPeer(info)
		b.SetPeer(a.info())
		rest(time.Second)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
		if path, _ := a.Path(b.key); path.Type != PeerReflexive {
			t.Errorf("type %v", path.Type)
		}
	})
}

func TestDemand(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		a.online, b.online = false, false
		begin := time.Now()
		meet(a, b)
		rest(time.Minute)
		if n := len(w.between(a.outer, b.outer, begin)); n > 0 || w.talked() > 0 {
			t.Fatalf("%d packets and %d signals for nobody", n, w.talked())
		}
		a.Demand(b.key)
		rest(100 * time.Millisecond) // asks the server anew, because that was long ago
		a.wantPath(b, b.outer)
		a.Demand(Key{}) // unknown peers are nothing
	})
}

// TestBackoff counts calls to a peer that does not answer while data waits.
func TestBackoff(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.gathered(1, outerA)
		_, key := keyPair(t, 2)
		w.carry = func(_, _ *node) error { return nil }
		a.SetPeer(Peer{Key: key, Candidates: []Candidate{{Addr: netip.MustParseAddrPort(outerB), Type: Host}}})
		for range 600 {
			a.Demand(key)
			rest(100 * time.Millisecond)
		}
		// At 0, said again three times, then after 5, 10, 20, 40 s.
		if w.talked() != 4+maxRepeats {
			t.Errorf("%d calls in a minute", w.talked())
		}
		rest(5 * time.Minute)
		before := len(w.between(a.outer, netip.MustParseAddrPort(outerB), time.Time{}))
		rest(time.Hour)
		if n := len(w.between(a.outer, netip.MustParseAddrPort(outerB), time.Time{})) - before; n > 0 {
			t.Errorf("%d packets without demand", n)
		}
	})
}
