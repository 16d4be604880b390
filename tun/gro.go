package tun

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// Bounds of joining.
const (
	maxJoined = 64 // packets of one super-packet
	lookBack  = 8  // newest super-packets a packet may join
)

// flow is what packets of one TCP or UDP connection have in common. The zero
// value is none.
type flow struct {
	addrs [32]byte // source, destination; IPv4 uses the first eight bytes
	ports [4]byte
	proto uint8
	v6    bool
}

// layout is where the parts of a packet are.
type layout struct {
	flow      flow
	transport int  // where the transport header begins
	headers   int  // where the payload begins
	joinable  bool // as far as the packet alone tells; the checksum is not checked
}

// layoutOf reads a packet. One whose flow is known but which cannot be joined
// (a FIN, an acknowledgement without data) still ends what its flow joined
// before, so that order is kept.
func layoutOf(p []byte) layout {
	var l layout
	var proto uint8
	switch {
	case len(p) >= ipv4HeaderSize && p[0] == 0x45 && be16(p[2:]) == len(p) && be16(p[6:])&^0x4000 == 0:
		proto, l.transport = p[9], ipv4HeaderSize
		copy(l.flow.addrs[:], p[12:20])
	case len(p) >= ipv6HeaderSize && p[0]>>4 == 6 && be16(p[4:]) == len(p)-ipv6HeaderSize:
		proto, l.transport, l.flow.v6 = p[6], ipv6HeaderSize, true
		copy(l.flow.addrs[:], p[8:40])
	default:
		return layout{}
	}
	t := p[l.transport:]
	switch {
	case proto == unix.IPPROTO_TCP && len(t) >= tcpHeaderSize:
		l.headers = l.transport + int(t[tcpOffset]>>4)*4
		l.joinable = l.headers >= l.transport+tcpHeaderSize && l.headers < len(p) && t[tcpFlags]&^flagPSH == flagACK
	case proto == unix.IPPROTO_UDP && len(t) >= udpHeaderSize:
		l.headers = l.transport + udpHeaderSize
		l.joinable = l.headers < len(p) && be16(t[udpLength:]) == len(t) && be16(t[udpSum:]) != 0
	default:
		return layout{}
	}
	copy(l.flow.ports[:], t)
	l.flow.proto = proto
	return l
}

// intact reports whether the checksum of the IP header is right, where it has
// one.
func (l *layout) intact(p []byte) bool {
	return l.flow.v6 || fold(sum(p[:l.transport], 0)) == 0xffff
}

// verify reports whether the transport checksum of a packet is right.
func (l *layout) verify(p []byte) bool {
	return fold(sum(p[l.transport:], l.pseudo(len(p)))) == 0xffff
}

// sumOffset is where the checksum is in the transport header.
func (l *layout) sumOffset() int {
	if l.flow.proto == unix.IPPROTO_UDP {
		return udpSum
	}
	return tcpSum
}

// pseudo is the pseudo-header sum of a packet of size bytes.
func (l *layout) pseudo(size int) uint64 {
	return pseudoSum(l.flow.addrs[:], l.flow.proto, size-l.transport)
}

// piece is a packet, or a super-packet of a peer, on its way to the kernel.
type piece struct {
	data     []byte
	layout   layout
	partial  bool // its sender vouches for it: the checksum holds the pseudo-header's sum
	segment  int  // payload of a packet, of a super-packet that of all but the last
	segments int  // packets it is split into
}

// pieceOf is the piece of one packet with full checksums.
func pieceOf(p []byte) piece {
	l := layoutOf(p)
	return piece{data: p, layout: l, segment: len(p) - l.headers, segments: 1}
}

// ends reports whether nothing can follow the piece in a super-packet of
// segments of that size.
func (p *piece) ends(segment int) bool {
	l := &p.layout
	return !l.joinable || (len(p.data)-l.headers)%segment != 0 ||
		l.flow.proto == unix.IPPROTO_TCP && p.data[l.transport+tcpFlags]&flagPSH != 0
}

// group is packets that leave as one super-packet: neighbours of one flow, the
// payload of all but the last of one size.
type group struct {
	layout   layout
	packets  [][]byte
	size     int  // all bytes once joined
	segment  int  // payload of each
	segments int  // how many, once split
	partial  bool // the checksums hold the pseudo-headers' sums
	checked  bool // the checksums of the first are right
	closed   bool
}

// begin makes g the group of p alone.
func (g *group) begin(p *piece) {
	g.layout, g.size, g.segment, g.segments = p.layout, len(p.data), p.segment, p.segments
	g.partial, g.checked, g.closed = p.partial, false, p.ends(p.segment)
	g.packets = append(g.packets[:0], p.data)
}

// add joins p, of the same flow, or reports false. What was neither verified nor
// vouched for is not joined: the kernel computes the checksum of what it splits
// anew.
func (g *group) add(p *piece) bool {
	payload := len(p.data) - p.layout.headers
	if g.closed || !p.layout.joinable || p.layout.headers != g.layout.headers || p.partial != g.partial ||
		p.segment > g.segment || p.segments > 1 && p.segment != g.segment ||
		g.segments+p.segments > maxJoined || g.size+payload > maxPacket || !g.follows(p.data) {
		return false
	}
	if g.checked = g.checked || g.sound(g.packets[0]); !g.checked || !g.sound(p.data) {
		return false
	}
	g.packets = append(g.packets, p.data)
	g.size += payload
	g.segments += p.segments
	g.closed = p.ends(g.segment)
	return true
}

// sound reports whether the checksums of one of the flow's packets are right or
// vouched for. Nobody vouches for that of the IP header.
func (g *group) sound(p []byte) bool {
	return g.layout.intact(p) && (g.partial || g.layout.verify(p))
}

// follows reports whether splitting would give p back behind what there is.
func (g *group) follows(p []byte) bool {
	first, t := g.packets[0], g.layout.transport
	if g.layout.flow.v6 {
		if [4]byte(first) != [4]byte(p) || first[7] != p[7] { // class, label; hop limit
			return false
		}
	} else {
		step := uint16(be16(p[4:]) - be16(first[4:]))
		fixed := step == 0 && first[6]&0x40 != 0 // identification without meaning (RFC 6864 §4.1)
		if first[1] != p[1] || first[6] != p[6] || first[8] != p[8] || !fixed && int(step) != g.segments {
			return false
		}
	}
	if g.layout.flow.proto != unix.IPPROTO_TCP {
		return true
	}
	a, b := first[t:g.layout.headers], p[t:g.layout.headers]
	next := binary.BigEndian.Uint32(a[tcpSeq:]) + uint32(g.size-g.layout.headers)
	return binary.BigEndian.Uint32(b[tcpSeq:]) == next &&
		[4]byte(a[tcpAck:]) == [4]byte(b[tcpAck:]) && a[tcpOffset] == b[tcpOffset] &&
		[2]byte(a[tcpWindow:]) == [2]byte(b[tcpWindow:]) && slices.Equal(a[tcpUrgent:], b[tcpUrgent:])
}

// join turns the first packet into the head of the super-packet and returns its
// virtio header. The checksum field then holds the pseudo-header's sum.
func (g *group) join() virtio {
	h := g.head(g.segments)
	if len(g.packets) == 1 {
		return h
	}
	first, l := g.packets[0], &g.layout
	if l.flow.proto == unix.IPPROTO_TCP {
		last := g.packets[len(g.packets)-1]
		first[l.transport+tcpFlags] |= last[l.transport+tcpFlags] & flagPSH
	}
	g.resize(g.size)
	g.putSum(first, fold(l.pseudo(g.size)))
	return h
}

// head is the virtio header of so many segments of the group.
func (g *group) head(segments int) virtio {
	l := &g.layout
	if segments == 1 && !g.partial {
		return virtio{}
	}
	h := virtio{flags: needsSum, sumStart: uint16(l.transport), sumOffset: uint16(l.sumOffset())}
	if segments == 1 {
		return h
	}
	h.headers, h.segment = uint16(l.headers), uint16(g.segment)
	switch l.superKind() {
	case recordTCP4:
		h.kind = kindTCP4
	case recordTCP6:
		h.kind = kindTCP6
	default:
		h.kind = kindUDP
	}
	return h
}

// count is the number of segments of one of the group's packets.
func (g *group) count(p []byte) int {
	if g.segments == 1 {
		return 1
	}
	return (len(p) - g.layout.headers + g.segment - 1) / g.segment
}

// part undoes join, for a kernel that refuses the super-packet.
func (g *group) part() {
	if len(g.packets) == 1 {
		return
	}
	first, l := g.packets[0], &g.layout
	if l.flow.proto == unix.IPPROTO_TCP {
		first[l.transport+tcpFlags] &^= flagPSH
	}
	g.resize(len(first))
	if g.partial {
		g.putSum(first, fold(l.pseudo(len(first))))
		return
	}
	g.putSum(first, 0)
	v := ^fold(sum(first[l.transport:], l.pseudo(len(first))))
	if v == 0 && l.flow.proto == unix.IPPROTO_UDP {
		v = 0xffff
	}
	g.putSum(first, v)
}

func (g *group) putSum(p []byte, v uint16) {
	binary.BigEndian.PutUint16(p[g.layout.transport+g.layout.sumOffset():], v)
}

// resize writes a packet size into the headers of the first packet.
func (g *group) resize(size int) {
	first, l := g.packets[0], &g.layout
	if l.flow.v6 {
		binary.BigEndian.PutUint16(first[4:], uint16(size-ipv6HeaderSize))
	} else {
		binary.BigEndian.PutUint16(first[2:], uint16(size))
		sumIPv4(first[:l.transport])
	}
	if l.flow.proto == unix.IPPROTO_UDP {
		binary.BigEndian.PutUint16(first[l.transport+udpLength:], uint16(size-l.transport))
	}
}
