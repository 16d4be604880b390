package nattest_test

import (
	"bytes"
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/pion/stun/v2"

	"overlay/punch/nattest"
)

const attrToken stun.AttrType = 0xC056

func TestSTUNServer(t *testing.T) {
	const attrPadding = stun.AttrType(0x0026)
	name, key := []byte("sixteen byte nam"), stun.MessageIntegrity("thirty-two bytes of session key.")
	padding := stun.RawAttribute{Type: attrPadding, Value: make([]byte, 64)}
	username := stun.RawAttribute{Type: stun.AttrUsername, Value: name}
	for _, test := range []struct {
		what          string
		setters       []stun.Setter
		answers, sign bool
	}{
		{"a plain request", nil, true, false},
		{"a signed request", []stun.Setter{username, padding, key}, true, true},
		{"a request that is shorter than its answer", []stun.Setter{username, key}, false, false},
		{"another key", []stun.Setter{username, padding, stun.MessageIntegrity("other")}, false, false},
		{"an unknown session", []stun.Setter{stun.NewUsername("nobody"), padding, key}, false, false},
		{"no integrity", []stun.Setter{username, padding}, false, false},
		{"an answer", []stun.Setter{stun.BindingSuccess}, false, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := newProbe(nattest.Masquerade())
			nattest.ServeSTUN(p.servers[0], serverPort).Admit(name, key)
			var got []byte
			p.client.Listen(clientPort, func(b []byte, _ netip.AddrPort) { got = bytes.Clone(b) })
			req := stun.MustBuild(append([]stun.Setter{stun.TransactionID, stun.BindingRequest}, test.setters...)...)
			to := netip.AddrPortFrom(probeAddr(0), serverPort)
			if err := p.client.Send(req.Raw, clientPort, to, 0); err != nil {
				t.Fatal(err)
			}
			wait(probeLink().Delay * 10)
			if test.answers != (got != nil) {
				t.Fatalf("%s: answered %v, want %v", test.what, got != nil, test.answers)
			}
			if test.answers {
				checkAnswer(t, req, got)
			}
			if test.sign {
				checkToken(t, got, name, key)
			}
		})
	}
}

func checkAnswer(t *testing.T, req *stun.Message, got []byte) {
	t.Helper()
	var seen stun.XORMappedAddress
	res := &stun.Message{Raw: got}
	if err := res.Decode(); err != nil {
		t.Fatal(err)
	}
	if err := seen.GetFrom(res); err != nil || seen.Port != clientPort || seen.IP.String() != probeWAN().String() {
		t.Errorf("mapped address %v, error %v", seen, err)
	}
	if res.TransactionID != req.TransactionID {
		t.Error("answered with another transaction")
	}
}

func checkToken(t *testing.T, got, name []byte, key stun.MessageIntegrity) {
	t.Helper()
	res := &stun.Message{Raw: got}
	if err := res.Decode(); err != nil {
		t.Fatal(err)
	}
	token, err := res.Get(attrToken)
	if err != nil || !bytes.Equal(token, nattest.Token(name, netip.AddrPortFrom(probeWAN(), clientPort))) {
		t.Errorf("token %x, error %v", token, err)
	}
	if err := key.Check(res); err != nil {
		t.Error(err)
	}
}
