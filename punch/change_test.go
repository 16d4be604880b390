package punch

import (
	"net/netip"
	"testing"

	"github.com/pion/stun/v2"
)

func TestChange(t *testing.T) {
	for _, s := range []Server{{}, {Username: []byte("known user"), Key: []byte("secret")}} {
		for _, c := range []Change{{}, {Address: true}, {Port: true}, {true, true}} {
			b, err := s.ChangeRequest(transactionID{1}, c)
			if err != nil {
				t.Fatal(err)
			}
			if got := ChangeOf(b); got != c {
				t.Errorf("%+v arrives as %+v", c, got)
			}
			refusal := &stun.Message{Raw: RefuseChange(b)}
			if err := refusal.Decode(); err != nil || refusal.Type != stun.BindingError || len(refusal.Raw) > len(b) {
				t.Errorf("%d bytes refused with %d: %v", len(b), len(refusal.Raw), err)
			}
			for _, from := range []string{"203.0.113.7:700", "[2001:db8::7]:700"} {
				out := AnswerBinding(b, netip.MustParseAddrPort(from), sessions(make([]byte, MaxToken), true))
				if out == nil || len(out) > len(b) {
					t.Errorf("%+v: %d bytes of %s answered with %d", c, len(b), from, len(out))
				}
			}
		}
	}
	plainly, err := (Server{}).marshal(transactionID{1})
	if err != nil {
		t.Fatal(err)
	}
	if got := ChangeOf(plainly); got != (Change{}) {
		t.Errorf("a request without: %+v", got)
	}
	if RefuseChange(plainly) != nil {
		t.Error("a short request is answered with more bytes")
	}
}

// FuzzChange: whatever arrives, it is refused with no more bytes than it has.
func FuzzChange(f *testing.F) {
	b, err := (Server{}).ChangeRequest(transactionID{1}, Change{Port: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		ChangeOf(b)
		if out := RefuseChange(b); len(out) > len(b) {
			t.Errorf("%d bytes are refused with %d", len(b), len(out))
		}
	})
}
