package punch

import (
	"net/netip"

	"github.com/pion/stun/v2"
)

// maxBinding bounds a Binding request to a server in bytes: one that is padded to
// learn how large packets may be is as long as a packet of 1500 bytes allows. A
// server with a lower bound would seem to be behind a smaller path.
const maxBinding = 1500 - overhead4

// AnswerBinding returns the answer of a STUN server (RFC 8489) to a datagram that
// came from from, or nil for silence. Requests with a user name are answered
// under the key that session gives for it, if they have MESSAGE-INTEGRITY under
// that key, with the token if it is not nil, and never with more bytes than they
// have themselves. Requests without a user name are answered plainly if session
// allows it when called with nil; that answer is longer than its request, so
// session has to limit the rate. So are requests of RFC 3489.
func AnswerBinding(b []byte, from netip.AddrPort, session func(user []byte) (key, token []byte, ok bool)) []byte {
	if len(b) > maxBinding || !from.IsValid() || from.Port() == 0 {
		return nil
	}
	from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	if classic(b) {
		if _, _, ok := session(nil); !ok {
			return nil
		}
		return answerClassic(b, from)
	}
	if !stun.IsMessage(b) {
		return nil
	}
	m := &stun.Message{Raw: b}
	if err := m.Decode(); err != nil || m.Type != stun.BindingRequest {
		return nil
	}
	user, err := m.Get(stun.AttrUsername)
	if err != nil {
		if _, _, ok := session(nil); !ok {
			return nil
		}
		return bindingSuccess(m, from)
	}
	if len(user) == 0 {
		return nil
	}
	key, token, ok := session(user)
	if !ok || stun.MessageIntegrity(key).Check(m) != nil {
		return nil
	}
	var more []stun.Setter
	if token != nil {
		more = append(more, stun.RawAttribute{Type: AttrToken, Value: token})
	}
	out := bindingSuccess(m, from, append(more, stun.MessageIntegrity(key))...)
	if len(out) > len(b) {
		return nil
	}
	return out
}

func bindingSuccess(m *stun.Message, from netip.AddrPort, more ...stun.Setter) []byte {
	setters := append([]stun.Setter{
		stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess,
		&stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
	}, more...)
	out, err := stun.Build(setters...)
	if err != nil {
		return nil
	}
	return out.Raw
}
