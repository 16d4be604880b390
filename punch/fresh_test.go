package punch

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// freshAt tells of a fresh socket at an address that the node does not name as a
// candidate.
func (n *node) freshAt(kind signalKind, at netip.AddrPort) signal {
	return signal{
		kind: kind, hard: side{nat: NAT{Mapping: EndpointIndependent}, addr: at},
		candidates: []Candidate{{Addr: n.outer, Type: ServerReflexive}},
	}
}

// insist has a member speak of fresh sockets at ever other ports of an IP address,
// for a minute, ten times a second. It returns what the victim sent there.
func insist(w *world, order [2]byte, ip netip.Addr) []wire {
	w.spare = true
	a, b := w.gathered(order[0], outerA), w.gathered(order[1], outerB)
	w.setDrop(func(x wire) bool { return x.to != stunAddr() })
	w.setCarry(func(from, _ *node) error {
		if from == b {
			return errLost
		}
		return nil
	})
	meet(a, b)
	rest(time.Second)
	port := uint16(2000)
	for end := time.Now().Add(time.Minute); time.Now().Before(end); rest(100 * time.Millisecond) {
		a.Demand(b.key)
		for _, kind := range []signalKind{signalFresh, signalMeet} {
			port++
			b.signalTo(a, b.freshAt(kind, netip.AddrPortFrom(ip, port)))
		}
	}
	var found []wire
	for _, x := range w.all() {
		if x.from.Addr() == a.outer.Addr() && x.to.Addr() == ip && x.to != b.outer {
			found = append(found, x)
		}
	}
	return found
}

// TestFreshVictim has a member tell of sockets where no server saw it.
func TestFreshVictim(t *testing.T) {
	for _, order := range [][2]byte{{1, 2}, {2, 1}} {
		inWorld(t, func(w *world) {
			if got := insist(w, order, netip.MustParseAddr("203.0.113.66")); len(got) > 0 {
				t.Errorf("%d packets, the first to %v", len(got), got[0].to)
			}
		})
	}
}

// TestFreshFew has a member tell of socket after socket of its own: few packets go
// to each of them, and to all.
func TestFreshFew(t *testing.T) {
	for _, order := range [][2]byte{{1, 2}, {2, 1}} {
		inWorld(t, func(w *world) {
			got := insist(w, order, netip.MustParseAddrPort(outerB).Addr())
			each := map[netip.AddrPort]int{}
			for _, x := range got {
				each[x.to]++
			}
			if len(got) == 0 || len(got) > 130 {
				t.Errorf("%v: %d packets", order, len(got))
			}
			for to, n := range each {
				if n > roundChecks+1 {
					t.Errorf("%v: %d packets to %v", order, n, to)
				}
			}
		})
	}
}

// TestFreshIsOpen has a fresh socket told of only as long as it stays open, however
// late the server said where it leads.
func TestFreshIsOpen(t *testing.T) {
	inWorld(t, func(w *world) {
		w.spare = true
		a := w.gathered(1, outerA)
		a.mu.Lock()
		defer a.mu.Unlock()
		now, h := time.Now(), &a.hard
		h.open, h.sweepAt = []uint16{20001}, now
		h.fresh = fresh{port: 20001, since: now.Add(-freshFor), mapped: netip.MustParseAddrPort("203.0.113.1:20001")}
		a.sweep(now)
		if a.prepareFresh(now) && !slices.Contains(h.open, h.fresh.port) {
			t.Errorf("socket %d is closed, and told of", h.fresh.port)
		}
		a.effects, h.open, h.opening, h.sweepAt = nil, nil, false, time.Time{}
	})
}

// TestFreshAnswers has a member tell of the same socket fifty times a second. The
// signals that may be sent to it are not all spent on answers.
func TestFreshAnswers(t *testing.T) {
	inWorld(t, func(w *world) {
		w.spare = true
		a, b := w.gathered(2, outerA), w.gathered(1, outerB)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		sent := 0
		w.setCarry(func(from, _ *node) error {
			if from == b {
				return errLost
			}
			sent++
			return nil
		})
		meet(a, b)
		rest(time.Second)
		sent = 0
		const seconds = 60
		for range seconds * 50 {
			a.Demand(b.key)
			b.signalTo(a, b.freshAt(signalFresh, nextPort(b.outer)))
			rest(20 * time.Millisecond)
		}
		if most := seconds * (freshRate/2 + 1); sent < seconds || sent > most {
			t.Errorf("%d signals in %d s, want at most %d", sent, seconds, most)
		}
	})
}
