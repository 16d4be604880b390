package tun

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A container is what a message to a peer that takes large ones holds instead
// of one packet: an IPv4 header that says whose it is (AllowedIPs look at it,
// and its length trims the padding) and records. It never leaves the program,
// so the checksum is 0.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-------+-------+---------------+-------------------------------+
//	|   4   |   5   |       0       |         total length          |
//	+-------+-------+---------------+-------------------------------+
//	|                               0                               |
//	+---------------+---------------+-------------------------------+
//	|       0       |      253      |               0               |
//	+---------------+---------------+-------------------------------+
//	|                   overlay IPv4 of the sender                  |
//	+---------------------------------------------------------------+
//	|                  overlay IPv4 of the receiver                 |
//	+===============+===============+===============================+
//	|     kind      |       0       |            length             |
//	+---------------+---------------+-------------------------------+
//	|            segment            |       length bytes ...        |
//	+-------------------------------+-------------------------------+
//	|                      more records ...                         |
//
// length is that of the packet or report behind the record's header; segment is
// the payload of each packet of a super-packet, else 0.
const (
	protoContainer   = 253 // for experimentation (RFC 3692)
	recordHeaderSize = 6
	recordLength     = 2
	recordSegment    = 4
	recordAt         = ipv4HeaderSize + recordHeaderSize // of the first packet
)

// Kinds of records.
const (
	recordFull    = 0    // a packet with full checksums; nobody vouches for them
	recordPartial = 1    // a packet whose transport checksum holds the pseudo-header's sum
	recordTCP4    = 2    // a super-packet of TCP over IPv4, checksum as before
	recordTCP6    = 3    // of TCP over IPv6
	recordUDP     = 4    // of UDP
	recordReport  = 0x40 // counters of the sender's meter
)

// maxRecordSegments bounds the packets of one super-packet.
const maxRecordSegments = 128

// A report tells how many messages of its receiver arrived and how many did
// not, cumulative and modulo 2^32.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------------------------------------------------------+
//	|                           received                            |
//	+---------------------------------------------------------------+
//	|                            missing                            |
//	+---------------------------------------------------------------+
const (
	reportSize    = 8
	reportMissing = 4
	reportRecord  = recordHeaderSize + reportSize
)

// contained reports whether a packet has the protocol of containers. Only a
// message may be one: what the kernel gives with it is dropped.
func contained(p []byte) bool {
	return len(p) >= ipv4HeaderSize && p[0]>>4 == 4 && p[9] == protoContainer
}

// putContainer writes the IPv4 header of the container b.
func putContainer(b []byte, src, dst netip.Addr) {
	clear(b[:ipv4HeaderSize])
	b[0], b[9] = 0x45, protoContainer
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	from, to := src.As4(), dst.As4()
	copy(b[12:], from[:])
	copy(b[16:], to[:])
}

// putRecord writes the header of a record.
func putRecord(b []byte, kind uint8, length, segment int) {
	b[0], b[1] = kind, 0
	binary.BigEndian.PutUint16(b[recordLength:], uint16(length))
	binary.BigEndian.PutUint16(b[recordSegment:], uint16(segment))
}

// putReport writes a whole record of counters.
func putReport(b []byte, received, missing uint32) {
	putRecord(b, recordReport, reportSize, 0)
	binary.BigEndian.PutUint32(b[recordHeaderSize:], received)
	binary.BigEndian.PutUint32(b[recordHeaderSize+reportMissing:], missing)
}

// records walks through what follows a container's header.
type records struct{ rest []byte }

// recordsOf begins a walk. A container of no valid form has no records.
func recordsOf(b []byte) (records, bool) {
	if b[0] != 0x45 || be16(b[2:]) != len(b) {
		return records{}, false
	}
	return records{rest: b[ipv4HeaderSize:]}, true
}

// next cuts the next record off, with what it holds checked, so that nothing
// but the source address of a packet is left to judge. It reports false for
// what is not valid; nothing after that can be found.
func (r *records) next() (kind uint8, p piece, ok bool) {
	if len(r.rest) < recordHeaderSize || r.rest[1] != 0 {
		return 0, p, false
	}
	kind = r.rest[0]
	length, segment := be16(r.rest[recordLength:]), be16(r.rest[recordSegment:])
	if length > len(r.rest)-recordHeaderSize {
		return 0, p, false
	}
	b := r.rest[recordHeaderSize:][:length:length]
	r.rest = r.rest[recordHeaderSize+length:]
	if kind == recordReport {
		return kind, piece{data: b}, length == reportSize
	}
	if length == 0 || packetSize(b) != length {
		return 0, p, false
	}
	p = pieceOf(b)
	if kind != recordFull {
		p.partial = true
		ok = p.is(kind, segment)
		return kind, p, ok
	}
	return kind, p, !contained(b)
}

// is reports whether the packet can be of a kind that vouches for its checksum,
// and takes over the size of its segments.
func (p *piece) is(kind uint8, segment int) bool {
	l := &p.layout
	if l.headers == 0 {
		return false
	}
	if kind == recordPartial {
		return true
	}
	if l.superKind() != kind || segment == 0 || l.headers >= len(p.data) {
		return false
	}
	if l.flow.proto == unix.IPPROTO_UDP && !l.joinable || l.flow.proto == unix.IPPROTO_TCP && l.headers < l.transport+tcpHeaderSize {
		return false
	}
	p.segment = segment
	p.segments = (len(p.data) - l.headers + segment - 1) / segment
	return p.segments <= maxRecordSegments
}

// superKind is the kind of record a super-packet of the flow has.
func (l *layout) superKind() uint8 {
	switch {
	case l.flow.proto == unix.IPPROTO_UDP:
		return recordUDP
	case l.flow.v6:
		return recordTCP6
	}
	return recordTCP4
}

// packetSize is the size of a packet by its own header, 0 when it has none.
func packetSize(p []byte) int {
	switch {
	case len(p) >= ipv4HeaderSize && p[0]>>4 == 4:
		return be16(p[2:])
	case len(p) >= ipv6HeaderSize && p[0]>>4 == 6:
		return be16(p[4:]) + ipv6HeaderSize
	}
	return 0
}
