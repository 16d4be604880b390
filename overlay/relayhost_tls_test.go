package overlay

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
)

// startWeb serves a relayWeb on loopback, whose connections repeat their
// binding and then what they are told.
func startWeb(t *testing.T, device ed25519.PrivateKey, known func(trust.Key) bool) (addr string) {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	cert, err := relayCertificate(device)
	if err != nil {
		t.Fatal(err)
	}
	w := &relayWeb{known: known, log: slog.New(slog.DiscardHandler), serve: func(ctx context.Context, c net.Conn, binding [16]byte) error {
		defer context.AfterFunc(ctx, func() { _ = c.Close() })()
		if _, err := c.Write(binding[:]); err != nil {
			return err
		}
		_, err := io.Copy(c, c)
		return err
	}}
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return w.run(ctx, l, cert) })
	t.Cleanup(func() {
		cancel()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// pinOfKey is what a client knows a relay by.
func pinOfKey(t *testing.T, k ed25519.PrivateKey) trust.Hash {
	t.Helper()
	return sha256.Sum256(must[[]byte](t)(x509.MarshalPKIXPublicKey(k.Public())))
}

func dialWeb(t *testing.T, addr string, device, relay ed25519.PrivateKey) *coord.Conn {
	t.Helper()
	want := pinOfKey(t, relay)
	d := coord.Dialer{Servers: []string{addr}, Device: device, Verify: func(got trust.Hash) error {
		if got != want {
			return &coord.PinError{Want: want, Got: got}
		}
		return nil
	}}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestRelayTakesConnectionsWithTheirBinding(t *testing.T) {
	device := newKey(t)
	addr := startWeb(t, device, func(trust.Key) bool { return false })
	c := dialWeb(t, addr, newKey(t), device)
	want := must[[]byte](t)(c.Export(coord.ExporterRelay))
	up, err := c.Upgrade(t.Context(), coord.RelayPath, coord.RelayProtocol)
	if err != nil {
		t.Fatal(err)
	}
	// Longer than the bounds of a request.
	time.Sleep(10 * time.Millisecond)
	if _, err := up.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 16+5)
	if _, err := io.ReadFull(up, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:16], want[:16]) || string(got[16:]) != "hello" {
		t.Errorf("got %x, want %x and hello", got, want[:16])
	}
}

func TestRelayRefusesOtherRequests(t *testing.T) {
	device := newKey(t)
	addr := startWeb(t, device, func(trust.Key) bool { return false })
	for _, tt := range []struct {
		path, protocol string
		code           coord.Code
	}{
		{coord.RelayPath, "overlay", coord.CodeBadRequest},
		{"/v1/stream", coord.RelayProtocol, coord.CodeBadRequest},
		{"/", coord.RelayProtocol, coord.CodeBadRequest},
	} {
		_, err := dialWeb(t, addr, newKey(t), device).Upgrade(t.Context(), tt.path, tt.protocol)
		if e, ok := errors.AsType[*coord.Error](err); !ok || e.Code != tt.code {
			t.Errorf("%s %s: %v, want %s", tt.path, tt.protocol, err, tt.code)
		}
	}
	if _, err := dialWeb(t, addr, newKey(t), device).Hello(t.Context()); err == nil {
		t.Error("a relay says hello as a server does")
	}
}

// Whoever is on the way has another key.
func TestRelayIsKnownByItsDeviceKey(t *testing.T) {
	addr := startWeb(t, newKey(t), func(trust.Key) bool { return false })
	d := coord.Dialer{Servers: []string{addr}, Device: newKey(t), Verify: func(got trust.Hash) error {
		return &coord.PinError{Got: got}
	}}
	if _, err := d.Dial(t.Context()); err == nil {
		t.Error("a foreign key was accepted")
	}
}

// A member that opens connections without end is told so, and costs strangers
// nothing.
func TestRelayBoundsTheConnectionsOfAMember(t *testing.T) {
	device, member := newKey(t), newKey(t)
	addr := startWeb(t, device, func(k trust.Key) bool { return k == publicOf(member) })
	for i := range maxRelayMember + 1 {
		_, err := dialWeb(t, addr, member, device).Upgrade(t.Context(), coord.RelayPath, coord.RelayProtocol)
		e, refused := errors.AsType[*coord.Error](err)
		switch {
		case i < maxRelayMember && err != nil:
			t.Fatalf("connection %d: %v", i, err)
		case i == maxRelayMember && (!refused || e.Code != coord.CodeRateLimited):
			t.Fatalf("connection %d: %v, want %s", i, err, coord.CodeRateLimited)
		}
	}
	if _, err := dialWeb(t, addr, newKey(t), device).Upgrade(t.Context(), coord.RelayPath, coord.RelayProtocol); err != nil {
		t.Errorf("a stranger: %v", err)
	}
}

type addrConn struct {
	net.Conn
	remote net.Addr
}

func (c addrConn) RemoteAddr() net.Addr { return c.remote }
func (c addrConn) Close() error         { return nil }

func connFrom(ip string) addrConn {
	return addrConn{remote: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(ip), 1))}
}

func TestRelayGateCountsByNetworkUntilTheMemberIsKnown(t *testing.T) {
	g := newRelayGate(nil)
	held := make([]*relayConn, 0, maxRelayAnonymous)
	for range maxRelayAnonymous {
		c := g.enter(connFrom("192.0.2.1"))
		if c == nil {
			t.Fatalf("refused after %d", len(held))
		}
		held = append(held, c)
	}
	if g.enter(connFrom("192.0.2.200")) != nil {
		t.Error("the network has one more than it may")
	}
	other := g.enter(connFrom("198.51.100.1"))
	if other == nil {
		t.Fatal("another network was refused")
	}
	for range 2 { // the second time changes nothing
		if !held[0].admit(trust.Key{1}) {
			t.Fatal("a member was refused")
		}
	}
	if g.enter(connFrom("192.0.2.200")) == nil {
		t.Error("the member's place is still taken")
	}
	if g.strangers != maxRelayAnonymous+1 {
		t.Errorf("%d strangers, want %d", g.strangers, maxRelayAnonymous+1)
	}
	_ = other.Close()
	_ = other.Close()
	_ = held[0].Close()
	if g.strangers != maxRelayAnonymous || len(g.members) != 0 || len(g.networks) != 1 {
		t.Errorf("left: %d strangers, members %v, networks %v", g.strangers, g.members, g.networks)
	}
}

func TestListenRelayExplains(t *testing.T) {
	s, err := listenRelay("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if len(s.udp) != 1 || s.udp[0].LocalAddr().(*net.UDPAddr).Port != int(s.port()) {
		t.Errorf("udp %v beside tcp %v", s.udp, s.tcp.Addr())
	}
	_, err = listenRelay(s.tcp.Addr().String())
	if e, ok := errors.AsType[*Error](err); !ok || !strings.Contains(e.Message, "used by pid ") || !strings.Contains(e.Hint, "--listen :") {
		t.Errorf("a taken port: %+v", err)
	}
	for _, bad := range []string{"", "443", ":x", "a:b:c", ":65536", ":-1"} {
		if _, err := listenRelay(bad); KindOf(err) != Usage {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
}

// A UDP port that somebody has is named as such; nothing stays open.
func TestListenRelayWantsBothProtocols(t *testing.T) {
	taken := must[*net.UDPConn](t)(net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}))
	defer taken.Close()
	address := taken.LocalAddr().String()
	for range 2 {
		_, err := listenRelay(address)
		if e, ok := errors.AsType[*Error](err); !ok || !strings.HasPrefix(e.Message, "cannot listen on "+address+"/udp: used by pid ") {
			t.Fatalf("got %v", err)
		}
	}
}

func TestPublicOfRelay(t *testing.T) {
	for public, want := range map[string]string{
		"relay.example.org": "relay.example.org:443", "relay.example.org:8443": "relay.example.org:8443",
		"192.0.2.1": "192.0.2.1:443", "2001:db8::1": "[2001:db8::1]:443", "[2001:db8::1]:1": "[2001:db8::1]:1",
	} {
		if got, err := publicOfRelay(public, 443); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", public, got, err, want)
		}
	}
	for _, bad := range []string{":443", "a b", "x:y", "x:0"} {
		if got, err := publicOfRelay(bad, 443); err == nil {
			t.Errorf("%q became %s", bad, got)
		}
	}
}
