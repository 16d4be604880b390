package punch

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/pion/stun/v2"
)

// replyPortSize is RESPONSE-PORT without padding (RFC 5780 section 7.5).
const replyPortSize = 2

// Ask says where the answer to a question is to come from and go to. The zero Ask
// wants it from where it was asked, to where the question came from. Servers may
// not know the rest, which shows in where the answer comes from.
type Ask struct {
	Change Change
	To     uint16 // to this port of the asker's address; 0: as above
	// Size pads the question to so many bytes, a multiple of four up to what fits
	// into a packet of 1500 bytes over IPv4: its answer tells that such a datagram
	// arrives. 0: no more than it needs.
	Size int
}

// Question is a Binding request from a socket that is not an Agent's, to learn how
// the network treats that socket.
type Question struct {
	Raw    []byte // to be sent to the server
	server Server
	id     transactionID
}

// NewQuestion makes a question to a server. Sent again, it is the same question.
func NewQuestion(to Server, how Ask) (Question, error) {
	q := Question{server: to, id: stun.NewTransactionID()}
	var extra []stun.Setter
	if how.Change != (Change{}) {
		extra = append(extra, how.Change)
	}
	if how.To != 0 {
		extra = append(extra, stun.RawAttribute{Type: stun.AttrResponsePort, Value: binary.BigEndian.AppendUint16(nil, how.To)})
	}
	var err error
	if q.Raw, err = to.marshal(q.id, extra...); err != nil {
		return Question{}, fmt.Errorf("new question: %w", err)
	}
	if missing := how.Size - len(q.Raw) - attributeHead; missing >= 0 && how.Size <= maxBinding {
		extra = append(extra, stun.RawAttribute{Type: AttrPadding, Value: make([]byte, missing)})
		if q.Raw, err = to.marshal(q.id, extra...); err != nil {
			return Question{}, fmt.Errorf("new question: %w", err)
		}
	}
	return q, nil
}

// attributeHead is the type and length of an attribute (RFC 8489 section 14).
const attributeHead = 4

// ReplyPort reads to which port of the asker's address a Binding request wants its
// answer; 0: to where it came from. That is for those with a session only: others
// could have a stranger's packet sent to whom shares their address.
func ReplyPort(b []byte) uint16 {
	m := &stun.Message{Raw: b}
	if len(b) > maxBinding || m.Decode() != nil {
		return 0
	}
	value, err := m.Get(stun.AttrResponsePort)
	if err != nil || !m.Contains(stun.AttrUsername) || len(value) < replyPortSize {
		return 0
	}
	return binary.BigEndian.Uint16(value)
}

// Answered reads a datagram as the answer, and gives the address at which the
// server saw the asker; false: it is none, or not authentic.
func (q Question) Answered(b []byte) (netip.AddrPort, bool) {
	m, err := decode(b)
	if err != nil || m.Type != stun.BindingSuccess || m.TransactionID != q.id {
		return netip.AddrPort{}, false
	}
	if len(q.server.Username) > 0 && stun.MessageIntegrity(q.server.Key).Check(m) != nil {
		return netip.AddrPort{}, false
	}
	mapped, err := mappedOf(m)
	return mapped, err == nil
}
