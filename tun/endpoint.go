package tun

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// sockaddr is a raw sockaddr_in or sockaddr_in6 as the kernel takes it.
type sockaddr [unix.SizeofSockaddrInet6]byte

// Offsets in sockaddr_in and sockaddr_in6; the family is in host order.
const (
	sockaddrPort  = 2
	sockaddrAddr4 = 4
	sockaddrAddr6 = 8
)

// put writes a and returns how many bytes the kernel shall look at.
func (s *sockaddr) put(a netip.AddrPort) uint32 {
	*s = sockaddr{}
	binary.BigEndian.PutUint16(s[sockaddrPort:], a.Port())
	if a.Addr().Is4() {
		binary.NativeEndian.PutUint16(s[:], unix.AF_INET)
		ip := a.Addr().As4()
		copy(s[sockaddrAddr4:], ip[:])
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(s[:], unix.AF_INET6)
	ip := a.Addr().As16()
	copy(s[sockaddrAddr6:], ip[:])
	return unix.SizeofSockaddrInet6
}

// get reads what the kernel wrote.
func (s *sockaddr) get() netip.AddrPort {
	port := binary.BigEndian.Uint16(s[sockaddrPort:])
	if binary.NativeEndian.Uint16(s[:]) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s[sockaddrAddr4:])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(s[sockaddrAddr6:])).Unmap(), port)
}

// endpoint is a conn.Endpoint: a path to a peer, direct or through a relay, a
// handle that drops, the UDP port of a relay, or an address nobody registered.
// One path has one object, whether wireguard-go got it from ParseEndpoint or
// with a packet; over two local ports there are two paths. Safe for concurrent
// use.
type endpoint struct {
	to   netip.AddrPort
	name sockaddr // to, as the kernel takes it
	size uint32   // of name
	peer *peer    // nil: unknown
	drop bool     // a handle without a path

	spare *spare           // through which datagrams go; nil: a main socket
	relay *relay           // through which datagrams go; nil: they go to to
	head  [flowHeader]byte // what they begin with then

	source atomic.Pointer[netip.Addr]   // local address; nil: the kernel chooses
	mtu    atomic.Pointer[atomic.Int32] // of the interface, which changes; nil: 1400
	limit  atomic.Int32                 // the largest datagram that arrives, in bytes; 0: not known
	flat   refusal                      // of segmentation, on this path
}

// defaultDatagram is what a path is taken to carry, in bytes of UDP payload: a
// message of MTU 1400.
const defaultDatagram = 1400 + keepaliveSize

// datagram is the largest datagram of this path, in bytes of UDP payload.
func (e *endpoint) datagram() int {
	if limit := e.limit.Load(); limit > 0 {
		return int(limit)
	}
	if mtu := e.mtu.Load(); mtu != nil {
		return int(mtu.Load()) + keepaliveSize
	}
	return defaultDatagram
}

// refusal remembers that the kernel refused something. It is tried again after
// refusalTime: routes and devices change. The zero value remembers nothing. Safe
// for concurrent use.
type refusal struct {
	until atomic.Int64 // since the Bind was made, ns
}

// refusalTime is how long a refusal counts.
const refusalTime = 30 * time.Second

// holds reports whether the last refusal counts at a time since the Bind was
// made, in ns.
func (r *refusal) holds(now int64) bool { return now < r.until.Load() }

// forget ends a refusal.
func (r *refusal) forget() { r.until.Store(0) }

// note begins a refusal at a time since the Bind was made, in ns.
func (r *refusal) note(now int64) { r.until.Store(now + int64(refusalTime)) }

func newEndpoint(to netip.AddrPort, p *peer) *endpoint {
	e := &endpoint{to: to, peer: p}
	e.size = e.name.put(to)
	return e
}

// pin makes datagrams leave from a local address; the zero one leaves the choice
// to the kernel.
func (e *endpoint) pin(a netip.Addr) {
	switch old := e.source.Load(); {
	case !a.IsValid():
		e.source.Store(nil)
	case old == nil || *old != a:
		kept := a // the parameter itself would be allocated on every call
		e.source.Store(&kept)
	}
}

// ClearSrc does nothing. wireguard-go calls it when it hears nothing; but the
// address belongs to the path, and whoever proves paths changes both.
func (*endpoint) ClearSrc() {}

// SrcIP is the local address, invalid when the kernel chooses.
func (e *endpoint) SrcIP() netip.Addr {
	if a := e.source.Load(); a != nil {
		return *a
	}
	return netip.Addr{}
}

// SrcToString is SrcIP in words.
func (e *endpoint) SrcToString() string { return e.SrcIP().String() }

// DstIP is the far address.
func (e *endpoint) DstIP() netip.Addr { return e.to.Addr() }

// DstToString is the far address and port, as wg shows it.
func (e *endpoint) DstToString() string { return e.to.String() }

// DstToBytes is the far address and port as input of handshake cookies.
func (e *endpoint) DstToBytes() []byte {
	b, _ := e.to.MarshalBinary() // never fails
	return b
}
