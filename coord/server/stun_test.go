package server

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pion/stun/v2"

	"overlay/coord/trust"
	"overlay/punch"
)

// stunWorld is a stunServer that knows one session.
func stunWorld() (*stunServer, sessionID, []byte) {
	id, key := sessionID{1, 2, 3}, bytes.Repeat([]byte{9}, exporterSize)
	clock := time.Now() // stands still, so that no limit refills
	now := func() time.Time { return clock }
	open := &streams{sessions: map[sessionID]*stream{id: {device: trust.Key{7}, key: key}}}
	relayed := func(user []byte) ([]byte, [32]byte, bool) {
		return key, trust.Key{7}, bytes.Equal(user, relayUser())
	}
	return &stunServer{
		open: open, relayed: relayed, tokens: newTokens(now),
		limit: newBuckets[netip.Prefix](stunPerSource, stunBurst, now), members: newBuckets[trust.Key](stunPerMember, stunBurst, now),
	}, id, key
}

// relayUser names a session at the relay.
func relayUser() []byte { return []byte("at-relay") }

func binding(t testing.TB, setters ...stun.Setter) []byte {
	t.Helper()
	m, err := stun.Build(append([]stun.Setter{stun.TransactionID, stun.BindingRequest}, setters...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m.Raw
}

// maxDatagram is more than a request may have, in bytes.
const maxDatagram = 1500

// here is the address that is asked.
func here() netip.AddrPort { return netip.MustParseAddrPort("192.0.2.1:3478") }

// padding makes a request long enough for the longest answer.
func padding() stun.Setter {
	return stun.RawAttribute{Type: punch.AttrPadding, Value: make([]byte, punch.ServerAnswerSize)}
}

func TestSTUNAnswers(t *testing.T) {
	s, id, key := stunWorld()
	user := stun.NewUsername(string(id[:]))
	mac := stun.MessageIntegrity(key)
	for name, c := range map[string]struct {
		request       []byte
		answer, token bool
	}{
		"plain":                  {binding(t), true, false},
		"session":                {binding(t, user, padding(), mac), true, true},
		"session of the relay":   {binding(t, stun.NewUsername(string(relayUser())), padding(), mac), true, true},
		"its session, wrong MAC": {binding(t, stun.NewUsername(string(relayUser())), padding(), stun.MessageIntegrity("x")), false, false},
		"another one's":          {binding(t, stun.NewUsername("at-other"), padding(), mac), false, false},
		"session, too short":     {binding(t, user, mac), false, false},
		"session, no MAC":        {binding(t, user, padding()), false, false},
		"session, wrong MAC":     {binding(t, user, padding(), stun.MessageIntegrity("x")), false, false},
		"unknown session":        {binding(t, stun.NewUsername("0123456789abcdef"), padding(), mac), false, false},
		"short session":          {binding(t, stun.NewUsername("x"), padding(), mac), false, false},
		"a response":             {must(stun.Build(stun.TransactionID, stun.BindingSuccess)).Raw, false, false},
		"too long":               {binding(t, stun.RawAttribute{Type: punch.AttrPadding, Value: make([]byte, maxDatagram)}), false, false},
		"cut short":              {binding(t, padding())[:40], false, false},
		"not STUN":               {[]byte("hello, is anybody there? hello"), false, false},
		"nothing":                {nil, false, false},
		"allocate (RFC 8656)":    {must(stun.Build(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest))).Raw, false, false},
		"changed after signed":   {flip(binding(t, user, padding(), mac), 60), false, false},
	} {
		for _, from := range []netip.AddrPort{addr("203.0.113.7:4444"), addr("[2001:db8::7]:4444"), addr("[::ffff:203.0.113.7]:4444")} {
			got := s.answer(c.request, from, here())
			if (got != nil) != c.answer {
				t.Errorf("%s from %v: answer of %d bytes", name, from, len(got))
			}
			if got != nil {
				checkAnswer(t, s, c.request, got, from, c.token, key)
			}
		}
	}
}

func must(m *stun.Message, err error) *stun.Message {
	if err != nil {
		panic(err)
	}
	return m
}

func flip(b []byte, i int) []byte {
	b[i] ^= 1
	return b
}

func checkAnswer(t *testing.T, s *stunServer, request, answer []byte, from netip.AddrPort, token bool, key []byte) {
	t.Helper()
	m := &stun.Message{Raw: answer}
	if err := m.Decode(); err != nil {
		t.Fatal(err)
	}
	var mapped stun.XORMappedAddress
	if err := mapped.GetFrom(m); err != nil {
		t.Fatal(err)
	}
	got, _ := netip.AddrFromSlice(mapped.IP)
	seen := netip.AddrPortFrom(got.Unmap(), uint16(mapped.Port))
	if seen != netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) || !bytes.Equal(m.TransactionID[:], request[8:20]) {
		t.Errorf("answer says %v for %v", seen, from)
	}
	value, err := m.Get(punch.AttrToken)
	if (err == nil) != token {
		t.Fatalf("token: %v", err)
	}
	if !token {
		return
	}
	if len(answer) > len(request) || len(value) > punch.MaxToken {
		t.Errorf("%d bytes answer %d bytes, token of %d", len(answer), len(request), len(value))
	}
	if err := stun.MessageIntegrity(key).Check(m); err != nil {
		t.Error(err)
	}
	if !s.tokens.valid(value, trust.Key{7}, seen) {
		t.Error("the token proves nothing")
	}
}

// Plain requests are limited per network; those of nodes are not among them.
func TestSTUNLimit(t *testing.T) {
	s, id, key := stunWorld()
	plain, answered := binding(t), 0
	for i := range 3 * stunBurst {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 1000)
		if s.answer(plain, from, here()) != nil {
			answered++
		}
	}
	if answered != stunBurst {
		t.Errorf("%d of one network answered at once", answered)
	}
	if s.answer(plain, addr("198.51.100.1:1000"), here()) == nil && s.answer(plain, addr("192.0.2.1:1000"), here()) == nil {
		t.Error("other networks wait for it")
	}
	signed := binding(t, stun.NewUsername(string(id[:])), padding(), stun.MessageIntegrity(key))
	if s.answer(signed, addr("203.0.113.1:1000"), here()) == nil {
		t.Error("a node of that network gets no answer")
	}
}

// A member has no more answers sent in a second than a node needs, wherever its
// requests say that they come from; what others ask for from there is not affected.
func TestSTUNLimitOfMember(t *testing.T) {
	s, id, key := stunWorld()
	other := sessionID{4}
	s.open.sessions[other] = &stream{device: trust.Key{8}, key: key}
	ask := func(user []byte) func(from netip.AddrPort) bool {
		b := binding(t, stun.NewUsername(string(user)), padding(), stun.MessageIntegrity(key))
		return func(from netip.AddrPort) bool { return s.answer(b, from, here()) != nil }
	}
	stream, relayed := ask(id[:]), ask(relayUser())
	forged := binding(t, stun.NewUsername(string(other[:])), padding(), stun.MessageIntegrity("guess"))
	answered := 0
	for i := range 3 * stunBurst {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(i), 113}), 1000)
		if stream(from) {
			answered++
		}
		s.answer(forged, from, here())
	}
	if answered != stunBurst {
		t.Errorf("%d answers to one member at once", answered)
	}
	if relayed(addr("203.0.113.1:1000")) {
		t.Error("its session at the relay counts by itself")
	}
	for i := range stunBurst {
		if !ask(other[:])(addr("203.0.0.113:1000")) {
			t.Fatalf("another member, %d requests: no answer", i+1)
		}
	}
}

// All three ports answer, from the address that was asked, also when the server
// listens on all of them; the token of a real stream lets a record through.
func TestSTUNOnSockets(t *testing.T) {
	s, err := Open(Config{Listen: ":0", STUN: ":0", Public: "127.0.0.1", StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, s)
	o := found(t, r)
	e, _ := o.follow(t, o.server, "")
	if len(e.welcome.STUN) != 3 {
		t.Fatalf("ports %v", e.welcome.STUN)
	}
	request := binding(t, stun.NewUsername(string(e.welcome.Session)), padding(), stun.MessageIntegrity(e.STUNKey()))
	hosts := []string{"127.0.0.1", "127.0.0.2"}
	if six, err := net.ListenPacket("udp6", "[::1]:0"); err == nil {
		_ = six.Close()
		hosts = append(hosts, "::1")
	}
	for _, host := range hosts {
		for _, port := range e.welcome.STUN {
			to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(host), port))
			c, err := net.DialUDP("udp", nil, to) // takes answers from that address only
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			_, _ = c.Write(request)
			b := make([]byte, maxDatagram)
			n, err := c.Read(b)
			if err != nil {
				t.Fatalf("%v: %v", to, err)
			}
			checkSocketAnswer(t, s, o, b[:n], c.LocalAddr().(*net.UDPAddr).AddrPort())
			_ = c.Close()
		}
	}
}

// A request that wants its answer from another port gets it, as long as it is not
// longer; one that wants it from another address is told that there is none.
func TestSTUNChange(t *testing.T) {
	s, err := Open(Config{Listen: "127.0.0.1:0", STUN: ":0", Public: "127.0.0.1", StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, s)
	o := found(t, r)
	e, _ := o.follow(t, o.server, "")
	id := [stun.TransactionIDSize]byte{7}
	node := punch.Server{Username: e.welcome.Session, Key: e.STUNKey()}
	for name, c := range map[string]struct {
		who    punch.Server
		change punch.Change
		want   stun.MessageType
		other  bool
	}{
		"plain":         {punch.Server{}, punch.Change{Port: true}, stun.BindingSuccess, true},
		"node":          {node, punch.Change{Port: true}, stun.BindingSuccess, true},
		"no change":     {node, punch.Change{}, stun.BindingSuccess, false},
		"plain address": {punch.Server{}, punch.Change{Address: true}, stun.BindingError, false},
		"both":          {node, punch.Change{Address: true, Port: true}, stun.BindingError, false},
	} {
		b, err := c.who.ChangeRequest(id, c.change)
		if err != nil {
			t.Fatal(err)
		}
		for _, port := range e.welcome.STUN {
			to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
			answer, from := exchange(t, b, to)
			m := &stun.Message{Raw: answer}
			if err := m.Decode(); err != nil || m.Type != c.want || m.TransactionID != id {
				t.Errorf("%s: answer %v, %v", name, m, err)
			}
			if from.Addr() != to.Addr() || (from.Port() != port) != c.other || len(answer) > len(b) {
				t.Errorf("%s: %d bytes at %v answered with %d from %v", name, len(b), to, len(answer), from)
			}
		}
	}
}

// exchange sends a request and takes the answer from wherever it comes.
func exchange(t *testing.T, b []byte, to netip.AddrPort) ([]byte, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.WriteToUDPAddrPort(b, to); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxDatagram)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatalf("%v: %v", to, err)
	}
	return buf[:n], from
}

// A request that is shorter than the answer is not answered from elsewhere, nor
// told why.
func TestSTUNChangeTooShort(t *testing.T) {
	s, _, _ := stunWorld()
	for _, c := range []punch.Change{{Port: true}, {Address: true}} {
		if got := s.answer(binding(t, c), addr("203.0.113.7:4444"), here()); got != nil {
			t.Errorf("%+v: %d bytes", c, len(got))
		}
	}
}

func checkSocketAnswer(t *testing.T, s *Server, o *owner, b []byte, local netip.AddrPort) {
	t.Helper()
	m := &stun.Message{Raw: b}
	if err := m.Decode(); err != nil {
		t.Fatal(err)
	}
	token, err := m.Get(punch.AttrToken)
	if err != nil || !s.hub.tokens.valid(token, public(o.device), local) {
		t.Errorf("token for %v: %v", local, err)
	}
}

// A node may want its answer at another of its sockets, from the port that was
// asked; who has no session may not.
func TestSTUNReplyPort(t *testing.T) {
	s, err := Open(Config{Listen: "127.0.0.1:0", STUN: ":0", Public: "127.0.0.1", StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, s)
	o := found(t, r)
	e, _ := o.follow(t, o.server, "")
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), e.welcome.STUN[1])
	for _, who := range []punch.Server{{Addr: to, Username: e.welcome.Session, Key: e.STUNKey()}, {Addr: to}} {
		var conns [2]*net.UDPConn // who asks, and who is answered
		for i := range conns {
			if conns[i], err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
				t.Fatal(err)
			}
			defer conns[i].Close()
			_ = conns[i].SetDeadline(time.Now().Add(5 * time.Second))
		}
		at := func(i int) netip.AddrPort { return conns[i].LocalAddr().(*net.UDPAddr).AddrPort() }
		q, err := punch.NewQuestion(who, punch.Ask{To: at(1).Port()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conns[0].WriteToUDPAddrPort(q.Raw, to); err != nil {
			t.Fatal(err)
		}
		answered := conns[1]
		if len(who.Username) == 0 {
			answered = conns[0]
		}
		b := make([]byte, maxDatagram)
		n, from, err := answered.ReadFromUDPAddrPort(b)
		if mapped, ok := q.Answered(b[:n]); err != nil || !ok || mapped != at(0) || from != to || n > len(q.Raw) && len(who.Username) > 0 {
			t.Errorf("%q: %d bytes from %v say %v %v (%v)", who.Username, n, from, mapped, ok, err)
		}
	}
}
