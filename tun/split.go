package tun

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// maxPacket is the largest IP packet, in bytes.
const maxPacket = 1<<16 - 1

// virtio is struct virtio_net_hdr, which comes before every packet of a TUN
// with IFF_VNET_HDR, in host order.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+---------------+-------------------------------+
//	|     flags     |   gso type    |       length of headers       |
//	+---------------+---------------+-------------------------------+
//	|   payload of a segment        |    where the checksum begins  |
//	+-------------------------------+-------------------------------+
//	|  where it goes, from there    |
//	+-------------------------------+
type virtio struct {
	flags     uint8
	kind      uint8
	headers   uint16
	segment   uint16
	sumStart  uint16
	sumOffset uint16
}

// virtioSize is the size of a virtio header in bytes.
const virtioSize = 10

// What virtio headers hold (linux/virtio_net.h).
const (
	needsSum = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	kindNone = unix.VIRTIO_NET_HDR_GSO_NONE
	kindTCP4 = unix.VIRTIO_NET_HDR_GSO_TCPV4
	kindTCP6 = unix.VIRTIO_NET_HDR_GSO_TCPV6
	kindUDP  = unix.VIRTIO_NET_HDR_GSO_UDP_L4
)

// Offsets and sizes in TCP (RFC 9293 §3.1) and UDP headers.
const (
	tcpSeq        = 4
	tcpAck        = 8
	tcpOffset     = 12
	tcpFlags      = 13
	tcpWindow     = 14
	tcpSum        = 16
	tcpUrgent     = 18
	tcpHeaderSize = 20
	flagFIN       = 0x01
	flagPSH       = 0x08
	flagACK       = 0x10
	flagCWR       = 0x80
	udpLength     = 4
	udpSum        = 6
	udpHeaderSize = 8
)

// split cuts a super-packet of TSO or USO into the packets the kernel would
// have sent, with full checksums. The zero value has nothing to cut.
type split struct {
	packet    []byte // the super-packet; changed in place
	at        int    // payload not yet cut
	transport int    // where the transport header begins
	headers   int    // where the payload begins
	segment   int    // payload of each packet
	index     int    // of the next packet
	sumAt     int
	tcp       bool
	pseudo    uint64 // sum of the addresses and the protocol
	header    uint64 // sum of the IPv4 header without length and identification
}

// start takes a super-packet and reports whether it is well-formed. The length
// of headers in h is not trusted: forwarded packets have a wrong one.
func (s *split) start(p []byte, h virtio) bool {
	*s = split{}
	c := split{transport: int(h.sumStart), segment: int(h.segment), tcp: h.kind != kindUDP}
	if len(p) < ipv4HeaderSize || c.segment == 0 {
		return false
	}
	addrs, proto := 12, uint8(unix.IPPROTO_TCP)
	switch version := p[0] >> 4; {
	case version == 4 && (h.kind == kindTCP4 || h.kind == kindUDP) && c.transport == int(p[0]&15)*4 && c.transport >= ipv4HeaderSize:
	case version == 6 && (h.kind == kindTCP6 || h.kind == kindUDP) && c.transport >= ipv6HeaderSize:
		addrs = 8
	default:
		return false
	}
	if c.tcp {
		if len(p) < c.transport+tcpHeaderSize {
			return false
		}
		c.headers, c.sumAt = c.transport+int(p[c.transport+tcpOffset]>>4)*4, c.transport+tcpSum
		if c.headers < c.transport+tcpHeaderSize {
			return false
		}
	} else {
		c.headers, c.sumAt, proto = c.transport+udpHeaderSize, c.transport+udpSum, unix.IPPROTO_UDP
	}
	if len(p) <= c.headers {
		return false
	}
	end := addrs + 8
	if addrs == 8 {
		end = addrs + 32
	}
	p[c.sumAt], p[c.sumAt+1] = 0, 0
	c.pseudo = pseudoSum(p[addrs:end], proto, 0)
	if addrs == 12 {
		clear(p[10:12])
		c.header = sum(p[:c.transport], 0) + uint64(^uint16(be16(p[2:]))) + uint64(^uint16(be16(p[4:])))
	}
	c.packet, c.at = p, c.headers
	*s = c
	return true
}

// left is the number of packets still to cut.
func (s *split) left() int {
	if len(s.packet) == 0 {
		return 0
	}
	return (len(s.packet) - s.at + s.segment - 1) / s.segment
}

// next cuts one packet into out and returns its length. When out is too small
// the rest of the super-packet is dropped and it returns 0.
func (s *split) next(out []byte) int {
	size := s.cut(out, 1)
	if size == 0 {
		return 0
	}
	out = out[:size]
	v := ^fold(sum(out[s.transport:], s.pseudo+uint64(size-s.transport)))
	if v == 0 && !s.tcp {
		v = 0xffff // 0 says "no checksum" in UDP
	}
	binary.BigEndian.PutUint16(out[s.sumAt:], v)
	return size
}

// chunk is next for n packets in one, a smaller super-packet, with the
// pseudo-header's sum as checksum.
func (s *split) chunk(out []byte, n int) int {
	size := s.cut(out, n)
	if size > 0 {
		binary.BigEndian.PutUint16(out[s.sumAt:], fold(s.pseudo+uint64(size-s.transport)))
	}
	return size
}

// cut makes a packet of the next n segments, without a checksum.
func (s *split) cut(out []byte, n int) int {
	payload := min(n*s.segment, len(s.packet)-s.at)
	size := s.headers + payload
	if size > len(out) {
		s.packet = nil
		return 0
	}
	out = out[:size]
	copy(out, s.packet[:s.headers])
	copy(out[s.headers:], s.packet[s.at:s.at+payload])
	s.at += payload
	s.fixIP(out)
	last := s.at == len(s.packet)
	if s.tcp {
		s.fixTCP(out[s.transport:], last)
	} else {
		binary.BigEndian.PutUint16(out[s.transport+udpLength:], uint16(size-s.transport))
	}
	s.index += n
	if last {
		s.packet = nil
	}
	return size
}

// fixIP sets length, identification and header checksum.
func (s *split) fixIP(out []byte) {
	if out[0]>>4 == 6 {
		binary.BigEndian.PutUint16(out[4:], uint16(len(out)-ipv6HeaderSize))
		return
	}
	id := uint16(be16(out[4:]) + s.index)
	binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
	binary.BigEndian.PutUint16(out[4:], id)
	binary.BigEndian.PutUint16(out[10:], ^fold(s.header+uint64(len(out))+uint64(id)))
}

// sumIPv4 sets the checksum of an IPv4 header.
func sumIPv4(h []byte) {
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], ^fold(sum(h, 0)))
}

// fixTCP sets the sequence number and leaves each flag to the packet it belongs
// to: CWR to the first, FIN and PSH to the last.
func (s *split) fixTCP(h []byte, last bool) {
	binary.BigEndian.PutUint32(h[tcpSeq:], binary.BigEndian.Uint32(h[tcpSeq:])+uint32(s.index*s.segment))
	if s.index > 0 {
		h[tcpFlags] &^= flagCWR
	}
	if !last {
		h[tcpFlags] &^= flagFIN | flagPSH
	}
}

// complete fills in the checksum of a packet whose sender left it to the
// device, and reports whether the header made sense. The field holds the sum of
// the pseudo-header.
func complete(p []byte, h virtio) bool {
	at := int(h.sumStart) + int(h.sumOffset)
	if int(h.sumStart) > len(p) || at+2 > len(p) {
		return false
	}
	v := ^fold(sum(p[h.sumStart:], 0))
	if v == 0 && h.sumOffset == udpSum {
		v = 0xffff
	}
	binary.BigEndian.PutUint16(p[at:], v)
	return true
}
