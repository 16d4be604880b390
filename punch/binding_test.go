package punch

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/pion/stun/v2"
)

func sessions(token []byte, plainly bool) func([]byte) ([]byte, []byte, bool) {
	return func(user []byte) (key, t []byte, ok bool) {
		if user == nil {
			return nil, nil, plainly
		}
		return []byte("secret"), token, string(user) == "known user"
	}
}

func TestAnswerBinding(t *testing.T) {
	from := netip.MustParseAddrPort("[::ffff:203.0.113.7]:700")
	request := func(s Server) []byte {
		b, err := s.marshal(transactionID{1, 2, 3})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := request(Server{Username: []byte("known user"), Key: []byte("secret")})
	nobody, err := stun.Build(stun.TransactionID, stun.BindingRequest, stun.Username(""), stun.MessageIntegrity("secret"))
	if err != nil {
		t.Fatal(err)
	}
	tight, err := stun.Build(stun.TransactionID, stun.BindingRequest, stun.Username("known user"), stun.MessageIntegrity("secret"))
	if err != nil {
		t.Fatal(err)
	}
	token := bytes.Repeat([]byte{7}, MaxToken)
	for _, test := range []struct {
		what    string
		b       []byte
		from    netip.AddrPort
		token   []byte
		plainly bool
		want    bool
	}{
		{"with token", good, from, token, false, true},
		{"without token", good, from, nil, false, true},
		{"short, without token", tight.Raw, from, nil, false, true},
		{"short, with token", tight.Raw, from, token, false, false},
		{"plain", request(Server{}), from, nil, true, true},
		{"plain, not allowed", request(Server{}), from, nil, false, false},
		{"empty user name", nobody.Raw, from, nil, true, false},
		{"unknown user", request(Server{Username: []byte("somebody"), Key: []byte("secret")}), from, nil, true, false},
		{"other key", request(Server{Username: []byte("known user"), Key: []byte("else")}), from, nil, true, false},
		{"no integrity", mutate(good, len(good)-1), from, nil, true, false},
		{"no source", good, netip.AddrPort{}, nil, true, false},
		{"port 0", good, netip.MustParseAddrPort("203.0.113.7:0"), nil, true, false},
		{"nothing", nil, from, nil, true, false},
		{"too long", make([]byte, maxBinding+1), from, nil, true, false},
	} {
		out := AnswerBinding(test.b, test.from, sessions(test.token, test.plainly))
		if (out != nil) != test.want {
			t.Errorf("%s: %d bytes", test.what, len(out))
			continue
		}
		if out != nil {
			wantBinding(t, test.what, out, test.token, !test.plainly)
		}
	}
}

func wantBinding(t *testing.T, what string, out, token []byte, signed bool) {
	t.Helper()
	m, err := decode(out)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	if mapped, err := mappedOf(m); err != nil || mapped.String() != "203.0.113.7:700" {
		t.Errorf("%s: mapped %v, %v", what, mapped, err)
	}
	if got, _ := m.Get(AttrToken); !bytes.Equal(got, token) {
		t.Errorf("%s: token %x", what, got)
	}
	if signed && stun.MessageIntegrity("secret").Check(m) != nil {
		t.Errorf("%s: no integrity", what)
	}
}

func FuzzAnswerBinding(f *testing.F) {
	for _, s := range []Server{{}, {Username: []byte("known user"), Key: []byte("secret")}} {
		b, err := s.marshal(transactionID{1})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	from := netip.MustParseAddrPort("203.0.113.7:700")
	f.Fuzz(func(t *testing.T, b []byte) {
		out := AnswerBinding(b, from, sessions(make([]byte, MaxToken), false))
		if len(out) > len(b) {
			t.Fatalf("%d bytes in reply to %d", len(out), len(b))
		}
		m := &stun.Message{Raw: bytes.Clone(b)}
		if out != nil && (m.Decode() != nil || stun.MessageIntegrity("secret").Check(m) != nil) {
			t.Fatal("an answer to a request that is not authentic")
		}
	})
}
