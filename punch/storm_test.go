package punch

import (
	"testing"
	"time"
)

// TestNoStorm counts how often the agent looks at an idle peer whose path fails,
// also when a keepalive is due meanwhile: it never spins.
func TestNoStorm(t *testing.T) {
	changed := func(a, _ *node) { a.NetworkChanged() }
	offline := func(a, b *node) {
		b.online = false
		a.SetPeer(b.info())
	}
	both := func(a, b *node) {
		offline(a, b)
		changed(a, b)
	}
	for name, event := range map[string]func(a, b *node){
		"cut": func(_, _ *node) {}, "changed": changed, "offline": offline, "offline and changed": both,
	} {
		t.Run(name, func(t *testing.T) {
			for wait := 20 * time.Second; wait <= keepalive; wait += time.Second / 4 {
				inWorld(t, func(w *world) {
					a, b := connected(w)
					relays(a, b, int(wait/time.Second)%3) // none, one and two
					rest(wait)
					w.setDrop(func(wire) bool { return true })
					event(a, b)
					if n := w.busiest(a, 2*time.Minute); n > 40 {
						t.Errorf("looked at the peer %d times in 100 ms", n)
					}
				})
			}
		})
	}
}

// busiest returns how often n looked at its peers in the worst 100 ms.
func (w *world) busiest(n *node, d time.Duration) int {
	looks := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return n.looks
	}
	worst, last := 0, looks()
	for end := time.Now().Add(d); time.Now().Before(end); {
		rest(100 * time.Millisecond)
		worst, last = max(worst, looks()-last), looks()
	}
	return worst
}
