package tun

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

const testMTU = 1400

// capable is a peer that takes large messages, with the addresses segments use:
// keyA sends them to keyB.
func capable(k Key) Peer {
	p := peerOf(k, true)
	v6 := [16]byte(pattern(32, 3))
	if k == keyB {
		v6 = [16]byte(pattern(32, 3)[16:])
	}
	p.AllowedIPs = append(p.AllowedIPs, netip.PrefixFrom(netip.AddrFrom16(v6), 128))
	p.Capabilities = Large
	return p
}

// largeTunnel is a fakeTunnel whose peers take large messages, on paths.
func largeTunnel(t testing.TB, o offloads, more ...func(*Config)) (*tunnel, *fakeTUN) {
	c := Config{MTU: testMTU, Addrs: []netip.Prefix{netip.MustParsePrefix("100.64.0.1/16")}}
	for _, f := range more {
		f(&c)
	}
	n, f := fakeTunnel(t, o, c)
	n.peers.large = true
	n.peers.set([]Peer{capable(keyA), capable(keyB)})
	for i, k := range []Key{keyA, keyB} {
		n.peers.path(k, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(i+1)), 0)
	}
	return n, f
}

// setLevel makes messages to the peer hold so many segments.
func setLevel(n *tunnel, segments int) { n.peers.byKey(keyB).level.now.Store(int32(segments)) }

// readAll is Read until the kernel has nothing left, and the credits given back.
func readAll(t testing.TB, n *tunnel, f *fakeTUN) [][]byte {
	t.Helper()
	bufs, sizes := buffers(), make([]int, batchSize)
	var out [][]byte
	for f.waiting(t) || n.reader.shelf.turn() != noSlot {
		count, err := n.Read(bufs, sizes, testOffset)
		if err != nil {
			t.Fatal(err)
		}
		for i := range count {
			if sizes[i] == 0 {
				continue
			}
			p := bufs[i][testOffset : testOffset+sizes[i]]
			out = append(out, bytes.Clone(p))
			_, dst := innerAddrs(p)
			n.bind.out.settle(&n.peers.byAddr(dst).out, 1)
		}
	}
	return out
}

// waiting reports whether the tunnel has something to read.
func (f *fakeTUN) waiting(t testing.TB) bool {
	t.Helper()
	raw, err := f.near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, _ = unix.Poll(fds, 0)
	}); err != nil {
		t.Fatal(err)
	}
	return n > 0
}

// drain is all that the kernel's side was given.
func (f *fakeTUN) drain(t testing.TB, header bool) (packets [][]byte, heads []virtio) {
	t.Helper()
	raw, err := f.far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, virtioSize+maxPacket)
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, err := unix.Read(int(fd), b)
			if err != nil {
				return true
			}
			var h virtio
			p := b[:n]
			if header {
				copy(unsafe.Slice((*byte)(unsafe.Pointer(&h)), virtioSize), p)
				p = p[virtioSize:]
			}
			heads, packets = append(heads, h), append(packets, bytes.Clone(p))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return packets, heads
}

// arrived is what a kernel makes of what it was given: super-packets split, and
// checksums that were left to it filled in.
func arrived(t interface{ Fatal(...any) }, packets [][]byte, heads []virtio) [][]byte {
	for i, p := range packets {
		h := heads[i]
		if h.flags&needsSum == 0 {
			continue
		}
		l := layoutOf(p)
		if got := be16(p[h.sumStart+h.sumOffset:]); !l.matches(h) || got != int(fold(l.pseudo(len(p)))) {
			t.Fatal("the checksum does not hold the pseudo-header's sum")
		}
		if h.kind == kindNone && !complete(p, h) {
			t.Fatal("checksum outside the packet")
		}
	}
	return apart(t, packets, heads)
}

// deliver writes messages to a tunnel, all of one sender, as wireguard-go does.
func deliver(t interface{ Fatal(...any) }, n *tunnel, messages [][]byte) {
	var bufs [][]byte
	for _, m := range messages {
		bufs = append(bufs, append(make([]byte, testOffset), m...))
	}
	if count, err := n.Write(bufs, testOffset); err != nil || count != len(bufs) {
		t.Fatal(count, err)
	}
}

// withoutSum turns a packet with full checksums into what the kernel gives when
// it leaves them to the device.
func withoutSum(p []byte) ([]byte, virtio) {
	p = bytes.Clone(p)
	l := layoutOf(p)
	binary.BigEndian.PutUint16(p[l.transport+l.sumOffset():], fold(l.pseudo(len(p))))
	return p, virtio{flags: needsSum, sumStart: uint16(l.transport), sumOffset: uint16(l.sumOffset())}
}

// Every super-packet passes, at every level and to every kernel, and comes out
// as what the sending kernel would have sent.
func TestSuperPacketsPass(t *testing.T) {
	for name, o := range map[string]offloads{
		"all": everything, "no USO": {header: true, tcp: true}, "no TSO": {header: true}, "no header": {},
	} {
		t.Run(name, func(t *testing.T) {
			n, f := largeTunnel(t, everything)
			far, g := largeTunnel(t, o)
			rapid.Check(t, func(r *rapid.T) {
				s := drawSegments(r)
				level := rapid.SampledFrom([]int{levelPlain, levelSome, levelWhole}).Draw(r, "level")
				setLevel(n, level)
				p, h := s.super()
				want := s.packets()
				f.put(t, h, p)
				messages := readAll(t, n, f)
				if most := (len(want)+level-1)/level + 1; len(p) <= n.reader.largest && len(messages) > most {
					r.Fatalf("%d messages for %d packets at level %d", len(messages), len(want), level)
				}
				deliver(r, far, messages)
				packets, heads := g.drain(t, o.header)
				mustEqual(r, arrived(r, packets, heads), want)
			})
			if far.dropped.broken.Load()+far.dropped.forged.Load() != 0 {
				t.Error("the far side dropped something")
			}
		})
	}
}

// offer gives the tunnel a part of a flow in one of the ways a kernel has.
func offer(t testing.TB, f *fakeTUN, rng *rand.Rand, s segments, from, count int) [][]byte {
	part := s
	part.payload = s.payload[from*s.size : min((from+count)*s.size, len(s.payload))]
	part.seq += uint32(from * s.size)
	part.id += uint16(from)
	if from*s.size+len(part.payload) < len(s.payload) {
		part.flags = 0
	}
	packets := part.packets()
	if len(packets) > 1 && rng.IntN(2) == 0 {
		p, h := part.super()
		f.put(t, h, p)
		return packets
	}
	for _, p := range packets {
		switch rng.IntN(3) {
		case 0:
			b, h := withoutSum(p)
			f.put(t, h, b)
			continue
		case 1:
			if rng.IntN(4) == 0 {
				p[len(p)-1]++ // damaged
			}
		}
		f.put(t, virtio{}, p)
	}
	return packets
}

// Flows of two peers are mixed, in packets and super-packets, with and without
// checksums; each comes out in order and as it was, damage included.
func TestFlowsKeepOrder(t *testing.T) {
	n, f := largeTunnel(t, everything)
	far, g := largeTunnel(t, everything)
	rapid.Check(t, func(r *rapid.T) {
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(r, "mix"), 0))
		setLevel(n, rapid.SampledFrom([]int{levelPlain, levelSome, levelWhole}).Draw(r, "level"))
		var flows []segments
		for i := range rapid.IntRange(1, 4).Draw(r, "flows") {
			s := drawSegments(r)
			s.ports, s.payload = uint16(i), s.payload[:min(len(s.payload), 30*s.size)]
			flows = append(flows, s)
		}
		at := make([]int, len(flows))
		var want [][]byte
		for range 20 {
			i := rng.IntN(len(flows))
			s := flows[i]
			left := (len(s.payload)+s.size-1)/s.size - at[i]
			if left == 0 {
				continue
			}
			count := 1 + rng.IntN(min(left, 8))
			want = append(want, offer(t, f, rng, s, at[i], count)...)
			at[i] += count
		}
		deliver(r, far, readAll(t, n, f))
		packets, heads := g.drain(t, true)
		sameFlows(r, arrived(r, packets, heads), want)
	})
	if far.dropped.broken.Load()+far.dropped.forged.Load() != 0 {
		t.Error("the far side dropped something")
	}
}

// Small packets share a message of one datagram; a lone one and a large one are
// plain packets.
func TestSmallPacketsShare(t *testing.T) {
	n, f := largeTunnel(t, everything)
	small := segments{udp: true, size: 100, payload: pattern(4000, 1)}.packets()
	full := segments{udp: true, size: testMTU - ipv4HeaderSize - udpHeaderSize, payload: pattern(testMTU-ipv4HeaderSize-udpHeaderSize, 1), ports: 1}.packets()[0]
	for _, p := range small {
		b, h := withoutSum(p)
		f.put(t, h, b)
	}
	b, h := withoutSum(full)
	f.put(t, h, b)
	b, h = withoutSum(small[0])
	f.put(t, h, b)
	messages := readAll(t, n, f)
	last := len(messages) - 1
	for i, m := range messages[:last] {
		if i < last-1 && !contained(m) || len(m) > testMTU || i < last-1 && len(m) < testMTU-recordHeaderSize-len(small[0]) {
			t.Errorf("message %d of %d bytes", i, len(m))
		}
	}
	if want := (len(small)*(len(small[0])+recordHeaderSize)+testMTU-1)/(testMTU-ipv4HeaderSize-len(small[0])) + 3; last+1 > want {
		t.Errorf("%d messages, want at most %d", last+1, want)
	}
	mustEqual(t, messages[last:], [][]byte{full})
	far, g := largeTunnel(t, everything)
	deliver(t, far, messages)
	packets, heads := g.drain(t, true)
	mustEqual(t, arrived(t, packets, heads), slices.Concat(small, [][]byte{small[0], full}))
	if len(packets) != 3 {
		t.Errorf("%d packets written: not joined", len(packets))
	}
	if got := far.peers.byKey(keyA).received.Load(); got != uint64(len(small)+2) {
		t.Errorf("%d packets counted", got)
	}
}

// Peers without the capability, or without an address for containers, get plain
// packets.
func TestPlainPeersGetNoContainers(t *testing.T) {
	for name, change := range map[string]func(*tunnel){
		"plain peer": func(n *tunnel) { n.peers.byKey(keyB).large.Store(false) },
		"no address": func(n *tunnel) { n.peers.byKey(keyB).inner4.Store(nil) },
		"none ours":  func(n *tunnel) { n.reader.self = netip.Addr{} },
	} {
		n, f := largeTunnel(t, everything)
		setLevel(n, levelWhole)
		change(n)
		small := segments{udp: true, size: 100, payload: pattern(400, 1)}.packets()
		for _, p := range small {
			b, h := withoutSum(p)
			f.put(t, h, b)
		}
		s := segments{size: 1348, payload: pattern(40000, 2)}
		p, h := s.super()
		f.put(t, h, p)
		t.Run(name, func(t *testing.T) { mustEqual(t, readAll(t, n, f), append(small, s.packets()...)) })
	}
}

// A super-packet that no record can describe is split; one larger than a message
// takes is cut.
func TestOddSuperPackets(t *testing.T) {
	n, f := largeTunnel(t, everything)
	far, g := largeTunnel(t, everything)
	setLevel(n, levelWhole)
	tiny := segments{size: 10, payload: pattern(2000, 1)}
	huge := segments{udp: true, size: 1372, payload: pattern(64000, 1)}
	for _, s := range []segments{tiny, huge} {
		p, h := s.super()
		f.put(t, h, p)
		messages := readAll(t, n, f)
		for _, m := range messages {
			if len(m) > recordAt+n.reader.largest+reportRecord {
				t.Errorf("message of %d bytes", len(m))
			}
		}
		deliver(t, far, messages)
		packets, heads := g.drain(t, true)
		mustEqual(t, arrived(t, packets, heads), s.packets())
	}
}

// The size of a message is what its fragments carry.
func TestSuperSize(t *testing.T) {
	for mtu, want := range map[int]int{1400: maxSuper, 9000: maxSuper, minMTU: 64*600 - messageOverhead} {
		if got := superSize(mtu); got != want {
			t.Errorf("mtu %d: %d, want %d", mtu, got, want)
		}
	}
}
