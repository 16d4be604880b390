package direct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"reflect"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

// stunTCP answers one Binding request on each connection, and then waits for its
// end.
func stunTCP(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var g errgroup.Group
	g.Go(func() error {
		for {
			conn, err := l.Accept()
			if err != nil {
				return nil
			}
			g.Go(func() error {
				defer conn.Close()
				if err := conn.SetDeadline(time.Now().Add(testFor)); err != nil {
					return err
				}
				b := make([]byte, 20)
				if _, err := io.ReadFull(conn, b); err != nil {
					return err
				}
				from := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
				_, err := conn.Write(punch.AnswerBinding(b, from, func([]byte) (key, token []byte, ok bool) { return nil, nil, true }))
				_, _ = conn.Read(b)
				return err
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// tcpSides are the configurations of two sides whose signals pass if carry says
// so.
func tcpSides(t *testing.T, carry func(n int) bool) (a, b TCPConfig) {
	server := stunTCP(t)
	toA, toB := make(chan []byte, 64), make(chan []byte, 64)
	var sent atomic.Int64
	side := func(out chan<- []byte, in <-chan []byte) TCPConfig {
		return TCPConfig{
			Servers: []netip.AddrPort{server}, Signals: in,
			Send: func(b []byte) error {
				if !carry(int(sent.Add(1))) {
					return nil
				}
				select {
				case out <- b:
					return nil
				default:
					return errors.New("the mailbox is full")
				}
			},
		}
	}
	a, b = side(toB, toA), side(toA, toB)
	a.PrivateKey, b.Peer = NewKey()
	b.PrivateKey, a.Peer = NewKey()
	return a, b
}

func always(int) bool { return true }

// dialBoth runs both sides.
func dialBoth(t *testing.T, a, b TCPConfig) (x, y net.Conn, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), testFor)
	defer cancel()
	var g errgroup.Group
	g.Go(func() (err error) { x, err = DialTCP(ctx, a); return err })
	g.Go(func() (err error) { y, err = DialTCP(ctx, b); return err })
	err = g.Wait()
	for _, c := range []net.Conn{x, y} {
		if c != nil {
			t.Cleanup(func() { c.Close() })
			err = errors.Join(err, c.SetDeadline(time.Now().Add(testFor)))
		}
	}
	return x, y, err
}

// talk proves that two ends are of one connection.
func talk(t *testing.T, x, y net.Conn) {
	t.Helper()
	for _, pair := range [][2]net.Conn{{x, y}, {y, x}} {
		want := fmt.Sprintf("from %v", pair[0].LocalAddr())
		if _, err := pair[0].Write([]byte(want)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(pair[1], got); err != nil || string(got) != want {
			t.Errorf("read %q, %v; want %q", got, err, want)
		}
	}
}

func TestDialTCP(t *testing.T) {
	a, b := tcpSides(t, always)
	x, y, err := dialBoth(t, a, b)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, x, y)
}

// TestDialTCPLossySignals loses every third signal.
func TestDialTCPLossySignals(t *testing.T) {
	for lost := range 3 {
		a, b := tcpSides(t, func(n int) bool { return n%3 != lost })
		x, y, err := dialBoth(t, a, b)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, x, y)
	}
}

// TestDialTCPMapped asks a function instead of servers.
func TestDialTCPMapped(t *testing.T) {
	a, b := tcpSides(t, always)
	server := a.Servers[0]
	for _, c := range []*TCPConfig{&a, &b} {
		c.Servers = nil
		c.Mapped = func(ctx context.Context, port uint16) (netip.AddrPort, io.Closer, error) {
			return askTCP(ctx, port, server)
		}
	}
	x, y, err := dialBoth(t, a, b)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, x, y)
}

// TestDialTCPStranger has two sides that know each other's offers but not each
// other.
func TestDialTCPStranger(t *testing.T) {
	a, b := tcpSides(t, always)
	b.Group[0]++
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := DialTCP(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialled a stranger: %v", err)
	}
}

// TestDialTCPForbidden has one side, and then both, not connect to the other.
func TestDialTCPForbidden(t *testing.T) {
	nothing := func(netip.AddrPort) bool { return false }
	a, b := tcpSides(t, always)
	b.Allowed = nothing
	x, y, err := dialBoth(t, a, b)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, x, y)
	a, b = tcpSides(t, always)
	a.Allowed, b.Allowed = nothing, nothing
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var g errgroup.Group
	for _, c := range []TCPConfig{a, b} {
		g.Go(func() error {
			conn, err := DialTCP(ctx, c)
			if err == nil {
				return errors.Join(errors.New("connected"), conn.Close())
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestShakeIsSilent lets the side that follows hear what proves nothing: it says
// nothing.
func TestShakeIsSilent(t *testing.T) {
	for name, said := range map[string][]byte{
		"nothing": nil, "noise": make([]byte, 32), "too little": {1}, "HTTP": []byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
	} {
		x, y := net.Pipe()
		s := &shaking{proof: []byte("key"), won: make(chan net.Conn, 1)}
		var g errgroup.Group
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		g.Go(func() error { s.shake(ctx, x); return nil })
		_ = y.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		_, _ = y.Write(said)
		if n, err := y.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%s: answered (%v)", name, err)
		}
		_ = g.Wait()
		cancel()
		if len(s.won) != 0 {
			t.Errorf("%s: won", name)
		}
		y.Close()
	}
}

// TestShakeEnds begins when its attempt is over.
func TestShakeEnds(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range 5000 {
		synctest.Test(t, func(t *testing.T) {
			x, y := net.Pipe()
			defer y.Close()
			began := time.Now()
			s := &shaking{proof: []byte("key"), won: make(chan net.Conn, 1)}
			s.shake(over, x)
			if took := time.Since(began); took > 0 {
				t.Fatalf("took %v", took)
			}
		})
	}
}

// TestShakeWithItself has a socket that opened simultaneously to its own port, as
// one can where nobody listens: neither side takes itself for the peer.
func TestShakeWithItself(t *testing.T) {
	for _, leads := range []bool{false, true} {
		l, err := listenReused(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		conn, err := DialFrom(t.Context(), port, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
		if err != nil {
			t.Fatal(err)
		}
		s := &shaking{proof: []byte("key"), leads: leads, won: make(chan net.Conn, 1)}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		s.shake(ctx, conn)
		cancel()
		if len(s.won) != 0 {
			t.Errorf("leads %v: a connection to itself won", leads)
		}
	}
}

// TestShakeTakesOne has both sides agree on one of several connections.
func TestShakeTakesOne(t *testing.T) {
	key := []byte("key")
	lead := &shaking{proof: key, leads: true, won: make(chan net.Conn, 1)}
	follow := &shaking{proof: key, won: make(chan net.Conn, 1)}
	var g errgroup.Group
	ends := map[net.Conn]net.Conn{}
	for range 5 {
		x, y := net.Pipe()
		ends[x] = y
		g.Go(func() error { lead.shake(t.Context(), x); return nil })
		g.Go(func() error { follow.shake(t.Context(), y); return nil })
	}
	_ = g.Wait()
	if len(lead.won) != 1 || len(follow.won) != 1 {
		t.Fatalf("%d and %d won", len(lead.won), len(follow.won))
	}
	if x, y := <-lead.won, <-follow.won; ends[x] != y {
		t.Error("not the same connection")
	}
}

func TestOfferRoundTrip(t *testing.T) {
	want := offer{
		nonce: attempt{1}, seen: attempt{2}, mapped: 1,
		addrs: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4"), netip.MustParseAddrPort("[2001:db8::1]:5")},
	}
	got, err := parseOffer(want.marshal())
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func FuzzParseOffer(f *testing.F) {
	o := offer{addrs: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4"), netip.MustParseAddrPort("[2001:db8::1]:5")}, mapped: 2}
	f.Add(o.marshal())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := parseOffer(b)
		if err != nil {
			return
		}
		if len(o.addrs) > MaxAddresses || o.mapped > len(o.addrs) {
			t.Errorf("%d addresses, %d mapped", len(o.addrs), o.mapped)
		}
		again, err := parseOffer(o.marshal())
		if err != nil || !reflect.DeepEqual(again, o) {
			t.Errorf("%+v became %+v, %v", o, again, err)
		}
	})
}

// A peer cannot have us connect into our own LAN by a claim.
func TestPrivateClaim(t *testing.T) {
	d := &dialing{mapped: []netip.AddrPort{netip.MustParseAddrPort("198.51.100.7:999")}}
	for _, addr := range []string{"192.168.1.1:80", "100.64.0.1:80", "169.254.169.254:80", "[fd00::1]:80"} {
		lan := netip.MustParseAddrPort(addr)
		if d.eligible(lan, offer{addrs: []netip.AddrPort{lan}, mapped: 1}) {
			t.Errorf("connects to %v because a peer says so", lan)
		}
	}
}
