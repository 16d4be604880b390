package server

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"overlay/coord"
	"overlay/coord/trust"
)

// raw sends a request byte for byte on a new connection of a device.
func raw(t *testing.T, s *running, cert []tls.Certificate, request string) (*http.Response, *coord.Error) {
	t.Helper()
	c, err := tls.Dial("tcp", s.Addr().String(), &tls.Config{InsecureSkipVerify: true, Certificates: cert})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := fmt.Fprint(c, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var e coord.Error
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil {
		t.Fatal(err)
	}
	return resp, &e
}

func deviceCert(t testing.TB) []tls.Certificate {
	t.Helper()
	c, err := tlsCertificate(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return []tls.Certificate{c}
}

func TestRequestsAreStrict(t *testing.T) {
	s := start(t, t.TempDir())
	cert := deviceCert(t)
	head := func(line, version, body string) string {
		return fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", line, coord.HeaderVersion, version, len(body), body)
	}
	long := `{"name":"` + strings.Repeat("x", coord.MaxAnonymousBody) + `"}`
	for name, c := range map[string]struct {
		request string
		status  int
		code    coord.Code
	}{
		"unknown field":  {head("POST /v1/join", "1", `{"admin":true}`), 400, coord.CodeBadRequest},
		"double field":   {head("POST /v1/join", "1", `{"name":"a","name":"b"}`), 400, coord.CodeBadRequest},
		"folded field":   {head("POST /v1/join", "1", `{"name":"a","NAME":"b"}`), 400, coord.CodeBadRequest},
		"trailing data":  {head("POST /v1/join", "1", `{"name":"a"} {}`), 400, coord.CodeBadRequest},
		"deep":           {head("POST /v1/join", "1", strings.Repeat(`{"proofs":`, 50)+"1"+strings.Repeat("}", 50)), 400, coord.CodeBadRequest},
		"not UTF-8":      {head("POST /v1/join", "1", "{\"name\":\"\xff\"}"), 400, coord.CodeBadRequest},
		"nothing":        {head("POST /v1/join", "1", ""), 400, coord.CodeBadRequest},
		"too large":      {head("POST /v1/join", "1", long), 413, coord.CodeTooLarge},
		"too old":        {head("GET /v1/hello", "-1", ""), 426, coord.CodeVersion},
		"too new":        {head("GET /v1/hello", "3", ""), 426, coord.CodeVersion},
		"no version":     {"GET /v1/hello HTTP/1.1\r\nHost: x\r\n\r\n", 426, coord.CodeVersion},
		"no such path":   {head("GET /v1/shutdown", "1", ""), 400, coord.CodeBadRequest},
		"wrong method":   {head("DELETE /v1/nodes", "1", ""), 400, coord.CodeBadRequest},
		"no upgrade":     {head("GET /v1/stream", "1", ""), 400, coord.CodeBadRequest},
		"low-order key":  {head("POST /v1/join", "1", `{"wireguard":"`+trust.Key{}.String()+`"}`), 400, coord.CodeBadKey},
		"no such role":   {head("POST /v1/join", "1", `{"role":"king"}`), 400, coord.CodeBadRequest},
		"no proof":       {head("POST /v1/join", "1", `{"wireguard":"`+wireguardOf(newNode(t)).String()+`"}`), 403, coord.CodeBadProof},
		"nothing to own": {head("POST /v1/own", "1", `{}`), 400, coord.CodeBadRequest},
	} {
		resp, e := raw(t, s, cert, c.request)
		if resp.StatusCode != c.status || e.Code != c.code || e.Message == "" {
			t.Errorf("%s: %d %+v", name, resp.StatusCode, e)
		}
		if resp.Header.Get(coord.HeaderVersion) != "1" {
			t.Errorf("%s: no version in the answer", name)
		}
		if c.status == 413 && !resp.Close {
			t.Error("the connection lives after a body that is too large")
		}
		s.failures = newBuckets[netip.Prefix](1, failuresPerSource, s.registry.now) // each case by itself
	}
}

// Without a certificate of the right kind TLS itself fails.
func TestClientCertificate(t *testing.T) {
	s := start(t, t.TempDir())
	ec, err := ecCertificate()
	if err != nil {
		t.Fatal(err)
	}
	for name, certs := range map[string][]tls.Certificate{"none": nil, "not Ed25519": {ec}} {
		c, err := tls.Dial("tcp", s.Addr().String(), &tls.Config{InsecureSkipVerify: true, Certificates: certs})
		if err == nil {
			_, err = c.Read(make([]byte, 1)) // TLS 1.3 tells the client with the first read
			_ = c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyTLS13(t *testing.T) {
	s := start(t, t.TempDir())
	_, err := tls.Dial("tcp", s.Addr().String(), &tls.Config{InsecureSkipVerify: true, Certificates: deviceCert(t), MaxVersion: tls.VersionTLS12})
	if err == nil {
		t.Error("TLS 1.2 was taken")
	}
}

// A proof is good for one connection and one device.
func TestProofsAreBound(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	i, n := o.invite(t, nil), newNode(t)
	first := n.dial(t, o.server)
	hello, err := first.Hello(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	proofs, err := first.Prove(hello, i.Key(), n.device, n.wireguard)
	if err != nil {
		t.Fatal(err)
	}
	q := coord.JoinRequest{Invite: public(i.Key()), WireGuard: wireguardOf(n), Name: "bob", Proofs: proofs}
	_, err = n.dial(t, o.server).Join(t.Context(), q) // another connection
	wantCode(t, err, coord.CodeBadProof)
	wrong := q
	wrong.WireGuard = wireguardOf(newNode(t)) // another key
	_, err = first.Join(t.Context(), wrong)
	wantCode(t, err, coord.CodeBadProof)
	wrong = q
	wrong.Invite = public(newKey(t)) // another invite
	_, err = first.Join(t.Context(), wrong)
	wantCode(t, err, coord.CodeBadProof)
	if _, err := first.Join(t.Context(), q); err != nil {
		t.Error("the right one:", err)
	}
}

// One member cannot take all the connections a server may have open.
func TestMemberConnectionsAreLimited(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	for i := range maxOfMember + 1 {
		_, err := b.dial(t, o.server).Hello(t.Context())
		switch {
		case i < maxOfMember-1 && err != nil: // the one that joined may still be open
			t.Fatal(i, err)
		case i == maxOfMember:
			wantCode(t, err, coord.CodeRateLimited)
		}
	}
	if _, err := o.dial(t, o.server).Hello(t.Context()); err != nil {
		t.Error("another member:", err)
	}
}

// Anonymous connections beyond the limit wait for a turn, and members do not
// count.
func TestAnonymousConnectionsWait(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	for range maxAnonymous + 4 { // members say hello and make room
		c := o.dial(t, o.server)
		if _, err := c.Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var idle []*coord.Conn
	stranger := newNode(t)
	for range maxAnonymous {
		c := stranger.dial(t, o.server)
		if _, err := c.Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	done := make(chan error)
	go func() {
		d := coord.Dialer{Servers: []string{o.server}, Device: stranger.device}
		c, err := d.Dial(t.Context())
		if err == nil {
			_ = c.Close()
		}
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("served beyond the limit: %v", err)
	default:
	}
	_ = idle[0].Close()
	if err := <-done; err != nil {
		t.Errorf("its turn never came: %v", err)
	}
}
