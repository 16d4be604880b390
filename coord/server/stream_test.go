package server

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
)

// events reads a stream in the order of a test.
type events struct {
	t testing.TB
	*coord.Stream
	welcome coord.Welcome
	resume  string
}

// follow opens a stream and reads to the end of the netmap.
func (n *node) follow(t testing.TB, server, resume string) (*events, coord.Event) {
	t.Helper()
	e := &events{t: t, Stream: n.stream(t, server, resume)}
	first := e.next()
	if first.Welcome == nil {
		t.Fatalf("a stream begins with %+v", first)
	}
	e.welcome = *first.Welcome
	return e, e.next()
}

func (e *events) next() coord.Event {
	e.t.Helper()
	ev, err := e.Next()
	if err != nil {
		e.t.Fatal(err)
	}
	if ev.Resume != "" {
		e.resume = ev.Resume
	}
	return ev
}

// until reads deltas until one is about a device as wanted.
func (e *events) until(device trust.Key, ok func(coord.Node) bool) coord.Event {
	e.t.Helper()
	for {
		ev := e.next()
		if ev.Delta == nil {
			e.t.Fatalf("not a delta: %+v", ev)
		}
		for _, n := range ev.Delta.Nodes {
			if n.Device == device && ok(n) {
				return ev
			}
		}
	}
}

func online(n coord.Node) bool  { return n.Online }
func offline(n coord.Node) bool { return !n.Online }

func TestStream(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	a, netmap := o.follow(t, o.server, "")
	if netmap.Netmap == nil || !bytes.Equal(netmap.Netmap.State, o.member.State) || len(netmap.Netmap.Nodes) != 1 {
		t.Fatalf("netmap %+v", netmap)
	}
	if n := netmap.Netmap.Nodes[0]; n.Device != public(b.device) || n.Online || !bytes.Equal(n.Cert, b.member.Cert) || !bytes.Equal(n.Cap, b.member.Cap) {
		t.Errorf("%+v", n)
	}
	if len(a.welcome.Session) != sessionLen || len(a.welcome.STUN) != 3 {
		t.Errorf("welcome %+v", a.welcome)
	}
	eb, _ := b.follow(t, o.server, "")
	a.until(public(b.device), online)
	c := o.joined(t, "carl")
	a.until(public(c.device), offline)
	rec := record(t, b, 1, nil)
	if err := eb.Publish(coord.Publish{Record: rec}); err != nil {
		t.Fatal(err)
	}
	a.until(public(b.device), func(n coord.Node) bool { return bytes.Equal(n.Record, rec) })
	_ = eb.Close()
	ev := a.until(public(b.device), offline)
	if !bytes.Equal(ev.Delta.Nodes[0].Record, rec) {
		t.Error("the record of a node that went offline is lost")
	}
}

func record(t testing.TB, n *node, serial uint64, candidates []trust.Endpoint) trust.Document {
	t.Helper()
	doc, err := trust.SignRecord(trust.Record{Device: public(n.device), Serial: serial, Candidates: candidates}, n.device)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// A node hears nothing of itself, neither in the netmap nor in deltas, though
// all receivers share their encoding.
func TestStreamLeavesOutTheReceiver(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	ea, first := o.follow(t, o.server, "")
	eb, firstB := b.follow(t, o.server, "")
	seen := []*coord.Netmap{first.Netmap, firstB.Netmap}
	if err := ea.Publish(coord.Publish{Record: record(t, o.node, 1, nil)}); err != nil {
		t.Fatal(err)
	}
	if err := eb.Publish(coord.Publish{Record: record(t, b, 1, nil)}); err != nil {
		t.Fatal(err)
	}
	recorded := func(n coord.Node) bool { return len(n.Record) > 0 }
	seen = append(seen, ea.until(public(b.device), recorded).Delta, eb.until(public(o.device), recorded).Delta)
	for i, m := range seen {
		self := []*node{o.node, b}[i%2]
		if slices.ContainsFunc(m.Nodes, func(n coord.Node) bool { return n.Device == public(self.device) }) {
			t.Errorf("netmap %d names its receiver", i)
		}
	}
}

func TestResume(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	a, _ := o.follow(t, o.server, "")
	_, _ = b.follow(t, o.server, "")
	a.until(public(b.device), online)
	_ = a.Close()
	c := o.joined(t, "carl")
	a2, ev := o.follow(t, o.server, a.resume)
	if ev.Delta == nil {
		t.Fatalf("resumed with %+v", ev)
	}
	if !slices.ContainsFunc(ev.Delta.Nodes, func(n coord.Node) bool { return n.Device == public(c.device) }) {
		a2.until(public(c.device), offline)
	}
	if _, ev = o.follow(t, o.server, a2.resume); ev.Delta == nil || ev.Resume == "" {
		t.Errorf("resumed at the newest point with %+v", ev)
	}
	for _, old := range []string{"0011223344556677-1", "nonsense", a.resume + "000", strings.Repeat("x", 500)} {
		if _, ev := o.follow(t, o.server, old); ev.Netmap == nil || len(ev.Netmap.Nodes) != 2 {
			t.Errorf("resume %.20q: %+v", old, ev)
		}
	}
}

func TestSignals(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	ea, _ := o.follow(t, o.server, "")
	eb, _ := b.follow(t, o.server, "")
	ea.until(public(b.device), online)
	old := eb
	eb, _ = b.follow(t, o.server, "")    // replaces the first
	for err := error(nil); err == nil; { // the rest of what was queued may come first
		_, err = old.Next()
	}
	sealed := bytes.Repeat([]byte{7}, coord.MaxSignal)
	for _, to := range []trust.Key{public(newKey(t)), public(o.device), public(b.device)} {
		if err := ea.Signal(coord.Signal{Peer: to, Data: sealed}); err != nil {
			t.Fatal(err)
		}
	}
	for {
		ev := eb.next()
		if ev.Signal == nil {
			continue
		}
		if ev.Signal.Peer != public(o.device) || !bytes.Equal(ev.Signal.Data, sealed) {
			t.Errorf("signal from %v", ev.Signal.Peer)
		}
		return
	}
}

// A flood of signals is cut to the rate, and what is too long never arrives.
func TestSignalLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, b := twoMembers(t)
		h.signal(a.device, coord.Signal{Peer: b.device, Data: make([]byte, coord.MaxSignal+1)})
		for range 3 * signalBurst {
			h.signal(a.device, coord.Signal{Peer: b.device, Data: []byte("x")})
		}
		synctest.Wait()
		if n := countSignals(b); n != signalBurst {
			t.Errorf("%d signals of a burst arrived", n)
		}
		time.Sleep(time.Second)
		for range 3 * signalBurst {
			h.signal(a.device, coord.Signal{Peer: b.device, Data: []byte("x")})
		}
		if n := countSignals(b); n != signalBurst+signalRate {
			t.Errorf("%d signals after a second", n)
		}
	})
}

// Big frames cost as much as many small ones.
func TestBigReportsAreSlowedDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, _ := twoMembers(t)
		big := bytes.Repeat([]byte(" "), coord.MaxBody)
		copy(big, "{}")
		began := time.Now()
		for range 20 {
			if err := coord.WriteFrame(a.conn, big); err != nil {
				t.Fatal(err)
			}
		}
		if spent := time.Since(began); spent < 20*time.Second {
			t.Errorf("20 MiB were taken within %v", spent)
		}
	})
}

// Members that flood a slow receiver together do not get it disconnected.
func TestSignalFloodOnSlowReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, _, _ := twoMembers(t)
		slow := newNode(t)
		h.addMember(public(slow.device))
		near, far := net.Pipe()
		defer func() { _ = far.Close() }()
		if !h.attach(&stream{device: public(slow.device), conn: near}, coord.Welcome{}, "") {
			t.Fatal("not attached")
		}
		synctest.Wait() // the first frames are being written
		for range 2 * maxQueue / signalBurst {
			sender := newNode(t)
			h.addMember(public(sender.device))
			for range signalBurst {
				h.signal(public(sender.device), coord.Signal{Peer: public(slow.device), Data: []byte("x")})
			}
		}
		b := make([]byte, 1)
		if _, err := far.Read(b); err != nil {
			t.Errorf("the receiver was disconnected: %v", err)
		}
	})
}

func TestRevokedNodeIsCutOff(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	ea, _ := o.follow(t, o.server, "")
	eb, _ := b.follow(t, o.server, "")
	ea.until(public(b.device), online)
	q := o.revocation(t, public(b.device), o.signer)
	if err := o.dial(t, o.server).Revoke(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	var removed []trust.Key
	var documents []trust.Document
	for len(removed) == 0 || len(documents) == 0 {
		ev := ea.next()
		removed, documents = append(removed, ev.Delta.Removed...), append(documents, ev.Delta.Revocations...)
	}
	if removed[0] != public(b.device) || !bytes.Equal(documents[0], q.Revocation) {
		t.Errorf("removed %v", removed)
	}
	for err := error(nil); err == nil; { // the rest of what was queued may come first
		_, err = eb.Next()
	}
	_, err := b.dial(t, o.server).Stream(t.Context(), "")
	wantCode(t, err, coord.CodeRevoked)
	if _, ev := o.follow(t, o.server, ""); len(ev.Netmap.Nodes) != 0 || len(ev.Netmap.Revocations) != 1 {
		t.Errorf("netmap afterwards %+v", ev.Netmap)
	}
}

func TestRecordRules(t *testing.T) {
	n := newNode(t)
	device := public(n.device)
	clock := time.Now()
	tok := newTokens(func() time.Time { return clock })
	seen, other := addr("203.0.113.5:4000"), addr("203.0.113.5:4001")
	foreign := addr("198.51.100.9:53")
	token := tok.make(device, seen)
	point := func(k punch.CandidateType, a netip.AddrPort) trust.Endpoint {
		return trust.Endpoint{Addr: a, Type: uint8(k)}
	}
	srflx := point(punch.ServerReflexive, seen)
	six := func(last string) trust.Endpoint { return point(punch.Host, addr("[2001:db8::"+last+"]:9")) }
	for name, c := range map[string]struct {
		candidates []trust.Endpoint
		tokens     [][]byte
		ok, relay  bool // for a node, for a relay
	}{
		"none":                      {nil, nil, true, true},
		"observed":                  {[]trust.Endpoint{srflx}, [][]byte{token}, true, true},
		"observed and mapped there": {[]trust.Endpoint{srflx, point(punch.PortMapped, other)}, [][]byte{token}, true, true},
		"two global hosts":          {[]trust.Endpoint{six("1"), six("2")}, nil, true, true},
		"three global hosts":        {[]trust.Endpoint{six("1"), six("2"), six("3")}, nil, false, false},
		"no token":                  {[]trust.Endpoint{srflx}, nil, false, false},
		"token for another port":    {[]trust.Endpoint{point(punch.ServerReflexive, other)}, [][]byte{token}, false, false},
		"token of another device":   {[]trust.Endpoint{srflx}, [][]byte{tok.make(public(newKey(t)), seen)}, false, false},
		"token of another server":   {[]trust.Endpoint{srflx}, [][]byte{newTokens(time.Now).make(device, seen)}, false, false},
		"a token too many":          {[]trust.Endpoint{srflx}, [][]byte{token, token}, false, false},
		"victim as mapped":          {[]trust.Endpoint{srflx, point(punch.PortMapped, foreign)}, [][]byte{token}, false, true},
		"mapped on loopback":        {[]trust.Endpoint{point(punch.PortMapped, addr("127.0.0.1:53"))}, nil, false, false},
		"mapped on a link":          {[]trust.Endpoint{point(punch.PortMapped, addr("169.254.169.254:80"))}, nil, false, false},
		"mapped in a LAN":           {[]trust.Endpoint{point(punch.PortMapped, addr("192.168.1.2:443"))}, nil, false, true},
		"three mapped":              {[]trust.Endpoint{srflx, point(punch.PortMapped, other), point(punch.PortMapped, addr("203.0.113.5:3")), point(punch.PortMapped, addr("203.0.113.5:4"))}, [][]byte{token}, false, false},
		"victim as host":            {[]trust.Endpoint{point(punch.Host, foreign)}, nil, false, false},
		"private host":              {[]trust.Endpoint{point(punch.Host, addr("192.168.1.2:9"))}, nil, false, false},
		"unique local host":         {[]trust.Endpoint{point(punch.Host, addr("[fd00::1]:9"))}, nil, false, false},
		"peer-reflexive":            {[]trust.Endpoint{point(punch.PeerReflexive, seen)}, nil, false, false},
		"unknown type":              {[]trust.Endpoint{point(99, seen)}, nil, false, false},
	} {
		for role, ok := range map[trust.Role]bool{trust.RoleNode: c.ok, trust.RoleRelay: c.relay} {
			_, err := tok.checkRecord(publisher{device, role}, coord.Publish{Record: record(t, n, 1, c.candidates), Tokens: c.tokens})
			if (err == nil) != ok || !ok && codeOf(err) != coord.CodeBadCandidates {
				t.Errorf("%s of a %v: %v", name, role, err)
			}
		}
	}
	doc := record(t, n, 1, []trust.Endpoint{srflx})
	if _, err := tok.checkRecord(publisher{public(newKey(t)), trust.RoleNode}, coord.Publish{Record: doc, Tokens: [][]byte{token}}); err == nil {
		t.Error("a record of another device was taken")
	}
	clock = clock.Add((tokenLife - 1) * time.Minute)
	if !tok.valid(token, device, seen) {
		t.Error("a token of nine minutes is refused")
	}
	clock = clock.Add(2 * time.Minute)
	if tok.valid(token, device, seen) {
		t.Error("a token of eleven minutes is taken")
	}
}

// A node is told that its record was refused, by an event old ones ignore.
func TestRecordSerial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, _ := twoMembers(t)
		for _, c := range []struct {
			serial uint64
			want   coord.Code
		}{{5, ""}, {4, coord.CodeBadCandidates}, {5, ""}, {6, ""}} {
			err := h.publish(a.device, coord.Publish{Record: record(t, a.node, c.serial, nil)})
			if codeOf(err) != c.want {
				t.Errorf("serial %d: %v", c.serial, err)
			}
		}
	})
}
