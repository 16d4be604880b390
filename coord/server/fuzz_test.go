package server

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/pion/stun/v2"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
)

func FuzzRequests(f *testing.F) {
	for _, v := range []any{coord.OwnRequest{}, coord.JoinRequest{Name: "bob"}, coord.CertRequest{}, coord.RevokeRequest{}, coord.InviteRequest{}} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"name":"a","proofs":{"invite":"AA=="}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		strict[coord.OwnRequest](t, b)
		strict[coord.JoinRequest](t, b)
		strict[coord.CertRequest](t, b)
		strict[coord.RevokeRequest](t, b)
		strict[coord.InviteRequest](t, b)
	})
}

// strict says that what is taken means the same when it is written again.
func strict[T any](t *testing.T, b []byte) {
	v, err := decodeStrict[T](b)
	if err != nil {
		return
	}
	again, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	w, err := decodeStrict[T](again)
	if x, _ := json.Marshal(w); err != nil || !reflect.DeepEqual(x, again) {
		t.Fatalf("%s becomes %s: %v", b, again, err)
	}
}

func FuzzSTUN(f *testing.F) {
	s, id, key := stunWorld()
	f.Add(binding(f))
	f.Add(binding(f, stun.NewUsername(string(id[:])), padding(), stun.MessageIntegrity(key)))
	f.Add(binding(f, stun.NewUsername(string(id[:])), stun.MessageIntegrity(key), stun.Fingerprint))
	if b, err := (punch.Server{}).ChangeRequest([12]byte{1}, punch.Change{Address: true}); err == nil {
		f.Add(b)
	}
	from := netip.MustParseAddrPort("203.0.113.7:4444")
	f.Fuzz(func(t *testing.T, b []byte) {
		in := append([]byte(nil), b...)
		out := s.answer(in, from, here())
		if out == nil {
			return
		}
		if len(out) > len(b) && len(out) > 32 {
			t.Fatalf("%d bytes answered with %d", len(b), len(out))
		}
		if !stun.IsMessage(b) {
			return // RFC 3489
		}
		m := &stun.Message{Raw: out}
		if err := m.Decode(); err != nil || m.Type != stun.BindingSuccess && m.Type != stun.BindingError {
			t.Fatalf("answer %x: %v", out, err)
		}
	})
}

// FuzzReports feeds a stream's reports: whatever a member says, the hub stays
// whole and takes no record that is not the member's.
func FuzzReports(f *testing.F) {
	n := newNode(f)
	for _, r := range []coord.Report{
		{},
		{Signal: &coord.Signal{Data: []byte("x")}},
		{Publish: &coord.Publish{Record: record(f, n, 1, nil), Tokens: [][]byte{{1}}}},
	} {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	tok := newTokens(time.Now)
	f.Fuzz(func(t *testing.T, b []byte) {
		var r coord.Report
		if json.Unmarshal(b, &r) != nil || r.Publish == nil {
			return
		}
		if rec, err := tok.checkRecord(publisher{public(n.device), trust.RoleNode}, *r.Publish); err == nil && rec.Device != public(n.device) {
			t.Fatal("a foreign record was taken")
		}
	})
}

func FuzzResume(f *testing.F) {
	f.Add("0011-22")
	f.Fuzz(func(t *testing.T, s string) {
		at, err := parseResume(s)
		if err != nil {
			return
		}
		if again, err := parseResume(at.String()); err != nil || again != at {
			t.Fatalf("%q: %v becomes %v, %v", s, at, again, err)
		}
	})
}
