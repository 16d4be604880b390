package natlab

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	forgedPort    = 7 // nobody listens
	forgedSegment = 1000
	forgedBatch   = 40 // segments of a super-packet, and packets of a burst
	forgedRounds  = 20
)

// TestForgedInnerSource has a member send with inner source addresses that are
// not its own, alone, in bursts that share a message, and as super-packets. None
// may arrive, while the same from its own address does.
func TestForgedInnerSource(t *testing.T) {
	m := newMeshIn(t, Options{Delay: -1})
	var n [3]*member
	for i, name := range []string{"liar", "victim", "third"} {
		n[i] = m.join(t, mustServer(t, m.Lab, name))
	}
	liar, victim, third := n[0], n[1], n[2]
	mustDirect(t, liar, victim)
	mustDirect(t, third, victim)
	nobody := netip.AddrFrom4([4]byte(append(liar.addr.AsSlice()[:2], 255, 254)))
	for source, forged := range map[netip.Addr]bool{third.addr: true, nobody: true, netip.MustParseAddr("192.0.2.99"): true, liar.addr: false} {
		from := func(kind string) string { return fmt.Sprintf("iifname %s ip saddr %s %s", overlayDevice, source, kind) }
		pings := victim.tally(t, "pings", from("meta l4proto icmp"))
		packets := victim.tally(t, "packets", from(fmt.Sprintf("udp dport %d", forgedPort)))
		if forged {
			var s script
			s.add("ip addr add %s/32 dev lo", source)
			if err := liar.sh(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		ping := liar.Command(t.Context(), "ping", "-c", "5", "-i", "0.05", "-W", "1", "-I", source.String(), victim.addr.String())
		if err := ping.Run(); (err != nil) != forged {
			t.Errorf("ping from %s: %v", source, err)
		}
		burst(t, liar, netip.AddrPortFrom(source, 0), netip.AddrPortFrom(victim.addr, forgedPort))
		time.Sleep(200 * time.Millisecond)
		if p, u := pings(), packets(); (p > 0 || u > 0) == forged || (p == 0 || u == 0) != forged {
			t.Errorf("%d pings and %d packets from %s arrived; forged: %v", p, u, source, forged)
		}
		var s script
		s.add("nft delete table inet pings")
		s.add("nft delete table inet packets")
		if err := victim.sh(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
}

// burst sends UDP, many packets at a time and as super-packets.
func burst(t *testing.T, from *member, source, to netip.AddrPort) {
	t.Helper()
	var c *net.UDPConn
	err := from.inside(func() (err error) {
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(source), net.UDPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{forgedSegment, forgedSegment * forgedBatch} {
		for range forgedRounds {
			for range forgedSegment * forgedBatch / size {
				// What comes back when nobody listens is an error of the next write.
				_, _ = c.Write(make([]byte, size))
			}
			time.Sleep(5 * time.Millisecond)
		}
		var sockErr error
		err := raw.Control(func(fd uintptr) {
			sockErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, forgedSegment)
		})
		if err != nil || sockErr != nil {
			t.Fatal(err, sockErr)
		}
	}
}
