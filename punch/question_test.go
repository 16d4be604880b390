package punch

import (
	"net/netip"
	"testing"

	"github.com/pion/stun/v2"
)

// TestQuestion asks a server and takes its answer, and nobody else's.
func TestQuestion(t *testing.T) {
	server := Server{Addr: stunAddr(), Username: []byte("anna"), Key: []byte("secret")}
	from := netip.MustParseAddrPort("203.0.113.1:7")
	session := func([]byte) (key, token []byte, ok bool) { return []byte("secret"), make([]byte, MaxToken), true }
	for _, how := range []Ask{{}, {Change: Change{Port: true}}, {To: 41641}, {Size: 1252}, {Size: maxBinding}} {
		q, err := NewQuestion(server, how)
		if err != nil {
			t.Fatal(err)
		}
		if how.Size > 0 && len(q.Raw) != how.Size {
			t.Errorf("%+v: %d bytes", how, len(q.Raw))
		}
		answer := AnswerBinding(q.Raw, from, session)
		if len(answer) == 0 || len(answer) > len(q.Raw) {
			t.Fatalf("%+v: an answer of %d bytes to %d", how, len(answer), len(q.Raw))
		}
		if mapped, ok := q.Answered(answer); !ok || mapped != from {
			t.Errorf("%+v: %v %v", how, mapped, ok)
		}
		if ChangeOf(q.Raw) != how.Change {
			t.Errorf("%+v: asks for %+v", how, ChangeOf(q.Raw))
		}
		other, err := NewQuestion(server, how)
		if err != nil {
			t.Fatal(err)
		}
		forged := AnswerBinding(q.Raw, from, func([]byte) (key, token []byte, ok bool) { return []byte("guess"), nil, true })
		plain := AnswerBinding(stun.MustBuild(stun.NewTransactionIDSetter(q.id), stun.BindingRequest).Raw, from, session)
		for name, b := range map[string][]byte{"nothing": nil, "itself": q.Raw, "forged": forged, "plain": plain, "cut": answer[:40], "longer": append(answer, 0)} {
			if mapped, ok := q.Answered(b); ok {
				t.Errorf("%+v: %s is an answer: %v", how, name, mapped)
			}
		}
		if _, ok := other.Answered(answer); ok {
			t.Errorf("%+v: the answer to another question", how)
		}
	}
}

// A server without a session is asked plainly.
func TestPlainQuestion(t *testing.T) {
	q, err := NewQuestion(Server{}, Ask{})
	if err != nil {
		t.Fatal(err)
	}
	from := netip.MustParseAddrPort("[2001:db8::1]:7")
	answer := AnswerBinding(q.Raw, from, func([]byte) (key, token []byte, ok bool) { return nil, nil, true })
	if mapped, ok := q.Answered(answer); !ok || mapped != from {
		t.Errorf("%v %v", mapped, ok)
	}
}

// FuzzAnswered has nothing but the server's own answer taken for one.
func FuzzAnswered(f *testing.F) {
	server := Server{Addr: stunAddr(), Username: []byte("anna"), Key: []byte("secret")}
	q, err := NewQuestion(server, Ask{})
	if err != nil {
		f.Fatal(err)
	}
	q.id = transactionID{1, 2, 3} // the same in every process
	from := netip.MustParseAddrPort("203.0.113.1:7")
	build := func(key string) []byte {
		return stun.MustBuild(stun.NewTransactionIDSetter(q.id), stun.BindingSuccess,
			&stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())}, stun.MessageIntegrity(key)).Raw
	}
	f.Add(build("secret"))
	f.Add(build("guess"))
	f.Fuzz(func(t *testing.T, b []byte) {
		mapped, ok := q.Answered(b)
		if ok && mapped != from {
			t.Errorf("%x is an answer: %v", b, mapped)
		}
	})
}
