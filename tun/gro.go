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

// verify reports whether the transport checksum of a packet is right.
func (l *layout) verify(p []byte) bool {
	return fold(sum(p[l.transport:], l.pseudo(len(p)))) == 0xffff
}

// pseudo is the pseudo-header sum of a packet of size bytes.
func (l *layout) pseudo(size int) uint64 {
	return pseudoSum(l.flow.addrs[:], l.flow.proto, size-l.transport)
}

// group is packets that leave as one super-packet: neighbours of one flow, the
// payload of all but the last of one size.
type group struct {
	layout  layout
	packets [][]byte
	size    int  // all bytes once joined
	checked bool // the checksum of the first is right
	closed  bool
}

// begin makes g the group of p alone.
func (g *group) begin(p []byte, l layout) {
	g.layout, g.size, g.checked, g.closed = l, len(p), false, !l.joinable
	g.packets = append(g.packets[:0], p)
	if l.flow.proto == unix.IPPROTO_TCP && p[l.transport+tcpFlags]&flagPSH != 0 {
		g.closed = true
	}
}

// add joins p, of the same flow, or reports false. What was not verified is not
// joined: the kernel computes the checksum of what it splits anew.
func (g *group) add(p []byte, l layout) bool {
	first := g.packets[0]
	segment, payload := len(first)-g.layout.headers, len(p)-l.headers
	if g.closed || !l.joinable || l.headers != g.layout.headers || payload > segment ||
		len(g.packets) == maxJoined || g.size+payload > maxPacket || !g.follows(p) {
		return false
	}
	if !g.checked {
		if g.checked = l.verify(first); !g.checked {
			return false
		}
	}
	if !l.verify(p) {
		return false
	}
	g.packets = append(g.packets, p)
	g.size += payload
	g.closed = payload < segment || l.flow.proto == unix.IPPROTO_TCP && p[l.transport+tcpFlags]&flagPSH != 0
	return true
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
		if first[1] != p[1] || first[6] != p[6] || first[8] != p[8] || !fixed && int(step) != len(g.packets) {
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
	if len(g.packets) == 1 {
		return virtio{}
	}
	first, l := g.packets[0], &g.layout
	h := virtio{
		flags: needsSum, kind: kindUDP, headers: uint16(l.headers), segment: uint16(len(first) - l.headers),
		sumStart: uint16(l.transport), sumOffset: udpSum,
	}
	if l.flow.proto == unix.IPPROTO_TCP {
		h.kind, h.sumOffset = kindTCP4, tcpSum
		if l.flow.v6 {
			h.kind = kindTCP6
		}
		last := g.packets[len(g.packets)-1]
		first[l.transport+tcpFlags] |= last[l.transport+tcpFlags] & flagPSH
	}
	g.resize(g.size)
	binary.BigEndian.PutUint16(first[l.transport+int(h.sumOffset):], fold(l.pseudo(g.size)))
	return h
}

// part undoes join, for a kernel that refuses the super-packet.
func (g *group) part() {
	first, l := g.packets[0], &g.layout
	at := l.transport + udpSum
	if l.flow.proto == unix.IPPROTO_TCP {
		at = l.transport + tcpSum
		first[l.transport+tcpFlags] &^= flagPSH
	}
	g.resize(len(first))
	first[at], first[at+1] = 0, 0
	v := ^fold(sum(first[l.transport:], l.pseudo(len(first))))
	if v == 0 && l.flow.proto == unix.IPPROTO_UDP {
		v = 0xffff
	}
	binary.BigEndian.PutUint16(first[at:], v)
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
