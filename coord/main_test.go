package coord

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"testing"
	"time"

	"go.uber.org/goleak"

	"overlay/coord/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testKey is a fixed private key for each name.
func testKey(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func someDate() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

func testTLS(t *testing.T, key ed25519.PrivateKey) *tls.Config {
	t.Helper()
	cert, err := deviceCertificate(key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"http/1.1"},
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true, // net.Pipe has no room for them
	}
}

func testPin(t *testing.T, key ed25519.PrivateKey) trust.Hash {
	t.Helper()
	doc, err := trust.Countersign([]byte("any"), someDate(), key)
	if err != nil {
		t.Fatal(err)
	}
	_, _, pin, err := trust.OpenCountersigned(doc)
	if err != nil {
		t.Fatal(err)
	}
	return pin
}

// listen opens a TCP port on loopback for one test.
func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// serve runs h behind TLS with key until the test ends and gives its address.
func serve(t *testing.T, key ed25519.PrivateKey, h http.Handler) string {
	t.Helper()
	l := listen(t)
	s := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(tls.NewListener(l, testTLS(t, key)))
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return l.Addr().String()
}

// dial connects device "anna" to a server.
func dial(t *testing.T, server string) *Conn {
	t.Helper()
	d := Dialer{Servers: []string{server}, Device: testKey("anna")}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
