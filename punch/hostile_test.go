package punch

import (
	"net/netip"
	"testing"
	"time"
)

// TestInsistentMember has a member call all the time, with somebody else's addresses,
// which nobody but it vouches for.
func TestInsistentMember(t *testing.T) {
	victims := []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:66::1]:53"), netip.MustParseAddrPort("10.77.0.1:53")}
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, "203.0.113.2:5000"), w.gathered(2, "203.0.113.3:4002")
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		meet(a, b)
		begin := time.Now()
		for time.Since(begin) < time.Minute {
			b.signalTo(a, signal{kind: signalCall, candidates: []Candidate{
				{Addr: netip.MustParseAddrPort("203.0.113.2:4002"), Type: ServerReflexive}, // where it is not
				{Addr: victims[0], Type: Host}, {Addr: victims[1], Type: Host},
			}})
			rest(100 * time.Millisecond)
		}
		sent := 0
		for _, v := range victims {
			sent += len(w.between(a.outer, v, begin))
		}
		if most := newcomerBurst + 60 + 1; sent == 0 || sent > most {
			t.Errorf("%d packets in a minute, want 1 to %d", sent, most)
		}
	})
}

// TestFreshWithoutServer lets the server die. It is asked from fresh sockets ever
// more seldom.
func TestFreshWithoutServer(t *testing.T) {
	inWorld(t, func(w *world) {
		w.spare = true
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		meet(a, b)
		rest(700 * time.Millisecond)
		w.setDrop(func(wire) bool { return true })
		begin := time.Now()
		for time.Since(begin) < 10*time.Minute {
			a.Demand(b.key)
			b.Demand(a.key)
			rest(time.Second)
		}
		asked := 0
		for _, x := range w.all() {
			if x.to == stunAddr() && x.at.After(begin) && x.from != a.outer && x.from != b.outer {
				asked++
			}
		}
		if asked == 0 || asked > 100 {
			t.Errorf("%d questions from fresh sockets in ten minutes, want 1 to 100", asked)
		}
	})
}

// TestManyChanges has the network change often. A peer's addresses are tried after
// each change all the same.
func TestManyChanges(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		var list []Candidate
		for i := range byte(8) {
			list = append(list, Candidate{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, i}), 5000), Type: ServerReflexive})
		}
		meet(a, b)
		for change := range 24 {
			begin := time.Now()
			a.NetworkChanged()
			b.signalTo(a, signal{kind: signalCall, candidates: append(list, Candidate{Addr: b.outer, Type: ServerReflexive})})
			rest(400 * time.Millisecond)
			if got := len(w.between(a.outer, b.outer, begin)); got < 1 {
				t.Errorf("change %d: %d packets to the peer, want some", change, got)
			}
		}
	})
}
