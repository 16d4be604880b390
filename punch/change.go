package punch

import (
	"encoding/binary"

	"github.com/pion/stun/v2"
)

// Change says from where a Binding request wants its answer; zero is from where it
// was asked. A NAT that lets an answer from another port in does not filter by
// ports, if the socket has sent nothing to that port before.
//
// The attribute is, behind its header (RFC 5780 section 7.2):
//
//	| 29 zero bits | address 1 | port 1 | zero 1 |
type Change struct{ Address, Port bool }

const (
	changeSize    = 4
	changeAddress = 1 << 2
	changePort    = 1 << 1

	// plainAnswerSize is the longest answer to a request without a user name.
	plainAnswerSize = stunHeader + 4 + 20
)

// AddTo is for stun.Build.
func (c Change) AddTo(m *stun.Message) error {
	var bits uint32
	if c.Address {
		bits |= changeAddress
	}
	if c.Port {
		bits |= changePort
	}
	m.Add(AttrChangeRequest, binary.BigEndian.AppendUint32(nil, bits))
	return nil
}

// ChangeOf reads what a Binding request wants; zero also where it is damaged.
func ChangeOf(b []byte) Change {
	m := &stun.Message{Raw: b}
	if len(b) > maxBinding || m.Decode() != nil {
		return Change{}
	}
	value, err := m.Get(AttrChangeRequest)
	if err != nil || len(value) != changeSize {
		return Change{}
	}
	bits := binary.BigEndian.Uint32(value)
	return Change{Address: bits&changeAddress != 0, Port: bits&changePort != 0}
}

// ChangeRequest builds a Binding request to the server that wants its answer from
// elsewhere. It is as long as the answer, or the server would not give it.
func (s Server) ChangeRequest(id [stun.TransactionIDSize]byte, c Change) ([]byte, error) {
	more := []stun.Setter{c}
	if len(s.Username) == 0 {
		padding := plainAnswerSize - stunHeader - 4 - changeSize - 4
		more = append(more, stun.RawAttribute{Type: AttrPadding, Value: make([]byte, padding)})
	}
	return s.marshal(id, more...)
}

// RefuseChange is the answer of a server that has no other address (RFC 8489
// section 6.3.1.2), or nil where it would be longer than the request.
func RefuseChange(b []byte) []byte {
	m := &stun.Message{Raw: b}
	if len(b) > maxBinding || m.Decode() != nil {
		return nil
	}
	out, err := stun.Build(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingError,
		&stun.ErrorCodeAttribute{Code: stun.CodeUnknownAttribute}, stun.UnknownAttributes{AttrChangeRequest})
	if err != nil || len(out.Raw) > len(b) {
		return nil
	}
	return out.Raw
}
