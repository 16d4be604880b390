package tun

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// pattern fills n bytes with something that has no period of a segment.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*i>>3) ^ byte(i) ^ seed
	}
	return b
}

// segments is a flow's worth of packets as a sender without offloads makes
// them: the reference for splitting and joining.
type segments struct {
	v6, udp bool
	id      uint16
	seq     uint32
	flags   byte // of the last; ACK is added
	options int  // of TCP, in words
	size    int
	payload []byte
	ports   uint16
}

func (s segments) packets() [][]byte {
	var out [][]byte
	for i, rest := 0, s.payload; len(rest) > 0; i++ {
		n := min(s.size, len(rest))
		flags := byte(flagACK)
		if n == len(rest) {
			flags |= s.flags
		}
		out = append(out, s.packet(i, flags, rest[:n]))
		rest = rest[n:]
	}
	return out
}

// packet is the i-th one.
func (s segments) packet(i int, flags byte, payload []byte) []byte {
	header, proto, sumAt := tcpHeaderSize+4*s.options, byte(unix.IPPROTO_TCP), tcpSum
	if s.udp {
		header, proto, sumAt = udpHeaderSize, unix.IPPROTO_UDP, udpSum
	}
	t := make([]byte, header, header+len(payload))
	binary.BigEndian.PutUint16(t, 4000+s.ports)
	binary.BigEndian.PutUint16(t[2:], 5000)
	if s.udp {
		binary.BigEndian.PutUint16(t[udpLength:], uint16(header+len(payload)))
	} else {
		binary.BigEndian.PutUint32(t[tcpSeq:], s.seq+uint32(i*s.size))
		binary.BigEndian.PutUint32(t[tcpAck:], 77)
		t[tcpOffset], t[tcpFlags] = byte(header/4)<<4, flags
		binary.BigEndian.PutUint16(t[tcpWindow:], 501)
		copy(t[tcpHeaderSize:], pattern(4*s.options, 9))
	}
	t = append(t, payload...)
	ip, addrs := s.ip(i, proto, len(t))
	v := ^plainSum(t, uint32(plainSum(addrs, uint32(proto)+uint32(len(t)))))
	if v == 0 && s.udp {
		v = 0xffff
	}
	binary.BigEndian.PutUint16(t[sumAt:], v)
	return append(ip, t...)
}

func (s segments) ip(i int, proto byte, n int) (header, addrs []byte) {
	if s.v6 {
		h := make([]byte, ipv6HeaderSize)
		h[0], h[1], h[6], h[7] = 0x60, 0x0b, proto, 64
		binary.BigEndian.PutUint16(h[4:], uint16(n))
		copy(h[8:], pattern(32, 3))
		return h, h[8:40]
	}
	h := make([]byte, ipv4HeaderSize)
	h[0], h[6], h[8], h[9] = 0x45, 0x40, 63, proto
	binary.BigEndian.PutUint16(h[2:], uint16(ipv4HeaderSize+n))
	binary.BigEndian.PutUint16(h[4:], s.id+uint16(i))
	copy(h[12:], []byte{100, 64, 0, 1, 100, 64, 0, 2})
	binary.BigEndian.PutUint16(h[10:], ^plainSum(h, 0))
	return h, h[12:20]
}

// super is the packet the kernel would hand to a TUN with offloads for all of
// them.
func (s segments) super() ([]byte, virtio) {
	whole := s
	whole.size = len(s.payload)
	p := whole.packets()[0]
	h := virtio{flags: needsSum, segment: uint16(s.size), sumStart: ipv4HeaderSize, sumOffset: tcpSum, kind: kindTCP4}
	if s.v6 {
		h.sumStart, h.kind = ipv6HeaderSize, kindTCP6
	}
	if s.udp {
		h.sumOffset, h.kind = udpSum, kindUDP
	}
	l := layoutOf(p)
	binary.BigEndian.PutUint16(p[h.sumStart+h.sumOffset:], fold(l.pseudo(len(p))))
	return p, h
}

func drawSegments(t *rapid.T) segments {
	s := segments{
		v6: rapid.Bool().Draw(t, "v6"), udp: rapid.Bool().Draw(t, "udp"),
		id: rapid.Uint16().Draw(t, "id"), seq: rapid.Uint32().Draw(t, "seq"),
		options: rapid.IntRange(0, 10).Draw(t, "options"), size: rapid.IntRange(1, 1400).Draw(t, "size"),
	}
	if rapid.Bool().Draw(t, "push") {
		s.flags = flagPSH
	}
	count := rapid.IntRange(1, min(maxJoined, (maxPacket-100)/s.size)).Draw(t, "count")
	last := rapid.IntRange(1, s.size).Draw(t, "last")
	s.payload = pattern((count-1)*s.size+last, rapid.Byte().Draw(t, "seed"))
	return s
}

// cutAll splits a super-packet.
func cutAll(t interface{ Fatal(...any) }, p []byte, h virtio) [][]byte {
	var s split
	if !s.start(bytes.Clone(p), h) {
		t.Fatal("super-packet refused")
	}
	var out [][]byte
	for left := s.left(); left > 0; left-- {
		if s.left() != left {
			t.Fatal("left", s.left(), "want", left)
		}
		b := make([]byte, maxPacket)
		n := s.next(b)
		if n == 0 {
			t.Fatal("nothing cut")
		}
		out = append(out, b[:n])
	}
	if s.left() != 0 {
		t.Fatal("something left")
	}
	return out
}

func mustEqual(t interface{ Fatalf(string, ...any) }, got, want [][]byte) {
	if len(got) != len(want) {
		t.Fatalf("%d packets, want %d", len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("packet %d:\n% x\nwant\n% x", i, got[i][:min(60, len(got[i]))], want[i][:min(60, len(want[i]))])
		}
	}
}

func TestSplitIsWhatTheKernelSends(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSegments(t)
		p, h := s.super()
		mustEqual(t, cutAll(t, p, h), s.packets())
	})
}

// FIN belongs to the last packet and CWR to the first.
func TestSplitFlags(t *testing.T) {
	s := segments{size: 100, payload: pattern(250, 0), flags: flagFIN | flagCWR | flagPSH}
	p, h := s.super()
	var flags []byte
	for _, p := range cutAll(t, p, h) {
		flags = append(flags, p[ipv4HeaderSize+tcpFlags])
	}
	if want := []byte{flagACK | flagCWR, flagACK, flagACK | flagFIN | flagPSH}; !bytes.Equal(flags, want) {
		t.Fatalf("flags %x, want %x", flags, want)
	}
}

func TestSplitRefusesNonsense(t *testing.T) {
	p, h := segments{size: 100, payload: pattern(250, 0)}.super()
	for name, change := range map[string]func(p []byte, h *virtio) []byte{
		"no segment":       func(p []byte, h *virtio) []byte { h.segment = 0; return p },
		"empty":            func([]byte, *virtio) []byte { return nil },
		"version":          func(p []byte, _ *virtio) []byte { p[0] = 0x55; return p },
		"wrong family":     func(p []byte, h *virtio) []byte { h.kind = kindTCP6; return p },
		"unknown kind":     func(p []byte, h *virtio) []byte { h.kind = 9; return p },
		"transport beyond": func(p []byte, h *virtio) []byte { h.sumStart = 5000; return p },
		"only headers":     func(p []byte, _ *virtio) []byte { return p[:40] },
		"short header":     func(p []byte, _ *virtio) []byte { p[ipv4HeaderSize+tcpOffset] = 0x10; return p },
		"long header":      func(p []byte, _ *virtio) []byte { p[ipv4HeaderSize+tcpOffset] = 0xf0; return p[:60] },
	} {
		h := h
		b := change(bytes.Clone(p), &h)
		if s := (&split{}); s.start(b, h) || s.left() != 0 {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSplitTooLargeForBuffer(t *testing.T) {
	p, h := segments{size: 1000, payload: pattern(5000, 0)}.super()
	var s split
	if !s.start(p, h) || s.next(make([]byte, 900)) != 0 || s.left() != 0 {
		t.Fatal("want the super-packet dropped")
	}
}

func TestComplete(t *testing.T) {
	for _, s := range []segments{{}, {udp: true}, {v6: true}, {v6: true, udp: true}} {
		s.size, s.payload = 333, pattern(333, 5)
		want := s.packets()[0]
		p, l := bytes.Clone(want), layoutOf(want)
		_, h := s.super()
		h.kind = kindNone
		binary.BigEndian.PutUint16(p[h.sumStart+h.sumOffset:], fold(l.pseudo(len(p))))
		if !complete(p, h) || !bytes.Equal(p, want) {
			t.Errorf("%+v: wrong checksum", h)
		}
		if complete(p[:h.sumStart], h) {
			t.Error("checksum outside the packet")
		}
	}
}

func FuzzSplit(f *testing.F) {
	p, h := segments{size: 100, payload: pattern(250, 0)}.super()
	f.Add(p, h.kind, h.segment, h.sumStart, h.sumOffset)
	p, h = segments{v6: true, udp: true, size: 10, payload: pattern(250, 0)}.super()
	f.Add(p, h.kind, h.segment, h.sumStart, h.sumOffset)
	f.Fuzz(func(t *testing.T, p []byte, kind uint8, segment, start, offset uint16) {
		if len(p) > maxPacket {
			return
		}
		h := virtio{flags: needsSum, kind: kind, segment: segment, sumStart: start, sumOffset: offset}
		complete(bytes.Clone(p), h)
		var s split
		if !s.start(p, h) {
			return
		}
		out := make([]byte, maxPacket)
		for left := s.left(); left > 0; left-- {
			if n := s.next(out); n <= 0 || n > len(p) {
				t.Fatalf("cut %d of %d", n, len(p))
			}
		}
		if s.left() != 0 {
			t.Fatal("more packets than told")
		}
	})
}

func BenchmarkSplit(b *testing.B) {
	p, h := segments{size: 1348, payload: pattern(64000, 0)}.super()
	out := make([]byte, 2048)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		var s split
		s.start(p, h)
		for s.left() > 0 {
			s.next(out)
		}
	}
}
