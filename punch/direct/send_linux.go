package direct

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// send is the agent's way to the socket. The TTL of an opener travels with the
// datagram, so that it holds for no other (ip(7), IP_TTL; RFC 3542 section 6.3).
func (p *PacketConn) send(b []byte, to, _ netip.AddrPort, ttl int) error {
	var control []byte
	if ttl > 0 {
		control = hopLimit(to.Addr(), ttl)
	}
	_, _, err := p.udp.WriteMsgUDPAddrPort(b, control, to)
	return err
}

// hopLimit is the ancillary data for a TTL. A socket of both families takes that
// of IPv4 for an IPv4 address.
func hopLimit(to netip.Addr, ttl int) []byte {
	b := make([]byte, unix.CmsgSpace(4))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT
	if to.Unmap().Is4() {
		h.Level, h.Type = unix.IPPROTO_IP, unix.IP_TTL
	}
	h.SetLen(unix.CmsgLen(4))
	binary.NativeEndian.PutUint32(b[unix.CmsgLen(0):], uint32(ttl))
	return b
}
