package natlab

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	hostileRate  = 100_000 // packets per second
	hostileLeast = 60_000  // what a busy machine must still make of it
	hostileKept  = 0.95    // of a flow at half of its maximum
	hostileGrown = 16 << 20
	hostileTries = 3
	hostileLead  = time.Second // the flood is longer than the flow
	hostileProbe = 2 * time.Second

	hostileAside = 9 // a port where nobody listens

	hostilePackets = 4096 // different ones, sent over and over
	hostileBatch   = 64   // of one sendmmsg
	hostileSize    = 64   // bytes of most fragments
	hostileLarge   = 1400 // and of every eighth

	ipHeader       = 20
	flowSize       = 1200
	fragmentHeader = 8
	maxFragments   = 64
)

// TestHostileFragments floods a node with fragments from an address nobody
// knows and, with forged sources, from its peer's: such as a stranger can make
// and such as one can make who reads the traffic and knows the session. Memory
// stays bounded and flows at half of their maximum alive. That is measured
// beside the same flood to a port where it ends at once: attacker and routers
// share the processors here, and only what the node makes of it counts. Other
// work of the machine lowers the share that arrives, so a bad one is measured
// again.
func TestHostileFragments(t *testing.T) {
	m := newMeshIn(t, Options{Delay: -1})
	a := m.join(t, mustServer(t, m.Lab, "a"))
	b := m.join(t, mustServer(t, m.Lab, "b"))
	mallory := mustServer(t, m.Lab, "mallory")
	mustDirect(t, a, b)
	serveIperf(t, b.Host, b.addr)
	var s script
	s.add("nft add table ip aside")
	s.add("nft add chain ip aside in '{ type filter hook prerouting priority raw; }'")
	s.add("nft add rule ip aside in udp dport %d drop", hostileAside)
	if err := b.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	peer, victim := endpointOf(t, b, a), endpointOf(t, a, b)
	f := &flood{from: mallory, kinds: hostileKinds(sniffSession(t, a, b, peer)), mallory: mallory.Addr(), peer: peer}
	f.aside = f.prepare(netip.AddrPortFrom(victim.Addr(), hostileAside))
	f.packets = f.prepare(victim)
	f.pid, f.length = b.daemon(t), time.Duration(runs(3, 10))*time.Second
	f.mustKeep(t, a, b)
	transfer(t, a.Host, b.Host, b.addr, 16<<20)
}

// mustKeep measures a flow of each kind until it is good enough.
func (f *flood) mustKeep(t *testing.T, a, b *member) {
	t.Helper()
	for name, keeps := range map[string]func(*testing.T, *flood, *member, *member) float64{"UDP": keepsUDP, "TCP": keepsTCP} {
		kept := 0.0
		for try := 0; try < hostileTries && kept < hostileKept; try++ {
			kept = max(kept, keeps(t, f, a, b))
		}
		if kept < hostileKept {
			t.Errorf("%.1f %% of the %s flow arrived", 100*kept, name)
		}
	}
}

// keepsUDP is the share of packets at half of the maximum that gets from one
// interface to the other. What the queue of the sender's loses, and the socket
// of iperf, is for want of processors, not the node's doing.
func keepsUDP(t *testing.T, f *flood, a, b *member) float64 {
	t.Helper()
	args := []string{"-u", "-l", "1200", "-b"}
	var most, got iperfResult
	f.beside(t, f.aside, hostileProbe, func(d time.Duration) { most = iperf(t, a.Host, b.addr, d, append(args, "0")...) })
	half := most.End.Sum.BitsPerSecond * most.delivered() / most.End.Sum.Packets / 2
	queue, inner := queueDrops(t, a), innerDrops(t, b)
	f.attack(t, func(d time.Duration) { got = iperf(t, a.Host, b.addr, d, append(args, fmt.Sprintf("%.0f", half))...) })
	queue, inner = queueDrops(t, a)-queue, innerDrops(t, b)-inner
	if got.End.Sum.Packets <= float64(queue) {
		t.Fatalf("nothing of %.0f packets was sent, %d were dropped before", got.End.Sum.Packets, queue)
	}
	kept := (got.delivered() + float64(inner)) / (got.End.Sum.Packets - float64(queue))
	t.Logf("UDP at %.0f Mbit/s, half of its maximum: %.2f %% went through, %.2f %% arrived; dropped before %d, behind %d of %.0f",
		half/1e6, 100*kept, 100*got.delivered()/got.End.Sum.Packets, queue, inner, got.End.Sum.Packets)
	return kept
}

// keepsTCP is the share of half of its maximum that a TCP flow reaches once it is
// under way: messages grow large during its first second.
func keepsTCP(t *testing.T, f *flood, a, b *member) float64 {
	t.Helper()
	var most, got iperfResult
	f.beside(t, f.aside, hostileProbe, func(d time.Duration) { most = iperf(t, a.Host, b.addr, d) })
	half := most.End.SumReceived.BitsPerSecond / 2
	f.attack(t, func(d time.Duration) {
		got = iperf(t, a.Host, b.addr, d-time.Second, "-O", "1", "-b", fmt.Sprintf("%.0f", half))
	})
	if half == 0 {
		t.Fatal("nothing arrived beside the flood")
	}
	kept := got.End.SumReceived.BitsPerSecond / half
	t.Logf("TCP at %.2f Gbit/s, half of its maximum: %.2f %% arrived", half/gigabit, 100*kept)
	return kept
}

// queueDrops counts the packets that found the interface of a node full.
func queueDrops(t *testing.T, n *member) int {
	t.Helper()
	const dropped = 11 // the fourth number of what was sent, behind eight of what was received
	_, numbers, ok := strings.Cut(n.procNet(t, "dev"), overlayDevice+":")
	f := strings.Fields(numbers)
	if !ok || len(f) <= dropped {
		t.Fatalf("no drops of %s in %q", overlayDevice, numbers)
	}
	return number(t, f[dropped])
}

// innerDrops counts the packets that found a socket full, but for those of the
// daemon, which are the last number of their line.
func innerDrops(t *testing.T, n *member) int {
	t.Helper()
	port := strings.TrimSpace(output(t, n.Host, "wg", "show", overlayDevice, "listen-port"))
	own := fmt.Sprintf(":%04X", number(t, port))
	sum := n.errors(t, "RcvbufErrors")
	for _, file := range []string{"udp", "udp6"} {
		for line := range strings.Lines(n.procNet(t, file)) {
			if f := strings.Fields(line); strings.HasSuffix(f[1], own) {
				sum -= number(t, f[len(f)-1])
			}
		}
	}
	return sum
}

// attack runs a flow while the flood reaches the victim, and looks at the
// memory of its daemon.
func (f *flood) attack(t *testing.T, flow func(time.Duration)) {
	t.Helper()
	before := memory(t, f.pid)
	resetPeak(t, f.pid)
	f.beside(t, f.packets, f.length, flow)
	largest := peak(t, f.pid)
	t.Logf("memory before %d MB, at most %d MB", before>>20, largest>>20)
	if largest-before > hostileGrown {
		t.Errorf("memory of the daemon grew from %d to %d bytes", before, largest)
	}
}

// beside runs a flow while a flood lasts.
func (f *flood) beside(t *testing.T, packets []ipv4.Message, length time.Duration, flow func(time.Duration)) {
	t.Helper()
	var rate float64
	var g errgroup.Group
	g.Go(func() (err error) {
		rate, err = f.run(packets, length+hostileLead)
		return err
	})
	time.Sleep(hostileLead / 2)
	flow(length)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if rate < hostileLeast {
		t.Errorf("%.0f hostile packets/s prove nothing", rate)
	}
}

// hostile is a kind of datagram: n numbers it.
type hostile struct {
	forged bool // from the peer's address
	make   func(n int) []byte
}

// hostileKinds are the things that can be wrong with a fragment; session is the
// index that the victim gave to its peer.
func hostileKinds(session uint32) []hostile {
	part := func(session uint32, id, index, count, pad, size int) []byte {
		b := make([]byte, fragmentHeader+size)
		binary.BigEndian.PutUint32(b, 1<<31|uint32(id%1024)<<18|uint32(index)<<12|uint32(count-1)%64<<6|uint32(pad))
		binary.LittleEndian.PutUint32(b[4:], session)
		for i := fragmentHeader; i < len(b); i++ {
			b[i] = byte(rand.Uint32())
		}
		return b
	}
	size := func(n int) int {
		if n%8 == 0 {
			return hostileLarge
		}
		return hostileSize
	}
	return []hostile{
		// From an address nobody knows, with a session that exists.
		{false, func(n int) []byte { return part(session, n, n%2, 2, 0, size(n)) }},
		// From the peer's, with sessions that do not.
		{true, func(n int) []byte { return part(rand.Uint32(), n, n%2, 2, 0, size(n)) }},
		// First ones of messages that never end.
		{true, func(n int) []byte { return part(session, n, 0, maxFragments, 0, size(n)) }},
		// All of one message, over and over, of other content and size.
		{true, func(n int) []byte { return part(session, 7, n%5, 5, 0, hostileSize+n%2) }},
		// The last one first, with as much padding as there can be.
		{true, func(n int) []byte { return part(session, n, maxFragments-1, maxFragments, maxFragments-1, size(n)) }},
		// Numbers that contradict each other.
		{true, func(n int) []byte { return part(session, n, 1+n%63, 1, 0, size(n)) }},
		{true, func(n int) []byte { return part(session, n, 0, 2, 2+n%62, size(n)) }},
		{true, func(n int) []byte { return part(session, n, n%64, 1+n/64%64, n%64, n%40) }},
		// Whole messages that no key has sealed.
		{true, func(n int) []byte { return whole(session, part(session, n/2, n%2, 2, 0, size(n/2))) }},
		// Frames of kinds that do not exist, cut anywhere.
		{true, func(n int) []byte {
			b := part(session, n, n%64, 64, 0, size(n))
			b[0] = 0x80 | byte(n)
			return b[:1+rand.IntN(len(b))]
		}},
	}
}

// whole makes the first part begin as a WireGuard message does.
func whole(session uint32, b []byte) []byte {
	p := b[fragmentHeader:]
	binary.LittleEndian.PutUint32(p, 4)
	binary.LittleEndian.PutUint32(p[4:], session)
	return b
}

// flood sends hostile datagrams from one machine, some with forged sources.
type flood struct {
	from    *Host
	kinds   []hostile
	mallory netip.Addr
	peer    netip.AddrPort
	pid     int           // of the daemon it is to harm
	length  time.Duration // of the flow beside it

	packets, aside []ipv4.Message // to the victim, and to nobody there
}

// prepare makes the packets: IPv4 and UDP without checksum, which IPv4 allows.
func (f *flood) prepare(victim netip.AddrPort) (packets []ipv4.Message) {
	to := &net.IPAddr{IP: victim.Addr().AsSlice()}
	for i := range hostilePackets {
		kind := f.kinds[i%len(f.kinds)]
		source := netip.AddrPortFrom(f.mallory, uint16(20000+i))
		if kind.forged {
			source = f.peer
		}
		body := kind.make(i / len(f.kinds))
		b := make([]byte, ipHeader+udpHeader, ipHeader+udpHeader+len(body))
		b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP // the kernel fills in the rest
		binary.BigEndian.PutUint16(b[2:], uint16(cap(b)))
		copy(b[12:16], source.Addr().AsSlice())
		copy(b[16:20], victim.Addr().AsSlice())
		binary.BigEndian.PutUint16(b[ipHeader:], source.Port())
		binary.BigEndian.PutUint16(b[ipHeader+2:], victim.Port())
		binary.BigEndian.PutUint16(b[ipHeader+4:], uint16(udpHeader+len(body)))
		packets = append(packets, ipv4.Message{Buffers: [][]byte{append(b, body...)}, Addr: to})
	}
	return packets
}

// run sends packets over and over, and returns how many per second.
func (f *flood) run(packets []ipv4.Message, length time.Duration) (rate float64, err error) {
	var raw *ipv4.RawConn
	err = f.from.inside(func() error {
		c, err := net.ListenPacket("ip4:udp", "0.0.0.0")
		if err != nil {
			return err
		}
		raw, err = ipv4.NewRawConn(c)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("open raw socket: %w", err)
	}
	defer raw.Close()
	sent, start := 0, time.Now()
	for next := 0; time.Since(start) < length; {
		if sent > int(time.Since(start).Seconds()*hostileRate) {
			time.Sleep(time.Millisecond)
			continue
		}
		n, err := raw.WriteBatch(packets[next:min(next+hostileBatch, len(packets))], 0)
		if err != nil {
			return 0, fmt.Errorf("send hostile packets: %w", err)
		}
		sent += n
		next = (next + n) % len(packets)
	}
	return float64(sent) / time.Since(start).Seconds(), nil
}

// sniffSession reads, as somebody on the way can, the index that stands in the
// data that from sends to a peer.
func sniffSession(t *testing.T, from, to *member, source netip.AddrPort) uint32 {
	t.Helper()
	ping := startPing(t, from.Host, to.addr, slowPing)
	defer ping.stop(t)
	var session uint32
	err := to.inside(func() error {
		const allIPv4 = unix.ETH_P_IP<<8 | unix.ETH_P_IP>>8 // in network order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, allIPv4&0xffff)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		b := make([]byte, 2048)
		for {
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil {
				return err
			}
			if p := dataFrom(b[:n], source); p != nil {
				session = binary.LittleEndian.Uint32(p[4:])
				return nil
			}
		}
	})
	if err != nil {
		t.Fatalf("read the session between %s and %s: %v", from.Name(), to.Name(), err)
	}
	return session
}

// dataFrom is the WireGuard data message in an IPv4 packet of a sender, or nil.
func dataFrom(b []byte, source netip.AddrPort) []byte {
	if len(b) < ipHeader+udpHeader+32 || b[0] != 0x45 || b[9] != unix.IPPROTO_UDP {
		return nil
	}
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), binary.BigEndian.Uint16(b[ipHeader:]))
	if p := b[ipHeader+udpHeader:]; from == source && p[0] == 4 {
		return p
	}
	return nil
}
