package relay

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

func (m *guest) bye() []byte { return (&bye{m.session.id, m.next()}).build(&m.session) }

// A node that says goodbye is forgotten at once, and may come back.
func TestBye(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b := w.guest(1), w.guest(2)
	atA, atB := place("192.0.2.1:1000"), place("192.0.2.2:1000")
	w.join(a, atA)
	w.join(b, atB)
	w.mustOpen(a, atA, b)
	forged := a.bye()
	forged[len(forged)-1]++
	w.say(forged, atA)
	w.say(a.bye(), atB) // from where another is
	old := a.bye()
	w.mustPong(a, a.hello(), atA)
	w.say(old, atA)
	if st := w.s.Stats(); st.Nodes != 2 || st.Flows != 1 {
		t.Fatalf("after goodbyes that do not count: %+v", st)
	}
	late := a.hello()
	final := a.bye()
	if reply := w.say(final, atA); reply != nil {
		t.Errorf("a goodbye is answered: % x", reply)
	}
	if st := w.s.Stats(); st.Nodes != 1 || st.Flows != 0 || w.active(a) != nil {
		t.Errorf("after the goodbye: %+v, datagrams go to %v", st, w.active(a))
	}
	if got := w.mustOpen(b, atB, a); got != 0 {
		t.Error("a flow with a node that left")
	}
	w.say(late, atA)
	if w.active(a) != nil {
		t.Error("what was sent before the goodbye brings the node back")
	}
	w.join(a, atA)
	if got := w.mustOpen(b, atB, a); got != 1 {
		t.Error("no flow with a node that came back")
	}
	w.say(final, atA)
	if w.s.Stats().Nodes != 2 {
		t.Error("a goodbye counts twice")
	}
}

// The client says goodbye where the relay answered, and nowhere when it did not.
func TestGoodbye(t *testing.T) {
	var w *world
	synced(t, func(one *world) {
		w = one
		w.after(time.Second)
		w.wantStates("udp")
		w.asked = nil
	})
	elsewhere := slices.ContainsFunc(w.asked, func(to netip.AddrPort) bool { return to != w.last.Addr })
	if len(w.asked) != byes || elsewhere || w.count(kindBye) != byes || byes < 3 {
		t.Errorf("at the end %v were asked, last %d", w.asked, w.sent[len(w.sent)-1])
	}
	synced(t, func(one *world) {
		w = one
		w.udp, w.tcp = false, false
		w.after(time.Second)
	})
	if w.count(kindBye) != 0 {
		t.Error("goodbye to nobody")
	}
}
