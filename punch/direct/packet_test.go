package direct

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testFor is how long a test waits for what has to come.
const testFor = 10 * time.Second

func loopback() netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:0") }

// side is one of several programs whose signals go straight to each other.
type side struct {
	*PacketConn
	key     punch.Key
	signals chan Signal
}

// sides opens n ports.
func sides(t *testing.T, n int) []*side {
	t.Helper()
	return sidesThat(t, n, deliver)
}

// sidesThat opens n ports whose signals are carried by a function.
func sidesThat(t *testing.T, n int, carry func(all []*side, from *side, out Signal) error) []*side {
	t.Helper()
	all := make([]*side, n)
	privates := make([][32]byte, n)
	for i := range all {
		all[i] = &side{signals: make(chan Signal, 64)}
		privates[i], all[i].key = NewKey()
	}
	for i, s := range all {
		conn, err := Listen(Config{
			PrivateKey: privates[i], Address: loopback(), Signals: s.signals,
			Send: func(out Signal) error { return carry(all, s, out) },
		})
		if err != nil {
			t.Fatal(err)
		}
		s.PacketConn = conn
		t.Cleanup(func() { conn.Close() })
		// A datagram that is lost fails a test; it does not stop it.
		if err := conn.SetReadDeadline(time.Now().Add(testFor)); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// deliver carries a signal to whom it is for, if there is room.
func deliver(all []*side, from *side, out Signal) error {
	for _, to := range all {
		if to.key != out.Peer {
			continue
		}
		select {
		case to.signals <- Signal{from.key, out.Body}:
			return nil
		default:
			return errors.New("the mailbox is full")
		}
	}
	return errors.New("nobody has that key")
}

// connect has every two sides know each other.
func connect(t *testing.T, all []*side) {
	t.Helper()
	g, ctx := errgroup.WithContext(t.Context())
	ctx, cancel := context.WithTimeout(ctx, testFor)
	defer cancel()
	for _, a := range all {
		for _, b := range all {
			if a != b {
				g.Go(func() error { return a.Connect(ctx, b.key) })
			}
		}
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestThreePeers(t *testing.T) {
	all := sides(t, 3)
	connect(t, all)
	for i, a := range all {
		for j, b := range all {
			if i == j {
				continue
			}
			text := fmt.Sprintf("from %d to %d", i, j)
			if _, err := a.WriteTo([]byte(text), Addr{b.key}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 100)
			n, from, err := b.ReadFrom(got)
			if err != nil || string(got[:n]) != text || from != (Addr{a.key}) {
				t.Errorf("read %q of %v (%v), want %q of %v", got[:n], from, err, text, Addr{a.key})
			}
		}
	}
}

// TestWriteAfterConnect writes when Connect returns, while the agent is still busy
// with its first signal and so has told of no path.
func TestWriteAfterConnect(t *testing.T) {
	busy := make(chan struct{})
	all := sidesThat(t, 2, func(all []*side, from *side, out Signal) error {
		err := deliver(all, from, out)
		if from == all[0] {
			<-busy
		}
		return err
	})
	t.Cleanup(func() { close(busy) })
	// The only signal there will be has to find its peer.
	all[1].agent.SetPeer(punch.Peer{Key: all[0].key, Nonce: nonceOf([32]byte{}, all[0].key), Online: true})
	connect(t, all)
	if _, err := all[0].WriteTo([]byte("at once"), Addr{all[1].key}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, _, err := all[1].ReadFrom(b); err != nil || string(b[:n]) != "at once" {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

// TestStranger sends from an address that has proven nothing.
func TestStranger(t *testing.T) {
	all := sides(t, 2)
	connect(t, all)
	stranger, err := net.Dial("udp", all[0].LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if _, err := stranger.Write([]byte("forged")); err != nil {
		t.Fatal(err)
	}
	if _, err := all[1].WriteTo([]byte("real"), Addr{all[0].key}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, _, err := all[0].ReadFrom(b)
	if err != nil || string(b[:n]) != "real" {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestWriteRefuses(t *testing.T) {
	all := sides(t, 2)
	connect(t, all)
	to := Addr{all[1].key}
	like := append([]byte{0, 1, 0, 0, 0x21, 0x12, 0xA4, 0x42}, make([]byte, 12)...)
	for name, test := range map[string]struct {
		b    []byte
		to   net.Addr
		want error
	}{
		"like STUN":     {like, to, errSTUN},
		"too long":      {make([]byte, MaxDatagram+1), to, errSize},
		"unknown peer":  {[]byte("x"), Addr{}, errUnknown},
		"other address": {[]byte("x"), &net.UDPAddr{}, errUnknown},
	} {
		if _, err := all[0].WriteTo(test.b, test.to); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	if err := all[0].SetWriteDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := all[0].WriteTo([]byte("x"), to); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
}

func TestReadDeadline(t *testing.T) {
	s := sides(t, 1)[0]
	for _, wait := range []time.Duration{0, 20 * time.Millisecond} {
		if err := s.SetReadDeadline(time.Now().Add(wait)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.ReadFrom(nil); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("deadline in %v: %v", wait, err)
		}
	}
}

// TestClose ends a read and a Connect that wait.
func TestClose(t *testing.T) {
	all := sides(t, 2)
	var g errgroup.Group
	g.Go(func() error {
		_, _, err := all[0].ReadFrom(nil)
		return err
	})
	g.Go(func() error { return all[0].Connect(context.Background(), all[1].key) })
	time.Sleep(20 * time.Millisecond)
	if err := all[0].Close(); err != nil {
		t.Error(err)
	}
	if err := g.Wait(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("waiting ended with %v", err)
	}
	for name, f := range map[string]func() error{
		"close": all[0].Close,
		"write": func() error { _, err := all[0].WriteTo([]byte("x"), Addr{all[1].key}); return err },
		"read":  func() error { _, _, err := all[0].ReadFrom(nil); return err },
	} {
		if err := f(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// TestConcurrent has all methods run against each other, for the race detector.
func TestConcurrent(t *testing.T) {
	all := sides(t, 2)
	connect(t, all)
	const count = 200
	var g errgroup.Group
	for i, s := range all {
		to := Addr{all[1-i].key}
		for range 2 {
			g.Go(func() error {
				for range count {
					if _, err := s.WriteTo([]byte("data"), to); err != nil {
						return err
					}
				}
				return nil
			})
			g.Go(func() error {
				b := make([]byte, 100)
				for {
					if err := s.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
						return err
					}
					n, _, err := s.ReadFrom(b)
					if errors.Is(err, os.ErrDeadlineExceeded) {
						return nil
					}
					if err != nil || !bytes.Equal(b[:n], []byte("data")) {
						return fmt.Errorf("read %q: %w", b[:n], err)
					}
					s.Path(to.Key)
				}
			})
		}
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestLateSide connects to a side that comes later.
func TestLateSide(t *testing.T) {
	all := sides(t, 2)
	var g errgroup.Group
	ctx, cancel := context.WithTimeout(t.Context(), testFor)
	defer cancel()
	g.Go(func() error { return all[0].Connect(ctx, all[1].key) })
	time.Sleep(100 * time.Millisecond)
	g.Go(func() error { return all[1].Connect(ctx, all[0].key) })
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestSecretKey(t *testing.T) {
	a, b := SecretKey([]byte("secret"), "a"), SecretKey([]byte("secret"), "b")
	if a == b || a != SecretKey([]byte("secret"), "a") || a == SecretKey([]byte("other"), "a") {
		t.Error("keys do not depend on secret and name")
	}
}
