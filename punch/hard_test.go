package punch

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

func (n *node) openSockets(count int) ([]uint16, error) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	if n.spare+count > maxSockets {
		return nil, errors.New("too many sockets")
	}
	n.spare += count
	ports := make([]uint16, count)
	for i := range ports {
		ports[i] = uint16(20000 + n.spare - i)
	}
	return ports, nil
}

func (n *node) closeSockets(ports []uint16) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.spare -= len(ports)
}

// tells is what a member says of its NAT.
func tells(kind signalKind, about side) signal {
	return signal{kind: kind, hard: about, candidates: []Candidate{{Addr: about.addr, Type: ServerReflexive}}}
}

// hostile has a member ask for rounds, and agree to them, all the time for an
// hour, about an address with a NAT of the given name. It returns what the victim
// of it sent.
func hostile(w *world, first, second byte, name, ip string) []wire {
	w.spare = true
	a, b := w.gathered(first, outerA), w.gathered(second, outerB)
	w.setDrop(func(x wire) bool { return x.to != stunAddr() })
	w.setCarry(func(from, _ *node) error {
		if from == b {
			return errLost // the hostile one speaks for itself
		}
		return nil
	})
	meet(a, b)
	rest(5 * time.Second)
	about := sides(ip)[name]
	for end := time.Now().Add(time.Hour); time.Now().Before(end); rest(500 * time.Millisecond) {
		a.Demand(b.key)
		for _, kind := range []signalKind{signalPropose, signalAgree, signalGo} {
			b.signalTo(a, tells(kind, about))
		}
	}
	var found []wire
	for _, x := range w.all() {
		if x.from.Addr() == a.outer.Addr() && x.to.Addr() == about.addr.Addr() {
			found = append(found, x)
		}
	}
	return found
}

// TestHardVictim has a member ask for rounds towards an address where no server
// saw it: nothing but the checks of a candidate go there.
func TestHardVictim(t *testing.T) {
	for _, order := range [][2]byte{{1, 2}, {2, 1}} {
		for _, name := range []string{"random", "sequential", "block"} {
			inWorld(t, func(w *world) {
				for _, x := range hostile(w, order[0], order[1], name, "203.0.113.66") {
					if x.to.Port() != 40000 {
						t.Fatalf("%s: a packet to %v", name, x.to)
					}
				}
			})
		}
	}
}

// TestHardSeldom has a member ask for rounds towards itself: they stay in their
// limits, and become rare.
func TestHardSeldom(t *testing.T) {
	for _, order := range [][2]byte{{1, 2}, {2, 1}} {
		inWorld(t, func(w *world) {
			outer := netip.MustParseAddrPort(outerB)
			var last time.Time
			rounds, count := 0, 0
			var recent []time.Time
			for _, x := range hostile(w, order[0], order[1], "random", outer.Addr().String()) {
				if x.to == outer || x.to.Port() == 40000 {
					continue
				}
				if gap := x.at.Sub(last); gap > 5*time.Second {
					if rounds > 0 && gap < 45*time.Second {
						t.Errorf("a round %v after another", gap)
					}
					rounds, count = rounds+1, 0
				}
				last = x.at
				count++
				recent = append(recent, x.at)
				if n := len(recent); n > maxHardRate && x.at.Sub(recent[n-1-maxHardRate]) < time.Second {
					t.Fatalf("more than %d packets within a second", maxHardRate)
				}
				if count > maxHardPackets {
					t.Fatalf("%d packets in a round", count)
				}
			}
			if rounds == 0 || rounds > 10 {
				t.Errorf("%d rounds in an hour", rounds)
			}
		})
	}
}

// roundsWith counts the rounds of n towards another node's address.
func (n *node) roundsWith(to *node) int {
	count, last := 0, time.Time{}
	for _, x := range n.w.all() {
		if x.from.Addr() != n.outer.Addr() || x.to.Addr() != to.outer.Addr() || x.to == to.outer || x.to.Port() == 40000 {
			continue
		}
		if x.at.Sub(last) > 10*time.Second {
			count++
		}
		last = x.at
	}
	return count
}

// TestHardFair has one member ask for rounds all the time, and another one now and
// then: a round that found nothing gives way.
func TestHardFair(t *testing.T) {
	for _, order := range [][3]byte{{1, 2, 3}, {3, 2, 1}, {2, 1, 3}, {2, 3, 1}} {
		inWorld(t, func(w *world) {
			w.spare = true
			a, greedy, modest := w.gathered(order[0], outerA), w.gathered(order[1], outerB), w.gathered(order[2], "203.0.113.9:9000")
			w.setDrop(func(x wire) bool { return x.to != stunAddr() })
			w.setCarry(func(from, _ *node) error {
				if from != a {
					return errLost // they speak for themselves
				}
				return nil
			})
			say := func(n *node, kinds ...signalKind) {
				a.Demand(n.key)
				for _, kind := range kinds {
					n.signalTo(a, tells(kind, sides(n.outer.Addr().String())["random"]))
				}
			}
			meet(a, greedy)
			meet(a, modest)
			rest(5 * time.Second)
			for i := range 3 * 120 { // three minutes
				say(greedy, signalPropose, signalAgree, signalGo)
				say(modest, signalAgree, signalGo)
				if i%30 == 29 {
					say(modest, signalPropose)
				}
				rest(500 * time.Millisecond)
			}
			if g, m := a.roundsWith(greedy), a.roundsWith(modest); g == 0 || m == 0 {
				t.Errorf("%v: %d rounds with the one, %d with the other", order, g, m)
			}
		})
	}
}
