package tun

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// kernelTunnel is a tunnel on a real TUN of a namespace, with an address.
func kernelTunnel(t *testing.T, s *space, name string) *tunnel {
	t.Helper()
	return kernelTunnelOf(t, s, name, Config{MTU: 1400})
}

func kernelTunnelOf(t *testing.T, s *space, name string, c Config) *tunnel {
	t.Helper()
	var n *tunnel
	s.do(t, func() error {
		dev, err := wgtun.CreateTUN(name, 1400)
		if err != nil {
			return err
		}
		table := newPeers()
		if n, err = newTunnel(dev, table, newBind(c, table), c); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, mustAddr(t, "100.64.0.2/24")); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	})
	t.Cleanup(func() { check(t, n.Close()) })
	return n
}

// udpIn opens a UDP socket at the tunnel's address.
func udpIn(t *testing.T, s *space, port int) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	s.do(t, func() error {
		var err error
		c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(100, 64, 0, 2), Port: port})
		return err
	})
	t.Cleanup(func() { check(t, c.Close()) })
	return c
}

// The kernel takes what the writer joined, and gives every datagram to the
// socket, but for one that was damaged before.
func TestKernelTakesSuperPackets(t *testing.T) {
	s := newSpace(t)
	n := kernelTunnel(t, s, "split0")
	if !n.writer.udp {
		t.Skip("the kernel has no USO")
	}
	c := udpIn(t, s, 5000)
	packets := segments{udp: true, size: 1000, payload: pattern(30500, 4)}.packets()
	packets[7][500] ^= 1
	if _, err := n.Write(clones(packets), 0); err != nil {
		t.Fatal(err)
	}
	if !n.writer.udp {
		t.Error("the kernel refused super-packets")
	}
	b := make([]byte, maxPacket)
	check(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
	for i, p := range packets {
		if i == 7 {
			continue
		}
		k, err := c.Read(b)
		if err != nil || !bytes.Equal(b[:k], p[ipv4HeaderSize+udpHeaderSize:]) {
			t.Fatalf("datagram %d: %d bytes, %v", i, k, err)
		}
	}
}

// What the kernel left to the device comes out as full packets with right
// checksums: super-packets of UDP and TCP and plain packets.
func TestReadFromKernel(t *testing.T) {
	s := newSpace(t)
	n := kernelTunnel(t, s, "split0")
	c := udpIn(t, s, 0)
	payload := pattern(20500, 6)
	control := segmentControl(make([]byte, 0, controlSpace), 1000)
	to := netip.MustParseAddrPort("100.64.0.1:9")
	if _, _, err := c.WriteMsgUDPAddrPort(payload, control, to); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	dialed := make(chan error, 1)
	go func() {
		s.do(t, func() error {
			_, err := new(net.Dialer).DialContext(ctx, "tcp4", to.String())
			dialed <- err
			return nil
		})
	}()
	var got []byte
	syn := false
	for bufs := buffers(); len(got) < len(payload) || !syn; {
		for _, p := range read(t, n, bufs) {
			l := layoutOf(p)
			if l.headers == 0 {
				continue // the interface speaks IPv6 multicast too
			}
			if !l.verify(p) || l.transport == ipv4HeaderSize && plainSum(p[:l.transport], 0) != 0xffff {
				t.Fatalf("wrong checksum in % x", p[:40])
			}
			if l.flow.proto == unix.IPPROTO_UDP {
				got = append(got, p[l.headers:]...)
			} else {
				syn = true
			}
		}
	}
	if !bytes.Equal(got, payload) {
		t.Error("payload differs")
	}
	cancel()
	if err := <-dialed; err == nil {
		t.Error("nobody answered, but connected")
	}
}

// The kernel makes no super-packet that is too large for a message.
func TestKernelLimitsSuperPackets(t *testing.T) {
	s := newSpace(t)
	kernelTunnel(t, s, "split0")
	s.do(t, func() error {
		l, err := netlink.LinkByName("split0")
		if err != nil {
			return err
		}
		if got := l.Attrs().GSOMaxSize; got != maxSuper {
			t.Errorf("gso_max_size %d, want %d", got, maxSuper)
		}
		return nil
	})
}

// Super-packets of one real kernel go through containers into another one, which
// gives every datagram to the socket, with and without USO.
func TestKernelToKernel(t *testing.T) {
	for _, level := range []int{levelPlain, levelSome, levelWhole} {
		for _, offloads := range []string{"", offGRO} {
			kernelToKernel(t, level, offloads)
		}
	}
}

func kernelToKernel(t *testing.T, level int, offloads string) {
	near, far := newSpace(t), newSpace(t)
	c := Config{MTU: 1400, Addrs: []netip.Prefix{netip.MustParsePrefix("100.64.0.2/24")}, Offloads: offloads}
	a, b := kernelTunnelOf(t, near, "near0", c), kernelTunnelOf(t, far, "far0", c)
	a.peers.large, b.peers.large = true, true
	a.peers.set([]Peer{capable(keyA)}) // who has 100.64.0.1
	a.peers.path(keyA, netip.MustParseAddrPort("192.0.2.1:1"), 0)
	a.peers.byKey(keyA).level.now.Store(int32(level))
	b.peers.set([]Peer{capable(keyB)})
	far.do(t, func() error { // the other end has the other address
		l, err := netlink.LinkByName("far0")
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(l, mustAddr(t, "100.64.0.2/24")); err != nil {
			return err
		}
		return netlink.AddrAdd(l, mustAddr(t, "100.64.0.1/24"))
	})
	to := listenIn(t, far, "100.64.0.1:5000")
	payload := pattern(40500, 6)
	control := segmentControl(make([]byte, 0, controlSpace), 1000)
	if _, _, err := udpIn(t, near, 0).WriteMsgUDPAddrPort(payload, control, netip.MustParseAddrPort("100.64.0.1:5000")); err != nil {
		t.Fatal(err)
	}
	var got []byte
	room := make([]byte, maxPacket)
	for bufs := buffers(); len(got) < len(payload); {
		deliver(t, b, ours(read(t, a, bufs)))
		for {
			check(t, to.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
			n, err := to.Read(room)
			if err != nil {
				break
			}
			if n != min(1000, len(payload)-len(got)) {
				t.Fatalf("datagram of %d bytes", n)
			}
			got = append(got, room[:n]...)
		}
	}
	if !bytes.Equal(got, payload) {
		t.Errorf("level %d, offloads %q: payload differs", level, offloads)
	}
}

// ours is what wireguard-go would take: the interface speaks multicast too.
func ours(messages [][]byte) (out [][]byte) {
	for _, m := range messages {
		if _, dst := innerAddrs(m); dst == innerA {
			out = append(out, m)
		}
	}
	return out
}
