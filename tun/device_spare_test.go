package tun

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

// spareIn opens a spare socket in the namespace of a node.
func (d *node) spareIn(t *testing.T, s *space) uint16 {
	t.Helper()
	var ports []uint16
	s.do(t, func() (err error) {
		ports, err = d.OpenSockets(2)
		return err
	})
	d.CloseSockets(ports[1:])
	return ports[0]
}

// Two nodes talk over spare sockets: handshake, small packets and large messages;
// over the main ones and back; and after one has opened its sockets anew.
func TestThroughSpare(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	for _, d := range []*node{a, b} {
		d.self.Capabilities = d.Capabilities()
	}
	pairUp(t, a, b)
	pa, pb := a.spareIn(t, sa), b.spareIn(t, sb)
	overSpare := func() {
		t.Helper()
		check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", pb), at("10.9.0.1", pa)))
		check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", pa), netip.AddrPortFrom(netip.Addr{}, pb)))
	}
	overSpare()
	greet(t, a, b)
	if got, want := a.endpoint(t, b.self.Key), at("10.9.0.2", pb); got != want {
		t.Errorf("endpoint %v, want %v", got, want)
	}
	echo(t, sb, "100.99.0.2:7000")
	client := listenIn(t, sa, "100.99.0.1:0")
	reaches := func(mark byte) {
		t.Helper()
		answered(t, client, "100.99.0.2:7000", beforeRetry)
		transfer(t, sa, sb, "100.99.0.2", pattern(1<<20, mark))
	}
	reaches(1)
	check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", a.Port()), netip.AddrPort{}))
	reaches(2)
	overSpare()
	reaches(3)
	sa.do(t, a.Rebind)
	reaches(4)
	check(t, a.SetPeers(nil))
	if err := a.Send([]byte("x"), at("10.9.0.2", 9), at("10.9.0.1", pa), 0); !errors.Is(err, errNoSocket) {
		t.Errorf("the socket of a peer that has gone is open: %v", err)
	}
}

// A device that opens its sockets anew keeps port, session and paths.
func TestRebindKeepsSessions(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	pairUp(t, a, b)
	check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), at("10.9.0.1", 0)))
	check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", a.Port()), at("10.9.0.2", 0)))
	greet(t, a, b)
	echo(t, sb, "100.99.0.2:7000")
	client := listenIn(t, sa, "100.99.0.1:0")
	answered(t, client, "100.99.0.2:7000", beforeRetry)
	before, err := a.Stats()
	check(t, err)
	for range 5 {
		port := a.Port()
		sa.do(t, a.Rebind)
		if a.Port() != port {
			t.Fatalf("port %d, was %d", a.Port(), port)
		}
		answered(t, client, "100.99.0.2:7000", time.Second)
	}
	after, err := a.Stats()
	check(t, err)
	if h1, h2 := before[b.self.Key].LastHandshake, after[b.self.Key].LastHandshake; !h1.Equal(h2) {
		t.Errorf("handshake of %v, then of %v: want the same", h1, h2)
	}
	check(t, a.Close())
	if err := a.Rebind(); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}
