package relay

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/punch"
)

func TestAdmission(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here, there := w.guest(1), place("192.0.2.1:1000"), place("198.51.100.1:1000")
	if w.say(m.hello(), here); len(w.s.nodes) != 0 {
		t.Fatal("a HELLO is remembered")
	}
	w.join(m, here)
	m.cookie = cookie{}
	w.mustPong(m, m.hello(), here)
	c, ok := parseChallenge(w.say(m.hello(), there))
	if !ok || w.active(m).addr != here.addr {
		t.Fatal("a node moves without a cookie")
	}
	m.cookie = c.cookie
	w.mustPong(m, m.hello(), there)
	if w.active(m).addr != there.addr {
		t.Error("the node did not move")
	}
	if st := w.s.Stats(); st.Nodes != 1 || st.Streams != 0 {
		t.Errorf("%+v", st)
	}
	key, device, ok := w.s.Session(m.session.id[:])
	if !ok || [32]byte(key) != m.session.mac || device != m.public() {
		t.Error("the session is not known")
	}
	if _, _, ok = w.s.Session([]byte("too short")); ok {
		t.Error("any session is known")
	}
}

func TestAnswersAreFew(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, n := w.guest(1), w.guest(2)
	w.join(m, place("192.0.2.1:1000"))
	w.join(n, place("192.0.2.2:1000"))
	spend := func(user []byte) (given int) {
		for range 3 * answerBurst {
			if w.s.Spend(user) {
				given++
			}
		}
		return given
	}
	if got := spend(m.session.id[:]); got != answerBurst {
		t.Errorf("%d answers at once", got)
	}
	if got := spend(n.session.id[:]); got != answerBurst {
		t.Errorf("%d answers to another node", got)
	}
	w.pass(2 * time.Second)
	if got := spend(m.session.id[:]); got != 2*answersPerNode {
		t.Errorf("%d answers after two seconds", got)
	}
	if spend(nil) != 0 || spend(make([]byte, len(sessionID{}))) != 0 {
		t.Error("answers to nobody")
	}
}

func TestVerifiedOnce(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here := w.guest(1), place("192.0.2.1:1000")
	w.join(m, here)
	w.mustPong(m, m.admit(), here)
	if w.looks != 1 {
		t.Errorf("%d looks at the same credentials", w.looks)
	}
	w.pass(verifiedFor + time.Second)
	w.s.expire()
	w.join(m, here)
	if w.looks != 2 {
		t.Errorf("%d looks after a while", w.looks)
	}
}

// What was recorded of an admission is worth nothing, wherever it is sent from,
// and also once the node was forgotten.
func TestAdmissionReplay(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here, there := w.guest(1), place("192.0.2.1:1000"), place("198.51.100.1:1000")
	w.join(m, here)
	recorded, old := m.admit(), m.hello()
	w.mustPong(m, recorded, here)
	if reply := w.say(recorded, here); reply != nil {
		t.Errorf("answered with % x", reply)
	}
	if _, ok := parseChallenge(w.say(recorded, there)); !ok || w.active(m).addr != here.addr {
		t.Error("a replayed admission moves the node")
	}
	w.mustPong(m, m.hello(), here)
	if reply := w.say(old, here); reply != nil {
		t.Errorf("an old HELLO is answered with % x", reply)
	}
	w.pass(nodeLife + time.Second)
	w.s.expire()
	if reply := w.say(recorded, here); reply != nil || w.s.Stats().Nodes != 0 {
		t.Errorf("a replayed admission brings a node back: % x", reply)
	}
	if got := w.s.Stats().Drops.Replayed; got != 3 {
		t.Errorf("%d replays counted", got)
	}
	m.counter += 10
	w.join(m, here)
}

// badAdmission is an ADMIT that is wrong in one way, and what it gets.
type badAdmission struct {
	name string
	by   *guest
	make func(m *guest) []byte
	want kind
}

// badAdmissions are made by a member at one place, but for what is wrong.
func badAdmissions(w *site, m, other *guest, there netip.AddrPort) []badAdmission {
	return []badAdmission{
		{"foreign credentials", w.stranger(3), (*guest).admit, kindRefused},
		{"credentials of another node", m, func(m *guest) []byte {
			a := m.admission()
			a.credentials = []byte(other.credentials)
			return m.build(a)
		}, kindRefused},
		{"signature of another device", m, func(m *guest) []byte {
			forger := *m
			forger.device = other.device
			return forger.admit()
		}, kindRefused},
		{"signature for another relay", m, func(m *guest) []byte {
			b, _ := m.admission().build(&m.session, [32]byte{7}, m.device)
			return b
		}, kindRefused},
		{"another's MAC key", m, func(m *guest) []byte {
			forger := *m
			forger.session.mac = other.session.mac
			return forger.admit()
		}, 0},
		{"another's session", m, func(m *guest) []byte {
			forger := *m
			forger.session.id = other.session.id
			return forger.admit()
		}, 0},
		{"key of low order", m, func(m *guest) []byte {
			a := m.admission()
			a.node = punch.Key{}
			return m.build(a)
		}, 0},
		{"no cookie", m, func(m *guest) []byte {
			a := m.admission()
			a.cookie = cookie{}
			return m.build(a)
		}, kindChallenge},
		{"cookie of another port", m, func(m *guest) []byte {
			a := m.admission()
			a.cookie = w.s.cookies.make(there, w.s.clock())
			return m.build(a)
		}, kindChallenge},
		{"cookie of a while ago", m, func(m *guest) []byte {
			b := m.admit()
			w.pass(2 * cookieAge)
			return b
		}, kindChallenge},
		{"damaged", m, func(m *guest) []byte { return m.admit()[:admitFixed] }, 0},
	}
}

func TestAdmissionRefused(t *testing.T) {
	w := newSite(t, ServerConfig{})
	here, there := place("192.0.2.1:1000"), place("192.0.2.1:1001")
	m, other := w.guest(1), w.guest(2)
	for _, c := range badAdmissions(w, m, other, there.addr) {
		t.Run(c.name, func(t *testing.T) {
			c.by.cookie = w.s.cookies.make(here.addr, w.s.clock())
			reply := w.say(c.make(c.by), here)
			if kindOf(reply) != c.want {
				t.Errorf("answer % x", reply)
			}
			if r, ok := parseRefused(reply); ok && (r.reason != refusedStranger || !c.by.session.sealed(reply)) {
				t.Errorf("refused with %d", r.reason)
			}
			if len(w.s.nodes) != 0 {
				t.Error("it is remembered")
			}
		})
	}
}

func TestOpen(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b, c := w.guest(1), w.guest(2), w.guest(3)
	atA, atB := place("192.0.2.1:1000"), place("192.0.2.2:1000")
	w.join(a, atA)
	if got := w.mustOpen(a, atA, b, c, a); got != 0 || len(w.s.flows) != 0 {
		t.Errorf("flows %b to nodes that are not here", got)
	}
	w.join(b, atB)
	if got := w.mustOpen(a, atA, c, b); got != 0b10 || len(w.s.flows) != 1 {
		t.Errorf("flows %b", got)
	}
	if got := w.mustOpen(b, atB, a); got != 1 || len(w.s.flows) != 1 {
		t.Errorf("flows %b from the other side", got)
	}
	a.cookie = w.s.cookies.make(atB.addr, w.s.clock())
	if reply := w.say(a.open(b), atB); reply != nil {
		t.Errorf("an OPEN from an address that is not validated: % x", reply)
	}
	again := a.open(b)
	w.say(again, atA)
	if reply := w.say(again, atA); reply != nil {
		t.Errorf("a replayed OPEN: % x", reply)
	}
	forged := a.open(b)
	forged[len(forged)-1]++
	if reply := w.say(forged, atA); reply != nil {
		t.Errorf("a forged OPEN: % x", reply)
	}
	if reply := w.say(c.open(b), atA); reply != nil {
		t.Errorf("an OPEN of a node that is not here: % x", reply)
	}
}

func TestTablesAreBounded(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b, late := w.guest(1), w.guest(2), w.guest(3)
	atA, atLate := place("192.0.2.1:1000"), place("192.0.2.3:1000")
	w.join(a, atA)
	w.join(b, place("192.0.2.2:1000"))
	w.s.nodes[a.key].flows = maxNodeFlows
	if got := w.mustOpen(a, atA, b); got != 0 {
		t.Error("a node has more flows than it may")
	}
	w.s.nodes[a.key].flows = 0
	for i := len(w.s.nodes); i < maxNodes; i++ {
		k := punch.Key{1, byte(i >> 8), byte(i)}
		w.s.nodes[k] = &node{key: k}
	}
	late.cookie = w.s.cookies.make(atLate.addr, w.s.clock())
	if r, ok := parseRefused(w.say(late.admit(), atLate)); !ok || r.reason != refusedFull {
		t.Errorf("one node too many: %+v %v", r, ok)
	}
	w.mustPong(a, a.admit(), atA)
	for i := len(w.s.flows); i < maxFlows; i++ {
		w.s.flows[uint64(i)] = nil
	}
	if got := w.mustOpen(a, atA, b); got != 0 {
		t.Error("one flow too many")
	}
}

// A relay on somebody's own line serves only so many, and only so fast.
func TestTablesAreBoundedLower(t *testing.T) {
	w := newSite(t, ServerConfig{MaxNodes: 3, MaxFlows: 1})
	guests := []*guest{w.guest(1), w.guest(2), w.guest(3), w.guest(4)}
	for i, g := range guests[:3] {
		w.join(g, place(fmt.Sprintf("192.0.2.%d:1000", 1+i)))
	}
	last, at := guests[3], place("192.0.2.4:1000")
	last.cookie = w.s.cookies.make(at.addr, w.s.clock())
	if r, ok := parseRefused(w.say(last.admit(), at)); !ok || r.reason != refusedFull {
		t.Errorf("one node too many: %+v %v", r, ok)
	}
	for i, want := range []uint32{1, 0} {
		if got := w.mustOpen(guests[0], place("192.0.2.1:1000"), guests[1+i]); got != want {
			t.Errorf("flow %d: %b, want %b", i, got, want)
		}
	}
}

func TestTotalRate(t *testing.T) {
	w := newSite(t, ServerConfig{TotalRate: 1 << 20})
	a, b, c := w.guest(1), w.guest(2), w.guest(3)
	at := place("192.0.2.1:1000")
	w.join(a, at)
	w.join(b, place("192.0.2.2:1000"))
	w.join(c, place("192.0.2.3:1000"))
	w.mustOpen(a, at, b, c)
	pay := func(g *guest) int {
		f := w.s.flows[FlowOf(a.key, g.key).number()]
		sent := 0
		for range 2000 {
			if w.s.pay(f, 0, 1000, w.s.clock()) {
				sent += 1000
			}
		}
		return sent
	}
	if one, other := pay(b), pay(c); one < 100_000 || one > 300_000 || other != 0 {
		t.Errorf("%d and %d bytes at once by %d a second in all", one, other, 1<<20)
	}
}

func TestRetain(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b, c := w.guest(1), w.guest(2), w.guest(3)
	atA, atB := place("192.0.2.1:1000"), place("192.0.2.2:1000")
	w.join(a, atA)
	w.join(b, atB)
	l, _, n := w.connect(c, "192.0.2.3:1000")
	w.mustOpen(a, atA, b, c)
	gone := c.public()
	w.s.Retain(func(d [32]byte) bool { return d != gone })
	if st := w.s.Stats(); st.Nodes != 2 || st.Flows != 1 || !l.closed || n.active.Load() != nil {
		t.Errorf("%+v, closed %v", st, l.closed)
	}
	if w.s.nodes[a.key].flows != 1 {
		t.Errorf("%d flows counted", w.s.nodes[a.key].flows)
	}
	b.cookie = w.s.cookies.make(atB.addr, w.s.clock())
	w.mustPong(b, b.admit(), atB)
	w.remove(b)
	w.mustPong(b, b.admit(), atB) // what was verified is kept …
	gone = b.public()
	w.s.Retain(func(d [32]byte) bool { return d != gone })
	if r, ok := parseRefused(w.say(b.admit(), atB)); !ok || r.reason != refusedStranger { // … but not for ever
		t.Error("a withdrawn device is admitted")
	}
}

// A device withdrawn while its credentials are being verified is not admitted by
// what was true before.
func TestRetainDuringAdmission(t *testing.T) {
	w := newSite(t, ServerConfig{})
	m, here := w.guest(1), place("192.0.2.1:1000")
	m.cookie = w.s.cookies.make(here.addr, w.s.clock())
	w.onVerify = func() {
		w.remove(m)
		w.onVerify = nil
		w.s.Retain(func(d [32]byte) bool { return d != m.public() })
	}
	if r, ok := parseRefused(w.say(m.admit(), here)); !ok || r.reason != refusedStranger || len(w.s.nodes) != 0 {
		t.Errorf("admitted: %+v %v", r, ok)
	}
	if w.looks != 2 {
		t.Errorf("verified %d times", w.looks)
	}
}

// Whoever judges the devices may take long; others are served meanwhile, and
// what was verified before counts no more.
func TestRetainWhileServing(t *testing.T) {
	w := newSite(t, ServerConfig{})
	a, b := w.guest(1), w.guest(2)
	atA := place("192.0.2.1:1000")
	w.join(a, atA)
	w.remove(a)
	done := make(chan struct{})
	var replies [][]byte
	w.s.Retain(func([32]byte) bool {
		if replies != nil {
			return false
		}
		replies = [][]byte{}
		go func() {
			defer close(done)
			w.join(b, place("192.0.2.2:1000"))
			replies = append(replies, w.say(a.admit(), atA))
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("nobody is admitted meanwhile")
		}
		return false
	})
	<-done
	if r, ok := parseRefused(replies[0]); !ok || r.reason != refusedStranger {
		t.Error("a withdrawn device was admitted meanwhile")
	}
	if w.s.nodes[a.key] != nil || w.s.nodes[b.key] == nil {
		t.Errorf("nodes: %v", w.s.nodes)
	}
}

// Strangers fill no disk.
func TestRefusalsInLog(t *testing.T) {
	var text bytes.Buffer
	w := newSite(t, ServerConfig{Log: slog.New(slog.NewTextHandler(&text, nil))})
	m, here := w.stranger(1), place("192.0.2.1:1000")
	m.cookie = w.s.cookies.make(here.addr, w.s.clock())
	refuse := func(times int) {
		for range times {
			if _, ok := parseRefused(w.say(m.admit(), here)); !ok {
				t.Fatal("not refused")
			}
		}
	}
	refuse(50)
	w.pass(time.Second)
	refuse(50)
	if n := strings.Count(text.String(), "node refused"); n != 2 {
		t.Errorf("%d lines in the log", n)
	}
}

func TestNewServerRefuses(t *testing.T) {
	if _, err := NewServer(ServerConfig{}); err == nil {
		t.Error("a server that verifies nothing")
	}
	s, err := NewServer(ServerConfig{PrivateKey: [32]byte{1}, Verify: func([]byte) (Identity, error) { return Identity{}, nil }})
	if err != nil || len(s.PublicKey()) != ed25519.PublicKeySize {
		t.Error(err)
	}
}

func TestCookieAges(t *testing.T) {
	c, other := newCookies(), newCookies()
	here, there := place("192.0.2.1:1000").addr, place("192.0.2.1:1001").addr
	for start := int64(0); start < 600*int64(cookieAge); start += 99 * int64(cookieAge) {
		k := c.make(here, start)
		for _, after := range []time.Duration{0, cookieAge - 1, cookieAge, 2*cookieAge - 1, 2 * cookieAge, 256 * cookieAge} {
			if got, want := c.valid(k, here, start+int64(after)), after < 2*cookieAge; got != want {
				t.Errorf("after %v valid %v", after, got)
			}
		}
		if c.valid(k, there, start) || other.valid(k, here, start) || c.valid(cookie{k[0]}, here, start) {
			t.Error("a cookie is valid elsewhere")
		}
	}
}

// One node cannot have what all may send together.
func TestShareOfTotal(t *testing.T) {
	w := newSite(t, ServerConfig{TotalRate: 1 << 20})
	guests := []*guest{w.guest(1), w.guest(2), w.guest(3), w.guest(4)}
	for i, g := range guests {
		w.join(g, place(fmt.Sprintf("192.0.2.%d:1000", 1+i)))
	}
	w.mustOpen(guests[0], place("192.0.2.1:1000"), guests[1])
	w.mustOpen(guests[2], place("192.0.2.3:1000"), guests[3])
	greedy := w.s.flows[FlowOf(guests[0].key, guests[1].key).number()]
	modest := w.s.flows[FlowOf(guests[2].key, guests[3].key).number()]
	got, missed := [2]int{}, 0
	for range 10_000 { // ms
		w.pass(time.Millisecond)
		for range 20 {
			if w.s.pay(greedy, 0, 1000, w.s.clock()) {
				got[0] += 1000
			}
		}
		if w.s.pay(modest, 0, 200, w.s.clock()) {
			got[1] += 200
		} else {
			missed++
		}
	}
	if all := got[0] + got[1]; missed > 0 || all < 10<<20*9/10 || all > 10<<20*11/10 {
		t.Errorf("%d bytes beside %d, of which %d datagrams were dropped", got[0], got[1], missed)
	}
}

// One node cannot open all flows that there may be.
func TestFlowsOfOne(t *testing.T) {
	w := newSite(t, ServerConfig{MaxFlows: 8})
	var guests []*guest
	at := func(i int) *transport { return place(fmt.Sprintf("192.0.2.%d:1000", 1+i)) }
	for i := range 12 {
		guests = append(guests, w.guest(1+i))
		w.join(guests[i], at(i))
	}
	open := 0
	for _, g := range guests[1:] {
		if w.mustOpen(guests[0], at(0), g) == 1 {
			open++
		}
	}
	if open != 8/halvesPart {
		t.Errorf("one node opened %d of 8 flows", open)
	}
	if w.mustOpen(guests[1], at(1), guests[0]) != 1 || w.mustOpen(guests[0], at(0), guests[5]) != 1 {
		t.Error("what the other end asked for, too, counts against the first")
	}
	if w.mustOpen(guests[7], at(7), guests[8]) != 1 {
		t.Error("others have no room")
	}
	w.s.mu.Lock()
	for header, f := range w.s.flows {
		w.s.removeFlow(header, f)
	}
	for _, n := range w.s.nodes {
		if n.flows != 0 || n.halves != 0 {
			t.Errorf("%d flows and %d halves are left", n.flows, n.halves)
		}
	}
	if w.s.busy != 0 {
		t.Errorf("%d nodes with flows", w.s.busy)
	}
	w.s.mu.Unlock()
}

// Nodes that are gone take no place from others.
func TestGoneNodesTakeNoPlace(t *testing.T) {
	w := newSite(t, ServerConfig{MaxNodes: 2})
	a, b, late := w.guest(1), w.guest(2), w.guest(3)
	w.join(a, place("192.0.2.1:1000"))
	w.join(b, place("192.0.2.2:1000"))
	w.s.mu.Lock()
	w.s.lose(w.s.nodes[a.key])
	w.s.mu.Unlock()
	w.join(late, place("192.0.2.3:1000"))
	at := place("192.0.2.1:1000")
	a.cookie = w.s.cookies.make(at.addr, w.s.clock())
	if r, ok := parseRefused(w.say(a.admit(), at)); !ok || r.reason != refusedFull {
		t.Errorf("the one that returns: %+v %v", r, ok)
	}
}
