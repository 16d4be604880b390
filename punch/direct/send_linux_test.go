package direct

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
)

// TestOpenerTTL proves that the TTL of an opener is its own.
func TestOpenerTTL(t *testing.T) {
	receiver, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback()))
	if err != nil {
		t.Fatal(err)
	}
	defer receiver.Close()
	if err := receiver.SetReadDeadline(time.Now().Add(testFor)); err != nil {
		t.Fatal(err)
	}
	control := ipv4.NewPacketConn(receiver)
	if err := control.SetControlMessage(ipv4.FlagTTL, true); err != nil {
		t.Fatal(err)
	}
	to := receiver.LocalAddr().(*net.UDPAddr).AddrPort()
	for _, own := range []netip.AddrPort{loopback(), {}} {
		p, err := Listen(Config{PrivateKey: SecretKey([]byte("x"), "y"), Address: own, Send: func(Signal) error { return nil }})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		for _, want := range []int{2, 0, 3} {
			if err := p.send([]byte("x"), to, netip.AddrPort{}, want); err != nil {
				t.Fatal(err)
			}
			_, cm, _, err := control.ReadFrom(make([]byte, 10))
			if err != nil {
				t.Fatal(err)
			}
			if want == 0 {
				want = 64
			}
			if cm.TTL != want {
				t.Errorf("from %v: TTL %d, want %d", own, cm.TTL, want)
			}
		}
	}
}
