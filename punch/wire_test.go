package punch

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pion/stun/v2"
)

// keyPair returns a private key made of one byte and its public key.
func keyPair(t testing.TB, b byte) (*ecdh.PrivateKey, Key) {
	t.Helper()
	private, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{b}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return private, Key(private.PublicKey().Bytes())
}

// twoSecrets returns what two peers derive of each other.
func twoSecrets(t testing.TB) (one, other *secrets) {
	t.Helper()
	privateA, a := keyPair(t, 1)
	privateB, b := keyPair(t, 2)
	one, err := derive(privateA, [32]byte{7}, b)
	if err != nil {
		t.Fatal(err)
	}
	other, err = derive(privateB, [32]byte{7}, a)
	if err != nil {
		t.Fatal(err)
	}
	return one, other
}

func TestSecretsAgree(t *testing.T) {
	one, other := twoSecrets(t)
	if !bytes.Equal(one.check, other.check) {
		t.Error("check keys differ")
	}
	private, _ := keyPair(t, 1)
	_, b := keyPair(t, 2)
	foreign, err := derive(private, [32]byte{8}, b)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(foreign.check, one.check) {
		t.Error("two meshes share a check key")
	}
	sealed := one.seal([]byte("hello"))
	if got, err := other.open(sealed); err != nil || string(got) != "hello" {
		t.Errorf("open = %q, %v", got, err)
	}
	if _, err := one.open(sealed); err == nil {
		t.Error("a signal can be reflected to its sender")
	}
	if _, err := derive(private, [32]byte{7}, Key{}); err == nil {
		t.Error("a low-order public key is accepted")
	}
}

// TestCheckLayout spells out every byte of a check.
func TestCheckLayout(t *testing.T) {
	key := []byte("VOkJxbRl1RmTxUk/WvJxBt")
	c := check{
		id:      transactionID{0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae},
		user:    user{1, 2, 3, 4, 5, 6, 7, 8},
		boot:    0x1122334455667788,
		counter: 9,
	}
	got, err := c.marshal(key)
	if err != nil {
		t.Fatal(err)
	}
	head, _ := hex.DecodeString("0001003821" + "12a442" + "b7e7a701bc34d686fa87dfae" +
		"00060008" + "0102030405060708" + "c0570010" + "1122334455667788" + "0000000000000009")
	mac := hmac.New(sha1.New, key)
	mac.Write(head)
	want := slices.Concat(head, []byte{0, 8, 0, 20}, mac.Sum(nil))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("check (-want +got):\n%s", diff)
	}
	m, err := decode(got)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := checkOf(m); err != nil || back != c {
		t.Errorf("checkOf = %v, %v", back, err)
	}
	c.lost = true
	if lost, err := c.marshal(key); err != nil || len(lost) != len(got)+4 {
		t.Errorf("check with SESSION-LOST: %d bytes, %v", len(lost), err)
	} else if m, err := decode(lost); err != nil {
		t.Error(err)
	} else if back, err := checkOf(m); err != nil || back != c {
		t.Errorf("checkOf = %v, %v", back, err)
	}
	for _, addr := range []string{"192.0.2.1:32853", "[2001:db8:1234:5678:11:2233:4455:6677]:32853"} {
		b, err := answer(c.id, netip.MustParseAddrPort(addr), key)
		if err != nil || len(b) > len(got) {
			t.Errorf("answer for %s: %d bytes for %d, %v", addr, len(b), len(got), err)
		}
		m, err := decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if mapped, err := mappedOf(m); err != nil || mapped.String() != addr {
			t.Errorf("mappedOf = %v, %v, want %s", mapped, err, addr)
		}
	}
}

// TestDecodeRFC5769 reads the mapped address of the sample response of RFC 5769
// section 2.2.
func TestDecodeRFC5769(t *testing.T) {
	m, err := stun.Build(stun.NewTransactionIDSetter(transactionID{
		0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae,
	}), stun.BindingSuccess, stun.RawAttribute{
		Type: stun.AttrXORMappedAddress, Value: []byte{0, 1, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43},
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err = decode(m.Raw)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := mappedOf(m); err != nil || got.String() != "192.0.2.1:32853" {
		t.Errorf("mappedOf = %v, %v", got, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	build := func(attrs ...stun.Setter) []byte {
		m, err := stun.Build(append([]stun.Setter{stun.TransactionID, stun.BindingRequest}, attrs...)...)
		if err != nil {
			t.Fatal(err)
		}
		return m.Raw
	}
	raw := func(typ stun.AttrType, size int) stun.Setter {
		return stun.RawAttribute{Type: typ, Value: make([]byte, size)}
	}
	integrity := stun.MessageIntegrity("key")
	for name, b := range map[string][]byte{
		"nothing":                   nil,
		"not STUN":                  []byte(strings.Repeat("x", 40)),
		"too long":                  build(raw(0x8099, 600)),
		"short integrity":           build(raw(stun.AttrMessageIntegrity, 0)),
		"attribute after integrity": build(integrity, raw(0x8099, 4)),
		"two integrities":           build(integrity, raw(stun.AttrMessageIntegrity, 20)),
		"empty mapped address":      build(raw(stun.AttrXORMappedAddress, 0)),
		"odd mapped address":        build(raw(stun.AttrXORMappedAddress, 9)),
		"long token":                build(raw(AttrToken, MaxToken+1)),
		"short sequence":            build(raw(AttrSequence, 15)),
		"long session lost":         build(raw(AttrSessionLost, 4)),
		"unknown, required":         build(raw(0x0099, 4)),
		"trailing bytes":            append(build(), 0),
	} {
		if _, err := decode(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := decode(build(raw(0x8099, 4), integrity)); err != nil {
		t.Errorf("unknown, optional: %v", err)
	}
}

func TestServerRequestCoversAnswer(t *testing.T) {
	for _, size := range []int{1, 8, 16, 31, 32, 64, 200} {
		s := Server{Username: make([]byte, size), Key: []byte("key")}
		b, err := s.marshal(transactionID{})
		if err != nil || len(b) < ServerAnswerSize || len(b) > maxMessage {
			t.Errorf("user name of %d: request of %d bytes, %v; answer may have %d", size, len(b), err, ServerAnswerSize)
		}
	}
	b, err := Server{}.marshal(transactionID{})
	if err != nil || len(b) != stunHeader {
		t.Errorf("anonymous request: %d bytes, %v", len(b), err)
	}
}

func exampleSignal() *signal {
	s := &signal{kind: signalCall, boot: 5, counter: 6, nonce: Nonce{7}}
	for i := range MaxCandidates {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 1000)
		if i%2 == 0 {
			addr = netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1").Next(), uint16(i+1))
		}
		s.candidates = append(s.candidates, Candidate{Addr: addr, Type: ServerReflexive})
		s.opened = append(s.opened, addr)
	}
	return s
}

func TestSignalRoundTrip(t *testing.T) {
	for _, kind := range []signalKind{signalCall, signalGo, signalFresh, signalMeet} {
		want := exampleSignal()
		want.kind = kind
		if kind != signalCall {
			want.hard = sides("203.0.113.1")["block"]
		}
		testSignalRoundTrip(t, want)
	}
}

func testSignalRoundTrip(t *testing.T, want *signal) {
	t.Helper()
	one, _ := twoSecrets(t)
	b := want.marshal()
	if n := len(one.seal(b)); n > MaxSignal {
		t.Errorf("the longest signal has %d bytes", n)
	}
	got, err := parseSignal(append(b, 1, 2, 3))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(signal{}, side{}), cmp.Comparer(func(x, y netip.AddrPort) bool { return x == y })); diff != "" {
		t.Errorf("signal (-want +got):\n%s", diff)
	}
	for n := range b {
		if _, err := parseSignal(b[:n]); err == nil {
			t.Fatalf("accepted when cut to %d of %d bytes", n, len(b))
		}
	}
}

func TestSignalRefuses(t *testing.T) {
	for name, change := range map[string]func([]byte){
		"version":           func(b []byte) { b[0] = 2 },
		"many candidates":   func(b []byte) { b[signalHeader] = MaxCandidates + 1 },
		"family":            func(b []byte) { b[signalHeader+1] = 0x52 },
		"type of candidate": func(b []byte) { b[signalHeader+1] = 0x60 | byte(PeerReflexive) },
	} {
		b := exampleSignal().marshal()
		change(b)
		if _, err := parseSignal(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseSignal(f *testing.F) {
	f.Add(exampleSignal().marshal())
	for _, s := range sides("203.0.113.1") {
		about := &signal{kind: signalPropose, boot: 5, counter: 6, hard: s}
		f.Add(about.marshal())
		about.kind = signalFresh
		f.Add(about.marshal())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSignal(b)
		if err != nil {
			return
		}
		if len(s.candidates) > MaxCandidates || len(s.opened) > MaxCandidates {
			t.Fatalf("%d candidates, %d opened", len(s.candidates), len(s.opened))
		}
		again, err := parseSignal(s.marshal())
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		if !bytes.Equal(again.marshal(), s.marshal()) {
			t.Fatal("encoding is not stable")
		}
	})
}
