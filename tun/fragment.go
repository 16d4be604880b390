package tun

import (
	"encoding/binary"
	"math"
)

// Bounds of fragments.
const (
	fragmentHeader = 8
	maxFragments   = 64
	minFragmented  = 256     // bytes: no path's datagram is taken to be smaller
	fragmentIDs    = 1 << 10 // a message is named by the low bits of its counter
)

// Fields of a fragment's header.
const (
	fragmentKinds = 0xf0 // of the first byte: ours, and the kind
	fragmentKind  = 0x80 // a fragment; the other seven kinds of ours are reserved
	sixBits       = 1<<6 - 1
	nextFragment  = 1 << 44 // from one header to the next, both as numbers
	counterAt     = 8       // in WireGuard data, little endian
)

// fragment is the header of a datagram that carries a part of a message too
// long for its path. All parts of a message have one size; together they are
// the message and, behind it, the padding.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-----+-------------------+-----------+-----------+-----------+
//	|1| kind|        id         |   index   |  count-1  |  padding  |
//	+-+-----+-------------------+-----------+-----------+-----------+
//	|       receiver index of the message, as WireGuard has it      |
//	+---------------------------------------------------------------+
//	|                    size bytes of the message                  |
//
// The id is the low ten bits of the message's counter. The zero value is no
// fragment.
type fragment struct {
	session uint32 // receiver index
	id      uint16
	index   int // of this part, from 0
	count   int // of all, 2 to maxFragments
	padding int // zero bytes at the end of the last, less than count
	size    int // of each part, in bytes, without the header
}

// cut divides a message for a path that carries datagrams of limit bytes. False
// means that the message goes whole: it fits, or is longer than maxFragments
// datagrams.
func cut(message []byte, limit int) (fragment, bool) {
	if len(message) <= limit || limit < minFragmented || len(message) > maxPacket {
		return fragment{}, false
	}
	room := limit - fragmentHeader
	count := (len(message) + room - 1) / room
	if count > maxFragments {
		return fragment{}, false
	}
	size := (len(message) + count - 1) / count
	return fragment{
		session: indexOf(message),
		id:      uint16(counterOf(message) % fragmentIDs),
		count:   count,
		padding: count*size - len(message),
		size:    size,
	}, true
}

// put writes the header.
func (f fragment) put(b []byte) {
	binary.BigEndian.PutUint32(b, fragmentKind<<24|uint32(f.id)<<18|
		uint32(f.index)<<12|uint32(f.count-1)<<6|uint32(f.padding))
	binary.LittleEndian.PutUint32(b[indexAt:], f.session)
}

// part is what fragment f.index carries of a message, without the padding.
func (f fragment) part(message []byte) []byte {
	return message[f.index*f.size : min((f.index+1)*f.size, len(message))]
}

// length is the size of the whole message in bytes.
func (f fragment) length() int { return f.count*f.size - f.padding }

// names reports whether f's header can be that of a whole message: WireGuard
// data of that session with that counter.
func (f fragment) names(message []byte) bool {
	return len(message) >= keepaliveSize && frameOf(message) == frameWireGuard && message[0] == typeData &&
		indexOf(message) == f.session && uint16(counterOf(message)%fragmentIDs) == f.id
}

// parseFragment reads the header of a datagram. False means that it is no
// fragment or that its numbers do not fit together.
func parseFragment(b []byte) (fragment, bool) {
	if len(b) <= fragmentHeader || b[0]&fragmentKinds != fragmentKind {
		return fragment{}, false
	}
	word := binary.BigEndian.Uint32(b)
	f := fragment{
		session: indexOf(b),
		id:      uint16(word >> 18 % fragmentIDs),
		index:   int(word >> 12 & sixBits),
		count:   int(word>>6&sixBits) + 1,
		padding: int(word & sixBits),
		size:    len(b) - fragmentHeader,
	}
	ok := f.count > 1 && f.index < f.count && f.padding < f.count && f.padding < f.size &&
		f.length() <= maxPacket && f.length() >= keepaliveSize
	return f, ok
}

// adjacent puts a message together whose fragments, of one size, follow each
// other in data, step bytes apart, each behind lead bytes: 0, or the header of
// one flow. False means that they do not.
func (f fragment) adjacent(dst, data []byte, lead, step int) bool {
	size := lead + fragmentHeader + f.size
	if f.index != 0 || len(data) < (f.count-1)*step+size || len(dst) < f.length() {
		return false
	}
	dst = dst[:f.length()]
	flow, header := binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[lead:])
	for i := range f.count {
		b := data[i*step:][:size]
		if binary.BigEndian.Uint64(b[lead:]) != header+uint64(i)*nextFragment ||
			lead > 0 && binary.BigEndian.Uint64(b) != flow {
			return false
		}
		copy(dst[i*f.size:], b[lead+fragmentHeader:])
	}
	return true
}

// nameOf tells messages of data apart: the session's index and the counter's low
// half, as in the header. It is never 0: an index is random.
func nameOf(b []byte) uint64 { return uint64(indexOf(b))<<32 | counterOf(b)&math.MaxUint32 }

// counterOf is the counter of WireGuard data.
func counterOf(b []byte) uint64 { return binary.LittleEndian.Uint64(b[counterAt:]) }
