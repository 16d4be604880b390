package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// fakeTUN is a wgtun.Device without a kernel interface: a socket pair that
// keeps the boundaries of packets, as a TUN does.
type fakeTUN struct {
	wgtun.Device
	near, far *os.File
	events    chan wgtun.Event
}

func (f *fakeTUN) File() *os.File             { return f.near }
func (f *fakeTUN) MTU() (int, error)          { return 1400, nil }
func (f *fakeTUN) Events() <-chan wgtun.Event { return f.events }

func (f *fakeTUN) Close() error {
	close(f.events)
	return errors.Join(f.near.Close(), f.far.Close())
}

// fakeTunnel is a tunnel on a fakeTUN, with peers keyA and keyB.
func fakeTunnel(t testing.TB, o offloads, c Config) (*tunnel, *fakeTUN) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer)
	}
	f := &fakeTUN{near: os.NewFile(uintptr(fds[0]), "near"), far: os.NewFile(uintptr(fds[1]), "far"), events: make(chan wgtun.Event, 5)}
	table := newPeers()
	table.set([]Peer{peerOf(keyA, true), peerOf(keyB, true)})
	raw, err := f.near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	n := own(f, raw, o, newBind(c, table))
	n.peers = table
	t.Cleanup(func() { _ = n.Close() })
	return n, f
}

// put makes the kernel's side offer a packet.
func (f *fakeTUN) put(t testing.TB, h virtio, p []byte) {
	t.Helper()
	b := append(bytes.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&h)), virtioSize)), p...)
	if _, err := f.far.Write(b); err != nil {
		t.Fatal(err)
	}
}

// take is what the kernel's side was given.
func (f *fakeTUN) take(t testing.TB) (h virtio, p []byte) {
	t.Helper()
	b := make([]byte, virtioSize+maxPacket)
	if err := f.far.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := f.far.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&h)), virtioSize), b)
	return h, b[virtioSize:n]
}

var everything = offloads{header: true, tcp: true, udp: true}

const testOffset = 16

// read is one Read, its packets copied.
func read(t *testing.T, n *tunnel, bufs [][]byte) [][]byte {
	t.Helper()
	sizes := make([]int, len(bufs))
	count, err := n.Read(bufs, sizes, testOffset)
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for i := range count {
		if sizes[i] > 0 {
			out = append(out, bytes.Clone(bufs[i][testOffset:testOffset+sizes[i]]))
		}
	}
	return out
}

// to turns the destination of IPv4 packets, whose checksums stay right.
func to(k Key, packets [][]byte) [][]byte {
	for _, p := range packets {
		diff := int(k[0]) - int(p[19])
		p[19] = k[0]
		p[15] -= byte(diff)
	}
	return packets
}

func TestReadDrains(t *testing.T) {
	n, f := fakeTunnel(t, everything, Config{})
	small := segments{udp: true, size: 100, payload: pattern(300, 1)}
	large := segments{size: 1348, payload: pattern(60000, 2)}
	jumbo := segments{udp: true, size: 8000, payload: pattern(8000, 3)}
	var want [][]byte
	for _, p := range small.packets() {
		want = append(want, p)
		f.put(t, virtio{}, p)
	}
	p, h := large.super()
	f.put(t, h, p)
	f.put(t, virtio{}, jumbo.packets()[0])
	partial, l := bytes.Clone(small.packets()[0]), layoutOf(small.packets()[0])
	binary.BigEndian.PutUint16(partial[l.transport+udpSum:], fold(l.pseudo(len(partial))))
	f.put(t, virtio{flags: needsSum, sumStart: uint16(l.transport), sumOffset: udpSum}, partial)
	want = append(want, jumbo.packets()[0], small.packets()[0]) // of one flow that sends little
	want = append(want, large.packets()...)
	mustEqual(t, read(t, n, buffers()), want)
}

// The largest super-packet is larger than the room in wireguard-go's buffers, and
// its packets pass all the same.
func TestReadLargest(t *testing.T) {
	n, f := fakeTunnel(t, everything, Config{})
	s := segments{udp: true, size: 1372, payload: pattern(maxPacket-ipv4HeaderSize-udpHeaderSize, 4)}
	p, h := s.super()
	if len(p) != maxPacket {
		t.Fatalf("%d bytes", len(p))
	}
	f.put(t, h, p)
	f.put(t, virtio{}, pattern(maxPacket, 5)) // one packet that does not fit
	small := segments{udp: true, size: 100, payload: pattern(100, 6)}.packets()
	f.put(t, virtio{}, small[0])
	mustEqual(t, read(t, n, buffers()), append(s.packets(), small[0]))
}

// A super-packet that does not fit into one batch goes on in the next.
func TestReadGoesOn(t *testing.T) {
	n, f := fakeTunnel(t, everything, Config{})
	s := segments{size: 100, payload: pattern(30000, 2)} // 300 packets: more than credits, too
	p, h := s.super()
	f.put(t, h, p)
	var got [][]byte
	for bufs := buffers(); len(got) < 300; {
		got = append(got, read(t, n, bufs)...)
		n.bind.out.settle(&n.peers.byKey(keyB).out, batchSize)
	}
	mustEqual(t, got, s.packets())
}

func TestReadSkipsNonsense(t *testing.T) {
	n, f := fakeTunnel(t, everything, Config{})
	good := segments{size: 100, payload: pattern(100, 2)}.packets()
	f.put(t, virtio{kind: kindTCP4, segment: 9}, []byte{0x45})
	f.put(t, virtio{kind: 77, segment: 9}, good[0])
	f.put(t, virtio{flags: needsSum, sumStart: 60000}, good[0])
	f.put(t, virtio{}, nil)
	f.put(t, virtio{}, good[0])
	mustEqual(t, read(t, n, buffers()), good)
}

func TestReadWithoutHeader(t *testing.T) {
	n, f := fakeTunnel(t, offloads{}, Config{})
	good := segments{udp: true, size: 100, payload: pattern(100, 2)}.packets()
	if _, err := f.far.Write(good[0]); err != nil {
		t.Fatal(err)
	}
	mustEqual(t, read(t, n, buffers()), good)
	if _, err := n.Write([][]byte{bytes.Clone(good[0])}, 0); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	k, err := f.far.Read(b)
	if err != nil || !bytes.Equal(b[:k], good[0]) {
		t.Fatalf("%d bytes, %v", k, err)
	}
}

// A peer without a session gets a share and no more; another's packets flow.
func TestReadBoundsThePathless(t *testing.T) {
	var demands []Key
	n, f := fakeTunnel(t, everything, Config{Demand: func(k Key) { demands = append(demands, k) }})
	stuck := to(keyA, segments{udp: true, size: 100, payload: pattern(100, 2)}.packets())[0]
	other := to(keyB, segments{udp: true, size: 100, payload: pattern(100, 2)}.packets())[0]
	n.bind.peers.byKey(keyB).pathed.Store(true)
	got, begin := 0, time.Now()
	for range 10 {
		for range 50 {
			f.put(t, virtio{}, stuck)
		}
		f.put(t, virtio{}, other)
		for found := false; !found; {
			for _, p := range read(t, n, buffers()) {
				if bytes.Equal(p, other) {
					found = true
					n.bind.out.settle(&n.peers.byKey(keyB).out, 1)
					continue
				}
				got++
			}
		}
	}
	if got < parkedLimit || got > creditLimit+60 {
		t.Errorf("%d packets let through to a peer without a session", got)
	}
	if most := 1 + int(time.Since(begin)/silence); len(demands) < 1 || len(demands) > most || demands[0] != keyA {
		t.Errorf("demands %v", demands)
	}
}

func TestReadEnds(t *testing.T) {
	n, _ := fakeTunnel(t, everything, Config{})
	failed := make(chan error, 1)
	go func() {
		_, err := n.Read(buffers(), make([]int, batchSize), testOffset)
		failed <- err
	}()
	time.Sleep(10 * time.Millisecond)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, os.ErrClosed) {
		t.Fatalf("read: %v", err)
	}
	if _, err := n.Write([][]byte{{0x45}}, 0); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("write: %v", err)
	}
	if _, ok := <-n.Events(); ok {
		t.Fatal("events still open")
	}
}

func TestLinkDownIsNotTold(t *testing.T) {
	n, f := fakeTunnel(t, everything, Config{})
	for _, e := range []wgtun.Event{wgtun.EventDown, wgtun.EventUp, wgtun.EventDown | wgtun.EventMTUUpdate} {
		f.events <- e
	}
	if a, b := <-n.Events(), <-n.Events(); a != wgtun.EventUp || b != wgtun.EventMTUUpdate {
		t.Fatalf("events %v %v", a, b)
	}
}

func TestWriteJoinsAndCounts(t *testing.T) {
	n, f := fakeTunnel(t, everything, Config{})
	s := segments{size: 1000, payload: pattern(20500, 2)}
	p := n.peers.byAddr(innerA)
	n.bind.inbound.take(&p.in, 21, 0)
	var bufs [][]byte
	for _, b := range s.packets() {
		bufs = append(bufs, append(make([]byte, testOffset), b...))
	}
	if _, err := n.Write(bufs, testOffset); err != nil {
		t.Fatal(err)
	}
	h, super := f.take(t)
	mustEqual(t, cutAll(t, super, h), s.packets())
	if p.received.Load() != 21 || n.bind.inbound.held != 0 {
		t.Fatalf("received %d, held %d", p.received.Load(), n.bind.inbound.held)
	}
}

// A kernel that refuses super-packets gets the packets, and no more of those.
func TestWriteApart(t *testing.T) {
	for _, udp := range []bool{false, true} {
		n, f := fakeTunnel(t, everything, Config{})
		s := segments{udp: udp, size: 1000, payload: pattern(3500, 2), flags: flagPSH}
		w := &n.writer
		for _, p := range clones(s.packets()) {
			placeFull(w, p)
		}
		w.groups[0].join()
		w.groups[0].part()
		var errno syscall.Errno
		if err := w.raw.Write(func(fd uintptr) bool { errno = w.apart(fd, &w.groups[0], unix.EINVAL); return true }); err != nil || errno != 0 {
			t.Fatal(err, errno)
		}
		for _, want := range s.packets() {
			if h, p := f.take(t); h != (virtio{}) || !bytes.Equal(p, want) {
				t.Fatalf("udp=%v: %+v: not the packet", udp, h)
			}
		}
		if w.udp == udp || w.tcp != udp {
			t.Errorf("udp=%v: tcp %v, udp %v are joined", udp, w.tcp, w.udp)
		}
	}
}

func TestPeersSet(t *testing.T) {
	table := newPeers()
	a, b := peerOf(keyA, false), peerOf(keyB, true)
	table.set([]Peer{a, b})
	pa, pb := table.byKey(keyA), table.byKey(keyB)
	at := netip.MustParseAddrPort("192.0.2.1:5")
	ea := table.path(keyA, at, 0)
	table.learn(9, pa)
	a.Initiate = true
	a.AllowedIPs = []netip.Prefix{netip.MustParsePrefix("100.64.9.9/32")}
	table.set([]Peer{a})
	if table.byKey(keyA) != pa || !pa.initiate.Load() || table.at(at) != ea || table.byIndex(9) != pa {
		t.Error("the peer that stays lost something")
	}
	if table.byAddr(innerA) != nil || table.byAddr(netip.MustParseAddr("100.64.9.9")) != pa {
		t.Error("inner addresses are not those of the list")
	}
	if table.byKey(keyB) != nil || table.path(keyB, at, 0) != nil {
		t.Error("the other is still there")
	}
	table.set([]Peer{b})
	if table.at(at) != nil || table.byIndex(9) != nil || table.byKey(keyB) == pb {
		t.Error("something of a removed peer is left")
	}
	table.learn(10, pa)
	if table.byIndex(10) != nil {
		t.Error("learned for a removed peer")
	}
}

// An address that changes hands belongs to the new peer; the old endpoint goes
// on pointing to the old one.
func TestPathChangesHands(t *testing.T) {
	table := newPeers()
	table.set([]Peer{peerOf(keyA, true), peerOf(keyB, true)})
	at := netip.MustParseAddrPort("192.0.2.1:5")
	ea, eb := table.path(keyA, at, 0), table.path(keyB, at, 0)
	if ea == eb || table.at(at) != eb || ea.peer.key != keyA || eb.peer.key != keyB {
		t.Fatal("endpoints mixed up")
	}
	if table.path(keyB, at, 0) != eb {
		t.Fatal("registering again must keep the endpoint")
	}
	table.set([]Peer{peerOf(keyB, true)})
	if table.at(at) != eb {
		t.Fatal("removing the old peer took the new one's endpoint")
	}
	p := table.byKey(keyB)
	for i := range uint32(2 * maxIndices) {
		table.learn(i, p)
	}
	if len(table.indices) != maxIndices || table.byIndex(2*maxIndices-1) != p {
		t.Fatalf("%d indices kept", len(table.indices))
	}
}

// The level belongs to the path in use, also when that was used before; and the
// one used longest ago makes room.
func TestPathUsedAgain(t *testing.T) {
	table := newPeers()
	table.set([]Peer{peerOf(keyA, true)})
	at := func(port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(port))
	}
	p := table.byKey(keyA)
	first := table.path(keyA, at(1), 0)
	table.path(keyA, at(2), 0)
	p.level.now.Store(levelWhole)
	if table.path(keyA, at(2), 0); p.level.segments() != levelWhole {
		t.Error("the path stayed, its level did not")
	}
	if table.path(keyA, at(1), 0) != first || p.level.segments() == levelWhole {
		t.Error("another endpoint, or the level of another path")
	}
	for i := range maxEndpoints - 1 {
		table.path(keyA, at(3+i), 0)
	}
	if table.at(at(1)) != first || table.at(at(2)) != nil {
		t.Error("not the one used longest ago made room")
	}
}
