package server

import (
	"net/netip"

	"overlay/coord/trust"
	"overlay/punch"
)

const sessionLen = 16

// sessionID is the STUN user name of one stream.
type sessionID [sessionLen]byte

// stunServer answers Binding requests (RFC 8489). Whoever asks without a user
// name learns his address, at a limited rate. A node asks with the user name of
// its stream and MESSAGE-INTEGRITY under a key of that stream's TLS connection,
// or, while it has no stream, with those of its session at the relay; it gets a
// token too. All else is met with silence. It is safe for concurrent use.
type stunServer struct {
	open *streams
	// relayed finds the device behind a session of the relay; nil: nobody's.
	relayed func(user []byte) (key []byte, device [32]byte, ok bool)

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
		key, device, ok := s.session(user)
		if !ok {
			return nil, nil, false
		}
		return key, s.tokens.make(device, from), true
	})
}

// session is whose user name that is, and the key that goes with it.
func (s *stunServer) session(user []byte) (key []byte, device trust.Key, ok bool) {
	if len(user) == sessionLen {
		if st := s.open.find(sessionID(user)); st != nil {
			return st.key, st.device, true
		}
		return nil, device, false
	}
	if s.relayed == nil {
		return nil, device, false
	}
	key, by, ok := s.relayed(user)
	return key, trust.Key(by), ok
}
