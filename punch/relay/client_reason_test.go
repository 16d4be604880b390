package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// replaced gives the world another client, of another configuration.
func (w *world) replaced(change func(*ClientConfig)) {
	w.t.Helper()
	change(&w.cfg)
	client, err := NewClient(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.client = client
}

// reasoned runs a test of a client of another configuration.
func reasoned(t *testing.T, change func(*ClientConfig), happen func(w *world)) {
	t.Helper()
	syncedWith(t, func(w *world) { w.replaced(change) }, happen)
}

func long(c *ClientConfig) { c.Credentials = append(c.Credentials, make([]byte, MaxCredentials-64)...) }

// TestLongCredentials: what is too long for a datagram goes over TLS.
func TestLongCredentials(t *testing.T) {
	reasoned(t, long, func(w *world) {
		w.after(6*leg + 2*time.Millisecond)
		w.wantStates("tls")
		w.carries()
		w.client.NetworkChanged()
		w.client.SetAddrs(append(w.addrs, netip.MustParseAddrPort("192.0.2.2:3478")))
		w.after(5 * time.Minute)
		w.wantStates("tls")
		if len(w.sent) > 0 || w.dials != 1 || !errors.Is(w.last.Err, errLong) {
			t.Errorf("sent %v over UDP, %d connections, state %+v", w.sent, w.dials, w.last)
		}
	})
	reasoned(t, long, func(w *world) {
		w.tcp = false
		w.after(time.Minute)
		if w.last.Transport != None || !errors.Is(w.last.Err, errLong) || !errors.Is(w.last.Err, context.DeadlineExceeded) {
			t.Errorf("state %+v", w.last)
		}
	})
	private, _, device := nodeKeys(t, 1)
	if _, err := NewClient(ClientConfig{PrivateKey: private, Device: device, Relay: relayKey(9), Credentials: make([]byte, MaxCredentials+1)}); !errors.Is(err, errCredentials) {
		t.Errorf("credentials of any length: %v", err)
	}
}

// TestRefusalIsTold: over TLS alone as well, and no longer than it lasts.
func TestRefusalIsTold(t *testing.T) {
	refuse := func([]byte) (Identity, error) { return Identity{}, errors.New("a stranger") }
	syncedWith(t, func(w *world) { w.addrs = nil }, func(w *world) {
		w.verify = refuse
		w.after(time.Second)
		for range 20 {
			w.client.NetworkChanged()
			w.after(time.Second)
			if w.last.Transport != None || !errors.Is(w.last.Err, errStranger) {
				t.Fatalf("state %+v", w.last)
			}
		}
		w.verify = verifyNode
		w.after(maxRefused*11/10 + time.Second)
		if w.last.Transport != TLS || w.last.Err == nil || errors.Is(w.last.Err, errStranger) {
			t.Errorf("state %+v", w.last)
		}
	})
	synced(t, func(w *world) { // UDP dies before the relay learns of the member
		w.verify = refuse
		w.after(time.Second)
		w.udp, w.verify = false, verifyNode
		w.after(maxRefused*11/10 + time.Second)
		if w.last.Transport != TLS || !errors.Is(w.last.Err, errNoAnswer) {
			t.Errorf("state %+v", w.last)
		}
	})
}

// TestRefusedDial: there is no UDP address, and the server upgrades nothing.
func TestRefusedDial(t *testing.T) {
	failure := errors.New("there is no relay here")
	dial := func(context.Context) (net.Conn, [16]byte, error) { return nil, [16]byte{}, failure }
	prepare := func(w *world) {
		w.addrs = nil
		w.replaced(func(c *ClientConfig) { c.Dial = dial })
	}
	syncedWith(t, prepare, func(w *world) {
		w.after(time.Minute)
		if w.last.Transport != None || !errors.Is(w.last.Err, failure) {
			t.Errorf("state %+v", w.last)
		}
	})
}

// TestLostPong: the relay moved to the address asked last, and its answer from
// there is lost.
func TestLostPong(t *testing.T) {
	synced(t, func(w *world) {
		second := netip.MustParseAddrPort("192.0.2.2:3478")
		w.after(time.Second)
		lose := w.addrs[0]
		w.detours = map[netip.AddrPort]time.Duration{lose: time.Millisecond}
		w.client.SetAddrs([]netip.AddrPort{second, w.addrs[0]})
		w.loseUp = func(b []byte) bool { return kindOf(b) == kindHello && w.count(kindHello) < 3 } // then all are asked
		w.lostDown = func(_ []byte, relay netip.AddrPort) bool { return relay == lose }
		w.client.Doubt()
		w.after(time.Second)
		w.wantStates("udp")
		if w.last.Addr != second || w.asked[len(w.asked)-1] != second {
			t.Errorf("the client is at %v, and asked %v", w.last.Addr, w.asked)
		}
		n := len(w.asked)
		w.lostDown = nil
		w.after(5 * time.Second)
		if len(w.asked) > n+1 {
			t.Errorf("%d more HELLOs", len(w.asked)-n)
		}
	})
}

// TestSettles: all addresses answer; one is used, and the relay sends from it.
func TestSettles(t *testing.T) {
	synced(t, func(w *world) {
		all := append(slices.Clone(w.addrs), netip.MustParseAddrPort("192.0.2.2:3478"), netip.MustParseAddrPort("192.0.2.3:3478"))
		w.client.SetAddrs(all)
		w.after(5 * time.Second)
		w.wantStates("udp")
		if last := w.asked[len(w.asked)-1]; last != w.last.Addr || len(w.asked) > 8 {
			t.Errorf("the client is at %v, and asked %v", w.last.Addr, w.asked)
		}
	})
}

// TestRestartUnnoticed: nobody doubts, and the relay forgets its nodes.
func TestRestartUnnoticed(t *testing.T) {
	synced(t, func(w *world) {
		w.after(time.Second)
		w.restart()
		w.after(11*time.Second + 4*leg)
		w.wantStates("udp")
		w.carries()
	})
}
