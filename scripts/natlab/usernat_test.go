package natlab

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"overlay/punch/nattest"
)

// userPacket is an IPv4 packet with a UDP datagram and right checksums.
func userPacket(from, to netip.AddrPort, payload string) []byte {
	src, dst := from.Addr().As4(), to.Addr().As4()
	b := []byte{4<<4 | 5, 0, 0, 0, 0, 0, 0, 0, 64, protoUDP, 0, 0}
	b = append(append(b, src[:]...), dst[:]...)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(udpHeader+len(payload)))
	b = append(append(b, 0, 0), payload...)
	binary.BigEndian.PutUint16(b[ipLength:], uint16(len(b)))
	binary.BigEndian.PutUint16(b[ipSum:], ^sumOf(b[:minIPv4Header]))
	binary.BigEndian.PutUint16(b[minIPv4Header+udpSum:], ^datagramSum(b))
	return b
}

func sumOf(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	return fold(sum)
}

// datagramSum is the sum that the checksum of UDP is made of.
func datagramSum(b []byte) uint16 {
	udp := b[minIPv4Header:]
	return fold(uint32(sumOf(b[ipSource:minIPv4Header])) + uint32(sumOf(udp)) + protoUDP + uint32(len(udp)))
}

func TestUserNATRewrites(t *testing.T) {
	wan := netip.MustParseAddr("203.0.113.9")
	h := &Home{lan: netip.MustParsePrefix("192.168.7.0/24"), wan: wan, table: nattest.NewTable(nattest.NAT{
		Filtering: nattest.AddressAndPortDependent,
	}, 1)}
	inside, remote := netip.MustParseAddrPort("192.168.7.2:4000"), netip.MustParseAddrPort("198.51.100.1:3478")
	pass := func(from, to netip.AddrPort) (udpPacket, bool) {
		p, ok := parseUDP(userPacket(from, to, "hello!"))
		if !ok {
			t.Fatal("the packet is none")
		}
		ok = h.rewrite(p)
		if sumOf(p.data[:minIPv4Header]) != 0xffff || datagramSum(p.data) != 0xffff {
			t.Errorf("%s to %s leaves with wrong checksums", from, to)
		}
		return p, ok
	}
	out, ok := pass(inside, remote)
	if !ok || out.source().Addr() != wan || out.destination() != remote {
		t.Fatalf("out: %v, %s to %s", ok, out.source(), out.destination())
	}
	if in, ok := pass(remote, out.source()); !ok || in.source() != remote || in.destination() != inside {
		t.Errorf("in: %v, %s to %s", ok, in.source(), in.destination())
	}
	stranger := netip.AddrPortFrom(remote.Addr(), remote.Port()+1)
	for name, p := range map[string][2]netip.AddrPort{
		"a stranger":    {stranger, out.source()},
		"no mapping":    {remote, netip.AddrPortFrom(wan, out.source().Port()-1)},
		"hairpin":       {inside, out.source()},
		"another's":     {remote, netip.MustParseAddrPort("203.0.113.8:4000")},
		"past the wall": {remote, inside},
	} {
		if _, ok := pass(p[0], p[1]); ok {
			t.Errorf("%s passes", name)
		}
	}
}

func TestParseUDP(t *testing.T) {
	a := netip.MustParseAddrPort("192.0.2.1:1")
	good := userPacket(a, a, "")
	for name, change := range map[string]func([]byte) []byte{
		"short":    func(b []byte) []byte { return b[:len(b)-1] },
		"IPv6":     func(b []byte) []byte { b[0] = 6<<4 | 5; return b },
		"TCP":      func(b []byte) []byte { b[ipProtocol] = 6; return b },
		"fragment": func(b []byte) []byte { b[ipFragment] = 0x20; return b },
		"header":   func(b []byte) []byte { b[0] = 4<<4 | 4; return b },
		"nothing":  func([]byte) []byte { return nil },
	} {
		if _, ok := parseUDP(change(append([]byte(nil), good...))); ok {
			t.Errorf("%s is taken for UDP", name)
		}
	}
	if _, ok := parseUDP(good); !ok {
		t.Error("a good one is not")
	}
}
