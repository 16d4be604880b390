package relay

import (
	"context"
	"net/netip"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
)

func TestNodesExpire(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b := w.guest(1), w.guest(2)
	atA := place("192.0.2.1:1000")
	w.join(a, atA)
	w.join(b, place("192.0.2.2:1000"))
	w.mustOpen(a, atA, b)
	w.pass(nodeLife / 2)
	w.mustPong(a, a.hello(), atA)
	w.pass(nodeLife/2 + time.Second)
	w.s.expire()
	if st := w.s.Stats(); st.Nodes != 1 || st.Flows != 0 {
		t.Errorf("after the life of one node: %+v", st)
	}
	if _, _, ok := w.s.Session(b.session.id[:]); ok {
		t.Error("a session outlives its node")
	}
	if got := w.mustOpen(a, atA, b); got != 0 {
		t.Error("a flow with a node that is gone")
	}
	w.pass(nodeLife + memoryLife + time.Second)
	w.s.expire()
	if len(w.s.nodes)+len(w.s.sessions)+len(w.s.flows) != 0 {
		t.Errorf("left: %d nodes, %d sessions, %d flows", len(w.s.nodes), len(w.s.sessions), len(w.s.flows))
	}
}

func TestFlowsExpire(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b, c := w.guest(1), w.guest(2), w.guest(3)
	places := map[*guest]*transport{a: place("192.0.2.1:1000"), b: place("192.0.2.2:1000"), c: place("192.0.2.3:1000")}
	for m, p := range places {
		w.join(m, p)
	}
	w.mustOpen(a, places[a], b, c)
	for range 6 {
		w.pass(time.Minute)
		for m, p := range places {
			w.mustPong(m, m.hello(), p)
		}
		w.s.flow(FlowOf(a.key, b.key).number()).touch(w.s.clock())
		w.s.expire()
	}
	if w.s.flow(FlowOf(a.key, b.key).number()) == nil || w.s.flow(FlowOf(a.key, c.key).number()) != nil {
		t.Error("the used flow and the idle one are not told apart")
	}
	if w.s.nodes[a.key].flows != 1 || w.s.nodes[c.key].flows != 0 {
		t.Error("flows are counted wrong")
	}
}

func TestRunExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewServer(ServerConfig{PrivateKey: [32]byte{9}, Verify: func([]byte) (Identity, error) { return Identity{}, nil }})
		if err != nil {
			t.Fatal(err)
		}
		s.nodes[punch.Key{}] = &node{}
		ctx, stop := context.WithCancel(t.Context())
		go func() { _ = s.Run(ctx) }()
		time.Sleep(nodeLife + memoryLife + 2*expireEvery)
		if synctest.Wait(); len(s.nodes) != 0 {
			t.Error("the node is still here")
		}
		stop()
		synctest.Wait()
	})
}

// A node that is on both transports is reached over the one it named last.
func TestTransports(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here := w.guest(1), place("192.0.2.1:1000")
	w.join(m, here)
	late := m.hello()
	l, tls, n := w.connect(m, "192.0.2.1:2000")
	if w.active(m) != tls || w.s.Stats().Streams != 1 {
		t.Fatal("the connection is not used")
	}
	w.mustPong(m, late, here)
	w.mustPong(m, m.trial(), here)
	if w.active(m) != tls {
		t.Error("an old HELLO or a trial chose the transport")
	}
	w.mustPong(m, m.hello(), here)
	if w.active(m).conn != nil {
		t.Error("UDP is not used again")
	}
	w.mustPong(m, m.hello(), tls)
	if w.active(m) != tls {
		t.Error("TLS is not used again")
	}
	l2, tls2, _ := w.connect(m, "192.0.2.1:2001")
	if !l.closed || l2.closed || w.active(m) != tls2 {
		t.Error("the new connection does not replace the old one")
	}
	if reply := w.s.control(n, m.hello(), tls); reply != nil {
		t.Errorf("a replaced connection is answered: % x", reply)
	}
	w.s.leave(n, tls)
	if w.active(m) != tls2 {
		t.Error("the end of a replaced connection matters")
	}
	if w.s.leave(n, tls2); w.active(m) == nil || w.active(m).conn != nil {
		t.Error("a lost connection does not fall back to UDP")
	}
	other := w.guest(2)
	if reply := w.s.control(n, other.hello(), tls2); reply != nil {
		t.Errorf("another's message on a connection: % x", reply)
	}
}

// The address a node no longer speaks from is forgotten, and so is a connection.
func TestTransportsExpire(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here, there := w.guest(1), place("192.0.2.1:1000"), place("192.0.2.1:1001")
	w.join(m, here)
	l, _, n := w.connect(m, "192.0.2.1:2000")
	w.pass(nodeLife / 2)
	m.cookie = w.s.cookies.make(there.addr, w.s.clock())
	w.mustPong(m, m.trial(), there)
	w.pass(nodeLife/2 + time.Second)
	w.s.expire()
	if n.at(&here.name) || !n.at(&there.name) || !l.closed || w.active(m).addr != there.addr {
		t.Error("a silent transport is kept")
	}
}

// A node that moves often has the addresses it used last.
func TestWaysAreBounded(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m := w.guest(1)
	places := []string{"192.0.2.1:1", "192.0.2.1:2", "192.0.2.1:3", "192.0.2.1:4", "192.0.2.1:5", "192.0.2.1:6"}
	for _, p := range places {
		w.pass(time.Second)
		w.join(m, place(p))
	}
	n := w.s.nodes[m.key]
	for i, p := range places {
		if known, want := n.at(&place(p).name), i >= len(places)-maxWays; known != want {
			t.Errorf("%s known %v", p, known)
		}
	}
}

// 10,000 flows fit into 10 MB.
func TestFlowMemory(t *testing.T) {
	const nodes, flows = 200, 10_000
	w := newSite(t, ServerConfig{})
	all := make([]*node, nodes)
	before := heap()
	for i := range all {
		all[i] = &node{key: punch.Key{byte(i), byte(i >> 8), 1}}
		w.s.nodes[all[i].key] = all[i]
	}
	open := 0
	for i, a := range all {
		for _, b := range all[i+1:] {
			if open < flows && w.s.openFlow(a, b.key, FlowOf(a.key, b.key).number(), 1) {
				open++
			}
		}
	}
	used := heap() - before
	if open != flows || len(w.s.flows) != flows {
		t.Fatalf("%d flows", open)
	}
	t.Logf("%d bytes a flow", used/flows)
	if used > 150*flows {
		t.Errorf("%d bytes for %d flows", used, flows)
	}
	runtime.KeepAlive(w)
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestLimits(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m := w.guest(1)
	answered := 0
	for range 2 * challengeBurst {
		if w.say(m.hello(), place("192.0.2.1:1000")) != nil {
			answered++
		}
	}
	if answered != challengeBurst {
		t.Errorf("%d challenges to one network", answered)
	}
	if w.say(m.hello(), place("192.0.2.200:1000")) != nil || w.say(m.hello(), place("198.51.100.1:1000")) == nil {
		t.Error("networks are not told apart")
	}
	for i := range 2 * challengeTotalBurst {
		if w.say(m.hello(), place(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), 1).String())) != nil {
			answered++
		}
	}
	if most := challengeTotalBurst - 1; answered != most {
		t.Errorf("%d challenges in all, not %d", answered, most)
	}
	w.pass(time.Minute)
	here := place("192.0.2.1:1000")
	w.join(m, here)
	answered = 0
	for range 2 * controlBurst {
		if w.say(m.hello(), here) != nil {
			answered++
		}
	}
	if answered != controlBurst {
		t.Errorf("%d messages of one node at once", answered)
	}
}

func TestAdmissionLimit(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here := w.stranger(1), place("192.0.2.1:1000")
	m.cookie = w.s.cookies.make(here.addr, w.s.clock())
	msg, answered := m.admit(), 0
	for range admissionBurst + 50 {
		if w.say(msg, here) != nil {
			answered++
		}
	}
	if answered != admissionBurst {
		t.Errorf("%d admissions looked at", answered)
	}
}

func TestMeter(t *testing.T) {
	r := newRate(1_000_000)
	var m meter
	now, taken := int64(0), 0
	for range 2000 { // 2 s, of which each ms offers what 1.5 ms may carry
		if m.take(&r, now, 1500) {
			taken += 1500
		}
		now += int64(time.Millisecond)
	}
	if burst := int(r.burst / 1000); taken < 2_000_000 || taken > 2_000_000+burst+1500 {
		t.Errorf("%d bytes in 2 s, burst %d", taken, burst)
	}
}

// A node that is known moves to another address while forged sources take all
// challenges there are; what somebody saw of it gets no more than moveBurst.
func TestMoveDuringFlood(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, there := w.guest(1), place("198.51.100.1:1000")
	w.join(m, place("192.0.2.1:1000"))
	for w.s.challenged.take(&w.s.challengeRate, w.s.clock(), 1) {
	}
	if b := w.say(w.stranger(2).hello(), there); b != nil {
		t.Fatal("a stranger is challenged")
	}
	m.cookie = cookie{}
	hello := m.hello()
	answered := 0
	for range 2 * moveBurst {
		if c, ok := parseChallenge(w.say(hello, there)); ok {
			m.cookie = c.cookie
			answered++
		}
	}
	if answered == 0 || answered > moveBurst {
		t.Fatalf("%d challenges", answered)
	}
	w.mustPong(m, m.hello(), there)
}
