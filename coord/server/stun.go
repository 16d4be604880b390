package server

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/pion/stun/v2"
	"golang.org/x/sys/unix"

	"overlay/coord/trust"
	"overlay/punch"
)

const (
	maxBinding  = 1280 // a longer datagram is no Binding request of ours
	sessionLen  = 16
	oobSize     = 128
	stunRetry   = 10 * time.Millisecond
	stunBuffers = 1 << 20
)

// sessionID is the STUN user name of one stream.
type sessionID [sessionLen]byte

// stunServer answers Binding requests (RFC 8489). Whoever asks without a user
// name learns his address, at a limited rate. A node asks with the user name of
// its stream and MESSAGE-INTEGRITY under a key of that stream's TLS connection;
// it gets a token too, in an answer that is never longer than its request. All
// else is met with silence.
type stunServer struct {
	session func(sessionID) (device trust.Key, key []byte, ok bool)
	tokens  *tokens
	limit   *buckets
	log     *slog.Logger
}

// answer gives the answer to a datagram, or nil.
func (s *stunServer) answer(b []byte, from netip.AddrPort) []byte {
	if len(b) > maxBinding || !stun.IsMessage(b) || !from.IsValid() || from.Port() == 0 {
		return nil
	}
	from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	m := &stun.Message{Raw: b}
	if err := m.Decode(); err != nil || m.Type != stun.BindingRequest {
		return nil
	}
	user, err := m.Get(stun.AttrUsername)
	if err == nil {
		return s.answerNode(m, user, from)
	}
	if !s.limit.spend(network(from.Addr())) {
		return nil
	}
	return build(m, from)
}

func (s *stunServer) answerNode(m *stun.Message, user []byte, from netip.AddrPort) []byte {
	if len(user) != sessionLen {
		return nil
	}
	device, key, ok := s.session(sessionID(user))
	if !ok || stun.MessageIntegrity(key).Check(m) != nil {
		return nil
	}
	out := build(m, from,
		stun.RawAttribute{Type: punch.AttrToken, Value: s.tokens.make(device, from)},
		stun.MessageIntegrity(key))
	if len(out) > len(m.Raw) {
		return nil
	}
	return out
}

func build(m *stun.Message, from netip.AddrPort, more ...stun.Setter) []byte {
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

// serve answers on one socket until it is closed.
func (s *stunServer) serve(ctx context.Context, c *net.UDPConn) error {
	in, oob := make([]byte, maxBinding+1), make([]byte, oobSize)
	for {
		n, oobn, _, from, err := c.ReadMsgUDPAddrPort(in, oob)
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.log.Debug("read binding request", "err", err)
			time.Sleep(stunRetry)
			continue
		}
		if out := s.answer(in[:n], from); out != nil {
			if _, _, err := c.WriteMsgUDPAddrPort(out, asked(oob[:oobn]), from); err != nil {
				s.log.Debug("answer binding request", "err", err)
			}
		}
	}
}

// wantAsked makes the socket tell to which local address a request came. A NAT
// drops an answer from another one.
func wantAsked(c *net.UDPConn) error {
	_ = c.SetReadBuffer(stunBuffers) // helps in a rush; the default does otherwise
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	err = raw.Control(func(fd uintptr) {
		if local, ok := c.LocalAddr().(*net.UDPAddr); ok && local.IP.To4() != nil {
			opErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
			return
		}
		opErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
	return errors.Join(err, opErr)
}

// asked turns the control data of a request into that of its answer.
func asked(oob []byte) []byte {
	for len(oob) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return nil
		}
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// ifindex, spec_dst, addr: see ip(7).
			return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(data[8:12])})
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			info := &unix.Inet6Pktinfo{Addr: [16]byte(data[:16])}
			if netip.AddrFrom16(info.Addr).IsLinkLocalUnicast() {
				info.Ifindex = binary.NativeEndian.Uint32(data[16:20])
			}
			return unix.PktInfo6(info)
		}
		oob = rest
	}
	return nil
}
