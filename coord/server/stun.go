package server

import (
	"net/netip"

	"overlay/punch"
)

const sessionLen = 16

// sessionID is the STUN user name of one stream.
type sessionID [sessionLen]byte

// stunServer answers Binding requests (RFC 8489). Whoever asks without a user
// name learns his address, at a limited rate. A node asks with the user name of
// its stream and MESSAGE-INTEGRITY under a key of that stream's TLS connection;
// it gets a token too. All else is met with silence. It is safe for concurrent
// use.
type stunServer struct {
	open   *streams
	tokens *tokens
	limit  *buckets
}

// answer gives the answer to a datagram, or nil.
func (s *stunServer) answer(b []byte, from netip.AddrPort) []byte {
	from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	return punch.AnswerBinding(b, from, func(user []byte) (key, token []byte, ok bool) {
		if user == nil {
			return nil, nil, s.limit.spend(network(from.Addr()))
		}
		if len(user) != sessionLen {
			return nil, nil, false
		}
		st := s.open.find(sessionID(user))
		if st == nil {
			return nil, nil, false
		}
		return st.key, s.tokens.make(st.device, from), true
	})
}
