package server

import (
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

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
// token too. What a member gets has a limit as well, wherever it asks from: it could
// name a stranger's address. All else is met with silence. It is safe for
// concurrent use.
type stunServer struct {
	open *streams
	// relayed finds the device behind a session of the relay; nil: nobody's.
	relayed func(user []byte) (key []byte, device [32]byte, ok bool)

	tokens  *tokens
	limit   *buckets[netip.Prefix]
	members *buckets[trust.Key]
	sockets []*net.UDPConn
}

// answer gives the answer to a datagram that came to at, or nil, also when it was
// sent from another port because the request wants it so.
func (s *stunServer) answer(b []byte, from, at netip.AddrPort) []byte {
	from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	out := s.binding(b, from)
	if out == nil {
		return nil
	}
	change, port := punch.ChangeOf(b), punch.ReplyPort(b)
	switch {
	case change == punch.Change{} && port == 0:
		return out
	case len(out) > len(b):
		return nil // what is more than the address is for padded requests
	case change.Address:
		return punch.RefuseChange(b) // there is one address
	case port != 0:
		from = netip.AddrPortFrom(from.Addr(), port)
	}
	s.send(out, from, at, change.Port)
	return nil
}

func (s *stunServer) binding(b []byte, from netip.AddrPort) []byte {
	var member *trust.Key
	out := punch.AnswerBinding(b, from, func(user []byte) (key, token []byte, ok bool) {
		if user == nil {
			return nil, nil, s.limit.spend(network(from.Addr()))
		}
		key, device, ok := s.session(user)
		if !ok {
			return nil, nil, false
		}
		member = &device
		return key, s.tokens.make(device, from), true
	})
	if out != nil && member != nil && !s.members.spend(*member) { // after the proof that it is the member
		return nil
	}
	return out
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

// send sends an answer from the address that was asked, and the same port or
// another one. It does not wait: an answer that finds no room is lost.
func (s *stunServer) send(b []byte, to, at netip.AddrPort, other bool) {
	for _, c := range s.sockets {
		own := c.LocalAddr().(*net.UDPAddr).AddrPort()
		if (own.Port() == at.Port()) == other || own.Addr().Unmap().Is4() != to.Addr().Is4() {
			continue
		}
		raw, err := c.SyscallConn()
		if err != nil {
			continue // closed
		}
		name, pin := sockaddr(to), pinned(at.Addr().Unmap())
		_ = raw.Write(func(fd uintptr) bool {
			_ = unix.Sendmsg(int(fd), b, pin, name, unix.MSG_DONTWAIT)
			return true
		})
		return
	}
}

func sockaddr(to netip.AddrPort) unix.Sockaddr {
	if to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

// pinned is the control message that has a datagram leave from an address; nothing
// leaves the choice to the system.
func pinned(from netip.Addr) []byte {
	switch {
	case from.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: from.As4()})
	case from.Is6():
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: from.As16()})
	}
	return nil
}
