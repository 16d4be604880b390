package tun

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// setMTU is ip link set dev name mtu n.
func (s *space) setMTU(t *testing.T, name string, n int) {
	t.Helper()
	s.do(t, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, n)
	})
}

// follows sets the MTU of an interface, and waits until messages have the size
// of want.
func follows(t *testing.T, s *space, n *tunnel, mtu, want int) {
	t.Helper()
	name, err := n.Name()
	check(t, err)
	s.setMTU(t, name, mtu)
	eventually(t, 5*time.Second, "the mtu is read", func() bool {
		got, err := n.MTU()
		return err == nil && got == want
	})
}

// Containers of small packets are as large as the interface allows at the
// moment, but never larger than what was configured.
func TestContainersFollowMTU(t *testing.T) {
	s := newSpace(t)
	c := Config{MTU: 1400, Addrs: []netip.Prefix{netip.MustParsePrefix("100.64.0.2/24")}}
	n := kernelTunnelOf(t, s, "near0", c)
	n.peers.large = true
	n.peers.set([]Peer{capable(keyA)}) // who has 100.64.0.1
	n.peers.path(keyA, netip.MustParseAddrPort("192.0.2.1:1"), 0)
	go func() {
		for range n.Events() { // as wireguard-go does
		}
	}()
	client := udpIn(t, s, 0)
	for _, step := range []struct{ mtu, want int }{{1400, 1400}, {1280, 1280}, {600, 600}, {300, minMTU}, {1350, 1350}, {9000, 1400}} {
		follows(t, s, n, step.mtu, step.want)
		for range 40 {
			if _, err := client.WriteToUDPAddrPort(make([]byte, 72), netip.MustParseAddrPort("100.64.0.1:5000")); err != nil {
				t.Fatal(err)
			}
		}
		largest := 0
		for _, m := range ours(read(t, n, buffers())) {
			largest = max(largest, len(m))
		}
		if least := step.want - recordHeaderSize - 100; largest > step.want || largest <= least {
			t.Errorf("mtu %d: containers of %d bytes, want above %d and at most %d", step.mtu, largest, least, step.want)
		}
		if got := n.reader.largest; got != superSize(step.want) {
			t.Errorf("mtu %d: super-packets of %d bytes, want %d", step.mtu, got, superSize(step.want))
		}
	}
}

// hop is a host between two nodes that forwards datagrams.
type hop struct {
	conn    *net.UDPConn
	largest atomic.Int64 // bytes, of those from a
}

// between puts a hop with the address 10.9.0.3 between a (10.9.0.1) and b
// (10.9.0.2), who is in far.
func between(t *testing.T, far *space, a, b *node) *hop {
	t.Helper()
	h := &hop{conn: listenIn(t, far, "10.9.0.3:0")}
	toA, toB := at("10.9.0.1", a.Port()), at("10.9.0.2", b.Port())
	go func() {
		p := make([]byte, maxPacket)
		for {
			n, from, err := h.conn.ReadFromUDPAddrPort(p)
			switch {
			case err != nil:
				return
			case from != toA:
				_, _ = h.conn.WriteToUDPAddrPort(p[:n], toA)
				continue
			}
			h.largest.Store(max(h.largest.Load(), int64(n)))
			_, _ = h.conn.WriteToUDPAddrPort(p[:n], toB)
		}
	}()
	here := h.conn.LocalAddr().(*net.UDPAddr).AddrPort()
	check(t, a.SetEndpoint(b.self.Key, here, netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, here, netip.AddrPort{}))
	return h
}

// Who lowers the MTU because a path loses large datagrams gets smaller ones, on
// the paths in use, and the larger ones back afterwards.
func TestDatagramsFollowMTU(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	a.self.Capabilities, b.self.Capabilities = a.Capabilities(), b.Capabilities()
	pairUp(t, a, b)
	h := between(t, sb, a, b)
	greet(t, a, b)
	data := pattern(300_000, 8)
	for _, step := range []struct{ mtu, want int }{{1400, 1400}, {1280, 1280}, {9000, 1400}} {
		follows(t, sa, a.tunnel, step.mtu, step.want)
		// The messages before the change are out.
		transfer(t, sa, sb, "100.99.0.2", pattern(10, 1))
		h.largest.Store(0)
		transfer(t, sa, sb, "100.99.0.2", data)
		if got := h.largest.Load(); got > int64(step.want)+keepaliveSize || got <= int64(step.want)-100 {
			t.Errorf("mtu %d: datagrams of %d bytes, want about %d", step.mtu, got, step.want+keepaliveSize)
		}
	}
}
