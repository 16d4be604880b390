package punch

import (
	"testing"
	"time"
)

// A restarted server knows neither the session nor its tokens: the candidates
// are told again when the new ones are there, though no address changed.
func TestNewSessionProvesCandidatesAgain(t *testing.T) {
	for _, nearer := range []time.Duration{0, oneWay} { // a near one answers before the change is told
		inWorld(t, func(w *world) { newSession(t, w, nearer) })
	}
}

func newSession(t *testing.T, w *world, nearer time.Duration) {
	t.Helper()
	w.nearServer = nearer
	w.delay = func(wire) time.Duration { return oneWay - nearer/2 }
	n := w.gathered(1, outerA)
	rest(time.Second)
	before := len(n.toldLists())
	n.SetServers([]Server{{Addr: stunAddr(), Username: []byte{9}, Key: []byte("secret")}})
	for _, c := range n.Candidates() {
		if len(c.Token) > 0 {
			t.Errorf("%v keeps the token of the old session", c.Addr)
		}
	}
	rest(time.Second)
	lists := n.toldLists()[before:]
	if len(lists) == 0 {
		t.Fatal("nothing was told after the new session's answer")
	}
	proven := false
	for _, c := range lists[len(lists)-1] {
		proven = proven || len(c.Token) > 0
	}
	if !proven {
		t.Errorf("told %v, want a candidate with a token", lists[len(lists)-1])
	}
}

// A call that went down with the connection to the server is made again as
// soon as there is a new one, not after the back-off.
func TestCallsAgainWhenSignalsPassAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(func(wire) bool { return true })
		meet(a, b)
		rest(3 * time.Second)
		w.setDrop(nil)
		a.SetServers([]Server{{Addr: stunAddr(), Username: []byte{1}, Key: []byte("secret")}})
		rest(500 * time.Millisecond)
		if _, ok := a.Path(b.key); !ok {
			t.Error("no path half a second after the server is back")
		}
	})
}
