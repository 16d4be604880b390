package natlab

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
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
// stays bounded and a flow beside them alive.
func TestHostileFragments(t *testing.T) {
	m := newMeshIn(t, Options{Delay: -1})
	a := m.join(t, mustServer(t, m.Lab, "a"))
	b := m.join(t, mustServer(t, m.Lab, "b"))
	mallory := mustServer(t, m.Lab, "mallory")
	mustDirect(t, a, b)
	victim, peer := endpointOf(t, a, b), endpointOf(t, b, a)
	serveIperf(t, b.Host, b.addr)

	most := iperf(t, a.Host, b.addr, 2*time.Second, "-u", "-b", "0", "-l", fmt.Sprint(flowSize))
	half := most.delivered() / most.End.Sum.Seconds / 2 // packets per second
	f := &flood{from: mallory, kinds: hostileKinds(sniffSession(t, a, b, peer)), mallory: mallory.Addr(), peer: peer, victim: victim}
	f.prepare()

	length := time.Duration(runs(3, 10)) * time.Second
	pid := b.daemon(t)
	before, largest := memory(t, pid), int64(0)
	var g errgroup.Group
	g.Go(func() error { return f.run(length + time.Second) })
	g.Go(func() error {
		for range (length + time.Second) / (100 * time.Millisecond) {
			time.Sleep(100 * time.Millisecond)
			largest = max(largest, memory(t, pid))
		}
		return nil
	})
	time.Sleep(500 * time.Millisecond)
	flow := iperf(t, a.Host, b.addr, length, "-u", "-b", fmt.Sprintf("%.0f", half*flowSize*8), "-l", fmt.Sprint(flowSize))
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}

	rate := float64(f.sent) / f.took.Seconds()
	kept := flow.delivered() / (half * length.Seconds())
	t.Logf("%.0f hostile packets per second; of %.0f per second asked for %.0f were sent, %.2f %% arrived; memory %d MB, at most %d MB",
		rate, half, flow.End.Sum.Packets/flow.End.Sum.Seconds, 100*kept, before>>20, largest>>20)
	if rate < hostileLeast {
		t.Errorf("%.0f hostile packets per second prove nothing", rate)
	}
	if kept < hostileKept {
		t.Errorf("%.1f %% of the flow arrived", 100*kept)
	}
	if largest-before > hostileGrown {
		t.Errorf("memory of the daemon grew from %d to %d bytes", before, largest)
	}
	transfer(t, a.Host, b.Host, b.addr, 16<<20)
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

// flood sends hostile datagrams from one machine, some with forged sources. run
// leaves what it did.
type flood struct {
	from         *Host
	kinds        []hostile
	mallory      netip.Addr
	peer, victim netip.AddrPort

	packets []ipv4.Message
	sent    int
	took    time.Duration
}

// prepare makes the packets: IPv4 and UDP without checksum, which IPv4 allows.
func (f *flood) prepare() {
	to := &net.IPAddr{IP: f.victim.Addr().AsSlice()}
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
		copy(b[16:20], f.victim.Addr().AsSlice())
		binary.BigEndian.PutUint16(b[ipHeader:], source.Port())
		binary.BigEndian.PutUint16(b[ipHeader+2:], f.victim.Port())
		binary.BigEndian.PutUint16(b[ipHeader+4:], uint16(udpHeader+len(body)))
		f.packets = append(f.packets, ipv4.Message{Buffers: [][]byte{append(b, body...)}, Addr: to})
	}
}

func (f *flood) run(length time.Duration) error {
	var raw *ipv4.RawConn
	err := f.from.inside(func() error {
		c, err := net.ListenPacket("ip4:udp", "0.0.0.0")
		if err != nil {
			return err
		}
		raw, err = ipv4.NewRawConn(c)
		return err
	})
	if err != nil {
		return fmt.Errorf("open raw socket: %w", err)
	}
	defer raw.Close()
	start := time.Now()
	for next := 0; time.Since(start) < length; {
		if f.sent > int(time.Since(start).Seconds()*hostileRate) {
			time.Sleep(time.Millisecond)
			continue
		}
		n, err := raw.WriteBatch(f.packets[next:min(next+hostileBatch, len(f.packets))], 0)
		if err != nil {
			return fmt.Errorf("send hostile packets: %w", err)
		}
		f.sent += n
		next = (next + n) % len(f.packets)
	}
	f.took = time.Since(start)
	return nil
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
