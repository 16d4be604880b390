package punch

import (
	"net/netip"
	"testing"
	"time"
)

// TestSecondAddress lets a host be reached only at an address that its system
// does not choose by itself: what comes there is answered from there, and so is
// the path used.
func TestSecondAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		second := netip.MustParseAddrPort("203.0.113.3:3000")
		b.alias(second)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() && (x.to == b.outer || x.from == b.outer) })
		b.SetLocal([]netip.Prefix{netip.PrefixFrom(second.Addr(), 32)}, second.Port())
		meet(a, b)
		rest(time.Second)
		a.wantPath(b, second)
		b.wantPath(a, a.outer)
		if path, _ := b.Path(a.key); path.Local.Addr() != second.Addr() {
			t.Errorf("b sends from %v", path.Local)
		}
		b.talk(a, time.Minute, true)
		if n := len(b.toldPaths()); n != 1 {
			t.Errorf("the path changed %d times", n)
		}
	})
}

// TestLocalAddressStays checks at two addresses of a host in turn: data leaves
// from one of them, until the network changes and the other is proven.
func TestLocalAddressStays(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		second := netip.MustParseAddrPort("203.0.113.3:3000")
		b.alias(second)
		a.SetPeer(Peer{Key: b.key, Nonce: b.nonce, Online: true, Candidates: []Candidate{
			{Addr: b.outer, Type: Host}, {Addr: second, Type: Host},
		}})
		told := len(b.toldPaths())
		for range 30 {
			a.talk(b, time.Second, true)
			b.talk(a, time.Second, true)
		}
		if path, _ := b.Path(a.key); path.Local.Addr() != b.outer.Addr() || len(b.toldPaths()) != told {
			t.Errorf("b sends from %v after %d changes", path.Local, len(b.toldPaths())-told)
		}
		b.move(second.String())
		b.alias(netip.AddrPort{})
		b.NetworkChanged()
		rest(time.Second)
		if path, _ := b.Path(a.key); path.Local.Addr() != second.Addr() {
			t.Errorf("b sends from %v after its move", path.Local)
		}
		if last := b.toldPaths()[len(b.toldPaths())-1]; last.Local.Addr() != second.Addr() {
			t.Errorf("b was told to send from %v", last.Local)
		}
	})
}
