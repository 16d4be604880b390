package nattest

import (
	"crypto/sha256"
	"net/netip"
	"slices"
	"sync"

	"github.com/pion/stun/v2"
)

// attrToken carries the server's proof that it saw an address; the value is the
// wire's, not this package's.
const attrToken stun.AttrType = 0xC056

// STUNServer answers Binding requests as the coordination server does: under a
// session key with a token, plain ones without. Anything else gets no answer.
type STUNServer struct {
	host *Host

	mu       sync.Mutex
	sessions map[string][]byte // key by user name
}

// ServeSTUN starts a server on the ports of h.
func ServeSTUN(h *Host, ports ...uint16) *STUNServer {
	s := &STUNServer{host: h, sessions: map[string][]byte{}}
	for _, port := range ports {
		h.Listen(port, func(b []byte, from netip.AddrPort) {
			if answer := s.answer(b, from); answer != nil {
				_ = h.Send(answer, port, from, 0) // lost as any answer may be
			}
		})
	}
	return s
}

// Admit opens a session: requests with username must be signed with key.
func (s *STUNServer) Admit(username, key []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions[string(username)] = slices.Clone(key)
}

// Restart forgets all sessions.
func (s *STUNServer) Restart() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.sessions)
}

// Token returns what the server says of addr to the session of username.
func Token(username []byte, addr netip.AddrPort) []byte {
	sum := sha256.Sum256(append(slices.Clone(username), addr.String()...))
	return sum[:]
}

func (s *STUNServer) answer(b []byte, from netip.AddrPort) []byte {
	req := &stun.Message{Raw: slices.Clone(b)}
	if req.Decode() != nil || req.Type != stun.BindingRequest {
		return nil
	}
	setters := []stun.Setter{
		stun.NewTransactionIDSetter(req.TransactionID),
		stun.BindingSuccess,
		&stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
	}
	username, err := req.Get(stun.AttrUsername)
	if err == nil {
		key, ok := s.session(req, username)
		if !ok {
			return nil
		}
		setters = append(setters, stun.RawAttribute{Type: attrToken, Value: Token(username, from)}, key)
	}
	res, errBuild := stun.Build(setters...)
	if errBuild != nil || err == nil && len(res.Raw) > len(b) {
		return nil
	}
	return res.Raw
}

// session returns the integrity of a request's session if it is signed with it.
func (s *STUNServer) session(req *stun.Message, username []byte) (stun.MessageIntegrity, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key, ok := s.sessions[string(username)]
	if !ok || stun.MessageIntegrity(key).Check(req) != nil {
		return nil, false
	}
	return key, true
}
