package punch

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A mapped port is probed at once and at full TTL, without an opener, although
// the peer has not answered the call.
func TestMappedPortsAreProbedAtOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		mapped := netip.MustParseAddrPort("203.0.113.2:7000")
		b.SetMapped([]netip.AddrPort{mapped})
		rest(time.Second)
		w.carry = func(_, _ *node) error { return errLost }
		begin := time.Now()
		info := b.info()
		info.Candidates = append(info.Candidates, Candidate{Addr: mapped, Type: PortMapped})
		a.SetPeer(info)
		rest(time.Millisecond)
		sent := w.between(a.outer, mapped, begin)
		if len(sent) == 0 || sent[0].ttl != 0 {
			t.Errorf("sent to the mapped port: %v", sent)
		}
		for _, x := range w.between(a.outer, b.outer, begin) {
			if x.ttl == 0 {
				t.Errorf("full TTL to the unopened address after %v", x.at.Sub(begin))
			}
		}
	})
}

func TestMappedCandidates(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.gathered(1, outerA)
		both := []netip.AddrPort{a.outer, netip.MustParseAddrPort("100.64.0.9:7000")}
		a.SetMapped(append(both, netip.MustParseAddrPort("203.0.113.9:1"), netip.MustParseAddrPort("127.0.0.1:1")))
		rest(time.Second)
		var got []netip.AddrPort
		for _, c := range a.Candidates() {
			if c.Type == PortMapped {
				got = append(got, c.Addr)
			}
		}
		if !slices.Equal(got, both) {
			t.Errorf("mapped candidates %v, want %v", got, both)
		}
		if !slices.ContainsFunc(a.Candidates(), func(c Candidate) bool { return c.Addr == a.outer && c.Type == ServerReflexive }) {
			t.Error("the mapped port hides that a server saw it")
		}
		// Where only a firewall was opened, the address is a host candidate already.
		a.SetLocal([]netip.Prefix{netip.MustParsePrefix("2001:db8::2/64")}, 4001)
		a.SetMapped([]netip.AddrPort{netip.MustParseAddrPort("[2001:db8::2]:4001")})
		if slices.ContainsFunc(a.Candidates(), func(c Candidate) bool { return c.Type == PortMapped }) {
			t.Errorf("a mapping that is gone, or a host, is a mapped candidate: %v", a.Candidates())
		}
	})
}

// A mapped port on an address of a carrier is of use to those behind the same
// one, and tried by them only.
func TestMappedBehindOneCarrier(t *testing.T) {
	for outer, want := range map[string]bool{"203.0.113.2:5000": true, "203.0.113.3:5000": false} {
		inWorld(t, func(w *world) {
			a, b := w.gathered(1, outer), w.gathered(2, "203.0.113.2:4002")
			mapped := netip.MustParseAddrPort("100.64.0.9:7000")
			b.SetMapped([]netip.AddrPort{mapped})
			meet(a, b)
			rest(2 * time.Second)
			if got := len(w.between(a.outer, mapped, time.Time{})) > 0; got != want {
				t.Errorf("seen at %s: mapped port tried: %v", outer, got)
			}
		})
	}
}

// A private address beyond our links, of a peer that says itself that it is at our
// site, gets few checks per call; one whose public address the netmap has gets them
// all.
func TestSiteByOwnWord(t *testing.T) {
	inner := netip.MustParseAddrPort("10.99.0.9:7000")
	for published, want := range map[bool]int{false: globalChecks, true: roundChecks} {
		inWorld(t, func(w *world) {
			a, b := w.gathered(1, "203.0.113.2:5000"), w.gathered(2, "203.0.113.3:4002")
			here := netip.MustParseAddrPort("203.0.113.2:4002") // where b is not
			w.setCarry(func(_, _ *node) error { return errLost })
			w.setDrop(func(x wire) bool { return x.to == inner || x.to == here || x.to == b.outer })
			info := b.info()
			if published {
				info.Candidates = append(info.Candidates, Candidate{Addr: here, Type: ServerReflexive})
			}
			a.SetPeer(info)
			begin := time.Now()
			b.SetPeer(a.info())
			b.signalTo(a, signal{kind: signalCall, candidates: []Candidate{{Addr: here, Type: ServerReflexive}, {Addr: inner, Type: Host}}})
			rest(3 * time.Second)
			if got := len(w.between(a.outer, inner, begin)); got != want {
				t.Errorf("published %v: %d checks, want %d", published, got, want)
			}
		})
	}
}
