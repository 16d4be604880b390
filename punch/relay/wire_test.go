package relay

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"encoding/hex"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlay/punch"
)

// keyPair returns a private key made of one byte and its public key.
func keyPair(t testing.TB, b byte) (*ecdh.PrivateKey, [32]byte) {
	t.Helper()
	private, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{b}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return private, [32]byte(private.PublicKey().Bytes())
}

func testSession(t testing.TB) session {
	t.Helper()
	node, _ := keyPair(t, 1)
	_, relay := keyPair(t, 2)
	s, err := nodeSession(node, relay)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSessionAgrees(t *testing.T) {
	node, w := keyPair(t, 1)
	relay, r := keyPair(t, 2)
	a, err := nodeSession(node, r)
	if err != nil {
		t.Fatal(err)
	}
	b, err := relaySession(relay, w)
	if err != nil || a != b {
		t.Errorf("relay derives %x, node %x: %v", b, a, err)
	}
	other, _ := nodeSession(relay, w) // the roles are part of it
	if other.mac == a.mac || other.id == a.id {
		t.Error("a relay's session is its session as a node")
	}
	if _, err := nodeSession(node, [32]byte{}); err == nil {
		t.Error("a low-order public key is accepted")
	}
}

func TestFlowOfBothDirections(t *testing.T) {
	a, b, c := punch.Key{1}, punch.Key{2}, punch.Key{3}
	if FlowOf(a, b) != FlowOf(b, a) {
		t.Error("the directions have different headers")
	}
	if FlowOf(a, b) == FlowOf(a, c) {
		t.Error("two flows have one header")
	}
	// sha256("overlay/v1/relay-flow" || 01 00… || 02 00…)
	if got := hex.EncodeToString(sliceOf(FlowOf(a, b))); got != "90"+flowVector {
		t.Errorf("header %s", got)
	}
}

const flowVector = "c175dde5313f41"

func sliceOf(h Header) []byte { return h[:] }

func TestMessagesRoundTrip(t *testing.T) {
	s := testSession(t)
	seq := newSequence(0x0102030405060708, 9)
	h := hello{true, s.id, seq, cookie{7}}
	if got, ok := parseHello(h.build(&s)); !ok || got != h {
		t.Errorf("hello %+v, %v", got, ok)
	}
	c := challenge{seq, cookie{8}}
	if got, ok := parseChallenge(c.build()); !ok || got != c {
		t.Errorf("challenge %+v, %v", got, ok)
	}
	for _, addr := range []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:5"), netip.MustParseAddrPort("[2001:db8::1]:6"), {}} {
		p := pong{seq, addr}
		if got, ok := parsePong(p.build(&s)); !ok || got != p {
			t.Errorf("pong %+v, %v", got, ok)
		}
	}
	r := refused{refusedFull, seq}
	if got, ok := parseRefused(r.build(&s)); !ok || got != r {
		t.Errorf("refused %+v, %v", got, ok)
	}
	o := open{s.id, seq, []punch.Key{{1}, {2}}}
	if got, ok := parseOpen(o.build(&s)); !ok || !cmp.Equal(got.peers, o.peers) || got.id != o.id || got.seq != o.seq {
		t.Errorf("open %+v, %v", got, ok)
	}
	d := opened{seq, 3, 0b101}
	if got, ok := parseOpened(d.build(&s)); !ok || got != d {
		t.Errorf("opened %+v, %v", got, ok)
	}
	e := bye{s.id, seq}
	if got, ok := parseBye(e.build(&s)); !ok || got != e {
		t.Errorf("bye %+v, %v", got, ok)
	}
	if !s.sealed(d.build(&s)) || s.sealed(c.build()) {
		t.Error("the MAC is not where it belongs")
	}
}

func TestAdmitRoundTrip(t *testing.T) {
	s := testSession(t)
	_, w := keyPair(t, 1)
	_, r := keyPair(t, 2)
	device := ed25519.NewKeyFromSeed(make([]byte, 32))
	public := [32]byte(device.Public().(ed25519.PublicKey))
	a := admission{hello: hello{seq: newSequence(1, 2), id: s.id, cookie: cookie{3}}, node: w, credentials: []byte("documents")}
	b, err := a.build(&s, r, device)
	if err != nil {
		t.Fatal(err)
	}
	got, ok := parseAdmit(b, MaxAdmission)
	if !ok || got.hello != a.hello || got.node != w || string(got.credentials) != "documents" || !s.sealed(b) {
		t.Errorf("admit %+v, %v", got, ok)
	}
	if !got.by(public, r) || got.by(public, w) || got.by(w, r) {
		t.Error("the signature does not bind device and relay")
	}
	a.credentials = make([]byte, maxCredentialsUDP)
	if b, err = a.build(&s, r, device); err != nil || len(b) != MaxAdmission {
		t.Errorf("the longest in a datagram has %d bytes: %v", len(b), err)
	}
	a.credentials = make([]byte, MaxCredentials)
	if b, err = a.build(&s, r, device); err != nil || len(b) != maxAdmissionTLS {
		t.Errorf("the longest over TLS has %d bytes: %v", len(b), err)
	}
	if _, ok = parseAdmit(b, MaxAdmission); ok {
		t.Error("it is taken as a datagram")
	}
	if got, ok = parseAdmit(b, maxAdmissionTLS); !ok || len(got.credentials) != MaxCredentials {
		t.Error("it is not taken over TLS")
	}
	a.credentials = make([]byte, MaxCredentials+1)
	if _, err = a.build(&s, r, device); err == nil {
		t.Error("credentials of any length")
	}
}

// No answer is longer than what it answers, so that a relay amplifies nothing.
func TestAnswersAreNotLonger(t *testing.T) {
	s := testSession(t)
	seq := newSequence(1, 1)
	requests := map[string]int{
		"hello": len((&hello{id: s.id}).build(&s)),
		"admit": admitFixed,
		"open":  len((&open{s.id, seq, make([]punch.Key, 1)}).build(&s)),
	}
	if requests["hello"] != 60 || requests["admit"] != 158 || requests["open"] != 76 {
		t.Errorf("sizes %v", requests)
	}
	for _, c := range []struct {
		request string
		answer  []byte
	}{
		{"hello", (&challenge{}).build()},
		{"hello", (&pong{observed: netip.MustParseAddrPort("[2001:db8::1]:6")}).build(&s)},
		{"admit", (&pong{}).build(&s)},
		{"admit", (&refused{}).build(&s)},
		{"open", (&opened{count: 1}).build(&s)},
	} {
		if len(c.answer) > requests[c.request] {
			t.Errorf("%d bytes answer %s of %d", len(c.answer), c.request, requests[c.request])
		}
	}
}

func TestCutFrame(t *testing.T) {
	run := appendFrame(appendFrame(nil, []byte("one")), []byte("three"))
	one, rest, ok := cutFrame(run)
	three, end, ok2 := cutFrame(rest)
	if !ok || !ok2 || string(one) != "one" || string(three) != "three" || len(end) != 0 {
		t.Errorf("%q %q %q", one, three, end)
	}
	for _, bad := range [][]byte{nil, {0}, {0, 0}, {0, 2, 1}, append([]byte{0xff, 0xff}, make([]byte, 0xffff)...)} {
		if b, _, ok := cutFrame(bad); ok {
			t.Errorf("%d bytes cut from %d", len(b), len(bad))
		}
	}
}

// fuzzMessage checks a parser: what it accepts is built again byte for byte, the
// MAC at the end aside.
func fuzzMessage(f *testing.F, seed []byte, tail int, again func(s *session, b []byte) ([]byte, bool)) {
	f.Add(seed)
	s := testSession(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		built, ok := again(&s, slices.Clone(b))
		if ok && !bytes.Equal(built[:len(built)-tail], b[:len(b)-tail]) {
			t.Errorf("% x\nis built as\n% x", b, built)
		}
	})
}

func FuzzHello(f *testing.F) {
	fuzzMessage(f, (&hello{trial: true}).build(&session{}), macSize, func(s *session, b []byte) ([]byte, bool) {
		h, ok := parseHello(b)
		s.id = h.id
		return h.build(s), ok
	})
}

func FuzzChallenge(f *testing.F) {
	fuzzMessage(f, (&challenge{}).build(), 0, func(_ *session, b []byte) ([]byte, bool) {
		c, ok := parseChallenge(b)
		return c.build(), ok
	})
}

func FuzzPong(f *testing.F) {
	f.Add((&pong{observed: netip.MustParseAddrPort("192.0.2.1:5")}).build(&session{}))
	fuzzMessage(f, (&pong{}).build(&session{}), macSize, func(s *session, b []byte) ([]byte, bool) {
		p, ok := parsePong(b)
		return p.build(s), ok
	})
}

func FuzzRefused(f *testing.F) {
	fuzzMessage(f, (&refused{reason: 1}).build(&session{}), macSize, func(s *session, b []byte) ([]byte, bool) {
		r, ok := parseRefused(b)
		return r.build(s), ok
	})
}

func FuzzOpen(f *testing.F) {
	fuzzMessage(f, (&open{peers: make([]punch.Key, 2)}).build(&session{}), macSize, func(s *session, b []byte) ([]byte, bool) {
		o, ok := parseOpen(b)
		s.id = o.id
		return o.build(s), ok
	})
}

func FuzzOpened(f *testing.F) {
	fuzzMessage(f, (&opened{count: 2}).build(&session{}), macSize, func(s *session, b []byte) ([]byte, bool) {
		o, ok := parseOpened(b)
		return o.build(s), ok
	})
}

func FuzzBye(f *testing.F) {
	s := testSession(f)
	fuzzMessage(f, (&bye{s.id, newSequence(1, 2)}).build(&s), macSize, func(s *session, b []byte) ([]byte, bool) {
		e, ok := parseBye(b)
		return e.build(s), ok
	})
}

func FuzzAdmit(f *testing.F) {
	device := ed25519.NewKeyFromSeed(make([]byte, 32))
	first := admission{credentials: []byte("documents")}
	seed, err := first.build(&session{}, [32]byte{}, device)
	if err != nil {
		f.Fatal(err)
	}
	fuzzMessage(f, seed, macSize+ed25519.SignatureSize, func(s *session, b []byte) ([]byte, bool) {
		a, ok := parseAdmit(b, maxAdmissionTLS)
		if !ok {
			return nil, false
		}
		s.id = a.id
		again, err := a.build(s, [32]byte{}, device)
		return again, err == nil
	})
}

func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, []byte("one")), []byte("three")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var again []byte
		rest := b
		for {
			datagram, after, ok := cutFrame(rest)
			if !ok {
				break
			}
			again, rest = appendFrame(again, datagram), after
		}
		if !bytes.Equal(append(again, rest...), b) {
			t.Errorf("% x", b)
		}
	})
}
