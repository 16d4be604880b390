package punch

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pion/stun/v2"
)

// TestSessionLost wants the hint to arrive in spite of loss, once a second at
// most, and only from the peer itself.
func TestSessionLost(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		dropped := 0
		w.setDrop(func(x wire) bool {
			dropped++
			return x.from == a.outer && dropped <= 4
		})
		begin := time.Now()
		for range 20 {
			a.SessionLost(b.key)
			rest(10 * time.Millisecond)
		}
		rest(300 * time.Millisecond)
		if len(b.hints()) != 1 || b.hints()[0].Sub(begin) > 400*time.Millisecond {
			t.Fatalf("told %d times: %v", len(b.hints()), b.hints())
		}
		for _, x := range w.between(a.outer, b.outer, begin) {
			b.Receive(x.b, x.from, netip.AddrPort{})
			b.Receive(mutate(x.b, 30), x.from, netip.AddrPort{})
		}
		rest(2 * time.Second)
		if len(b.hints()) != 1 {
			t.Errorf("told %d times after replays", len(b.hints()))
		}
		settled := time.Now()
		rest(10 * time.Second)
		if n := len(w.between(a.outer, b.outer, settled)); n > 0 {
			t.Errorf("%d packets after the answer", n)
		}
		a.SessionLost(b.key)
		a.SessionLost(Key{9})
		rest(time.Second)
		if len(b.hints()) != 2 || len(a.hints()) != 0 {
			t.Errorf("told %d and %d times", len(b.hints()), len(a.hints()))
		}
	})
}

// TestSessionLostEarly has no path yet when the session is missed.
func TestSessionLostEarly(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(onlyRelays)
		meet(a, b)
		a.SessionLost(b.key)
		rest(100 * time.Millisecond)
		relays(a, b, 1)
		rest(oneWay + time.Millisecond)
		if len(b.hints()) != 1 {
			t.Errorf("told %d times", len(b.hints()))
		}
	})
}

// TestSessionLostFlood sends hints without pause.
func TestSessionLostFlood(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		for range 500 {
			a.Agent.mu.Lock()
			p := a.peers[b.key]
			p.counter++
			c := check{id: stun.NewTransactionID(), user: p.name, boot: a.boot, counter: p.counter, lost: true}
			x, err := c.marshal(p.secrets.check)
			a.Agent.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			b.Receive(x, a.outer, netip.AddrPort{})
			rest(10 * time.Millisecond)
		}
		if n := len(b.hints()); n < 4 || n > 6 {
			t.Errorf("told %d times in 5 s", n)
		}
	})
}

func (n *node) hints() []time.Time {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return slices.Clone(n.lost)
}
