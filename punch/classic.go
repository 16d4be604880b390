package punch

import (
	"encoding/binary"
	"net/netip"

	"github.com/pion/stun/v2"
)

// Messages of RFC 3489, the first STUN, have no cookie but a longer id, and tell
// an IPv4 address as it is. Clients of it are still about.
//
//	| type 2 | length 2 | id 16 | attributes |
//
//	MAPPED-ADDRESS: | 0x0001 | 8 | zero 1 | family 1 | port 2 | address 4 |
const (
	classicRequest = 0x0001
	classicSuccess = 0x0101
	classicFamily4 = 0x01
	classicMapped  = 8
)

// classic reports whether b is a Binding request of RFC 3489 that wants nothing
// but its address.
func classic(b []byte) bool {
	if len(b) < stunHeader || len(b) > maxMessage || stun.IsMessage(b) || binary.BigEndian.Uint16(b) != classicRequest {
		return false
	}
	if int(binary.BigEndian.Uint16(b[2:])) != len(b)-stunHeader {
		return false
	}
	for rest := b[stunHeader:]; len(rest) > 0; {
		if len(rest) < 4 {
			return false
		}
		size := int(binary.BigEndian.Uint16(rest[2:]))
		none := stun.AttrType(binary.BigEndian.Uint16(rest)) == AttrChangeRequest && size == changeSize &&
			len(rest) >= 4+size && binary.BigEndian.Uint32(rest[4:]) == 0
		if !none {
			return false
		}
		rest = rest[4+size:]
	}
	return true
}

// answerClassic is as long as a plain answer.
func answerClassic(b []byte, from netip.AddrPort) []byte {
	if !from.Addr().Is4() {
		return nil
	}
	out := binary.BigEndian.AppendUint16(nil, classicSuccess)
	out = binary.BigEndian.AppendUint16(out, 4+classicMapped)
	out = append(out, b[4:stunHeader]...)
	out = binary.BigEndian.AppendUint16(out, uint16(stun.AttrMappedAddress))
	out = binary.BigEndian.AppendUint16(out, classicMapped)
	out = append(out, 0, classicFamily4)
	out = binary.BigEndian.AppendUint16(out, from.Port())
	addr := from.Addr().As4()
	return append(out, addr[:]...)
}
