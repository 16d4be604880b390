package punch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/pion/stun/v2"
)

// errShape is what is wrong with a STUN message that is not ours.
var errShape = errors.New("not a message of ours")

// A check is a Binding request (RFC 8489). All lengths are fixed: 76 bytes, 80
// with SESSION-LOST. The answer is 56 bytes for IPv4 and 68 for IPv6, so never
// longer. A check that is padded, to find out which sizes pass, begins with the
// padding and has any multiple of four bytes up to maxPadded.
//
//	request                                 answer
//	+--------------------------------+      +--------------------------------+
//	| STUN header                 20 |      | STUN header, same id        20 |
//	| PADDING, seldom           4+n  |      |                                |
//	| USERNAME: HMAC of nonce   4+8  |      | XOR-MAPPED-ADDRESS   4+8, 4+20 |
//	| SEQUENCE: boot, counter   4+16 |      | MESSAGE-INTEGRITY         4+20 |
//	| SESSION-LOST, seldom      4    |      +--------------------------------+
//	| MESSAGE-INTEGRITY         4+20 |
//	+--------------------------------+
type check struct {
	id      transactionID
	user    user
	boot    uint64
	counter uint64
	lost    bool // the sender has no session with the receiver
	size    int  // of a padded check, in bytes; 0: it is not padded
}

type transactionID = [stun.TransactionIDSize]byte

func (c check) marshal(key []byte) ([]byte, error) {
	var sequence [sequenceSize]byte
	binary.BigEndian.PutUint64(sequence[:8], c.boot)
	binary.BigEndian.PutUint64(sequence[8:], c.counter)
	setters := []stun.Setter{stun.NewTransactionIDSetter(c.id), stun.BindingRequest}
	if missing := c.size - checkSize; c.size > maxMessage {
		setters = append(setters, stun.RawAttribute{Type: AttrPadding, Value: make([]byte, missing-4)})
	}
	setters = append(setters, stun.Username(c.user[:]), stun.RawAttribute{Type: AttrSequence, Value: sequence[:]})
	if c.lost {
		setters = append(setters, stun.RawAttribute{Type: AttrSessionLost})
	}
	m, err := stun.Build(append(setters, stun.MessageIntegrity(key))...)
	if err != nil {
		return nil, fmt.Errorf("build check: %w", err)
	}
	return m.Raw, nil
}

// decode parses a STUN message whose shape is safe for pion's attribute getters:
// known attributes have their lengths, and MESSAGE-INTEGRITY, if any, covers all
// others.
func decode(b []byte) (*stun.Message, error) {
	if len(b)-padding(b) > maxMessage || !stun.IsMessage(b) {
		return nil, errShape
	}
	m := &stun.Message{}
	if err := stun.Decode(b, m); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	if len(m.Raw) != stunHeader+int(m.Length) {
		return nil, errShape
	}
	for i, attr := range m.Attributes {
		if !wellFormed(attr) {
			return nil, errShape
		}
		if attr.Type == stun.AttrMessageIntegrity && i != len(m.Attributes)-1 {
			return nil, errShape
		}
	}
	return m, nil
}

// padding is the length of the PADDING with which a long request begins; 0: b is
// none. All others are short, so that nobody can have us read many attributes.
func padding(b []byte) int {
	if len(b) <= maxMessage || len(b) > maxPadded || binary.BigEndian.Uint16(b) != bindingRequest ||
		binary.BigEndian.Uint16(b[stunHeader:]) != uint16(AttrPadding) {
		return 0
	}
	return 4 + (int(binary.BigEndian.Uint16(b[stunHeader+2:]))+3)/4*4
}

func wellFormed(attr stun.RawAttribute) bool {
	switch attr.Type {
	case stun.AttrMessageIntegrity:
		return len(attr.Value) == integritySize-4
	case stun.AttrXORMappedAddress:
		return len(attr.Value) == 8 && attr.Value[1] == 1 || len(attr.Value) == 20 && attr.Value[1] == 2
	case AttrToken:
		return len(attr.Value) <= MaxToken
	case AttrSequence:
		return len(attr.Value) == sequenceSize
	case AttrSessionLost:
		return len(attr.Value) == 0
	case stun.AttrUsername, stun.AttrMappedAddress, AttrPadding:
		return true
	}
	return !attr.Type.Required()
}

// checkOf reads the fields of a request; its integrity is not verified yet.
func checkOf(m *stun.Message) (check, error) {
	c := check{id: m.TransactionID}
	name, err := m.Get(stun.AttrUsername)
	if err != nil || len(name) != userSize {
		return c, errShape
	}
	c.user = user(name)
	sequence, err := m.Get(AttrSequence)
	if err != nil {
		return c, errShape
	}
	c.boot = binary.BigEndian.Uint64(sequence[:8])
	c.counter = binary.BigEndian.Uint64(sequence[8:])
	c.lost = m.Contains(AttrSessionLost)
	return c, nil
}

// answer builds the response to a check that came from addr.
func answer(id transactionID, addr netip.AddrPort, key []byte) ([]byte, error) {
	m, err := stun.Build(stun.NewTransactionIDSetter(id), stun.BindingSuccess,
		&stun.XORMappedAddress{IP: addr.Addr().AsSlice(), Port: int(addr.Port())},
		stun.MessageIntegrity(key))
	if err != nil {
		return nil, fmt.Errorf("build answer: %w", err)
	}
	return m.Raw, nil
}

// mappedOf reads XOR-MAPPED-ADDRESS.
func mappedOf(m *stun.Message) (netip.AddrPort, error) {
	var x stun.XORMappedAddress
	if err := x.GetFrom(m); err != nil {
		return netip.AddrPort{}, fmt.Errorf("read mapped address: %w", err)
	}
	ip, ok := netip.AddrFromSlice(x.IP)
	if !ok {
		return netip.AddrPort{}, errShape
	}
	return plain(netip.AddrPortFrom(ip, uint16(x.Port))), nil
}

// marshal builds the Binding request to a server, at least as long as the answer
// may be when a token is expected.
func (s Server) marshal(id transactionID, more ...stun.Setter) ([]byte, error) {
	setters := append([]stun.Setter{stun.NewTransactionIDSetter(id), stun.BindingRequest}, more...)
	if len(s.Username) > 0 {
		setters = append(setters, stun.Username(s.Username))
		size := stunHeader + 4 + (len(s.Username)+3)/4*4 + integritySize
		if missing := ServerAnswerSize - size; missing > 0 {
			padding := make([]byte, max(0, missing-4))
			setters = append(setters, stun.RawAttribute{Type: AttrPadding, Value: padding})
		}
		setters = append(setters, stun.MessageIntegrity(s.Key))
	}
	m, err := stun.Build(setters...)
	if err != nil {
		return nil, fmt.Errorf("build request: %w", err)
	}
	return m.Raw, nil
}
