package tun

import "encoding/binary"

// WireGuard messages. All begin with a type and three zero bytes; the sender
// index of an initiation and of a response and the receiver index of data
// follow.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+-----------------------------------------------+
//	|  type 1 to 4  |                   zero                        |
//	+---------------+-----------------------------------------------+
//	|        sender index (1, 2) or receiver index (3, 4)           |
//	+---------------------------------------------------------------+
//	|                            ...                                |
const (
	typeInitiation = 1
	typeResponse   = 2
	typeData       = 4

	indexAt        = 4
	initiationSize = 148
	responseSize   = 92
	keepaliveSize  = 32 // data without content; also the shortest message
)

// STUN (RFC 8489 §5): two zero bits, type, length, magic cookie.
const (
	stunCookie     = 0x2112A442
	stunCookieAt   = 4
	stunHeaderSize = 20
)

// First bytes of frames of ours. Control messages of a relay travel between a
// node and the relay; signals between nodes, and only inside a flow.
const (
	ownFrame    = 0x80 // the first value of all of them
	flowByte    = 0x90
	controlByte = 0xa0
	signalByte  = 0xb0
)

// frame is what a datagram is by its first bytes.
type frame uint8

const (
	frameUnknown   frame = iota // nobody's: dropped
	frameOwn                    // ours, but of a kind that is not defined yet: dropped
	frameFragment               // part of a message, see fragment
	frameFlow                   // header of a flow through a relay; a datagram of any other kind follows
	frameControl                // Config.Receive, from a relay
	frameSignal                 // Config.Receive, from inside a flow
	frameSTUN                   // Config.Receive
	frameWireGuard              // wireguard-go
)

// frameOf tells whose a datagram is. WireGuard is looked at first: a message
// whose index happens to be the cookie would need STUN method 0 or a foreign
// one with no attributes, which nobody sends.
func frameOf(b []byte) frame {
	switch {
	case len(b) == 0:
		return frameUnknown
	case b[0]&fragmentKinds == fragmentKind:
		return frameFragment
	case b[0] >= ownFrame:
		return ownOf(b[0])
	case len(b) >= keepaliveSize && b[0] >= typeInitiation && b[0] <= typeData && b[1]|b[2]|b[3] == 0:
		return frameWireGuard
	case len(b) >= stunHeaderSize && b[0]>>6 == 0 && binary.BigEndian.Uint32(b[stunCookieAt:]) == stunCookie:
		return frameSTUN
	}
	return frameUnknown
}

// ownOf is the kind of a frame of ours that is no fragment.
func ownOf(first byte) frame {
	switch first {
	case flowByte:
		return frameFlow
	case controlByte:
		return frameControl
	case signalByte:
		return frameSignal
	}
	return frameOwn
}

// isData reports whether a WireGuard message carries content.
func isData(b []byte) bool { return len(b) > keepaliveSize && b[0] == typeData }

// indexOf is the index of a WireGuard message of at least eight bytes.
func indexOf(b []byte) uint32 { return binary.LittleEndian.Uint32(b[indexAt:]) }
