package relay

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// stream is a TLS connection to a node as the forwarding side sees it. None of
// its methods blocks; all are safe for concurrent use.
type stream interface {
	// offer queues copies of a run of frames.
	offer(run []byte)
	// offerTrain queues copies of datagrams that lie behind each other, all but
	// the last of stride bytes.
	offerTrain(train []byte, stride int)
	// close ends the connection: the node is no longer welcome on it.
	close()
}

// transport is one way between the relay and a node: its address seen from one
// of our sockets, or a TLS connection.
type transport struct {
	conn   stream         // nil: UDP
	addr   netip.AddrPort // of the node's end
	socket *socket        // ours
	local  netip.Addr     // our address the node talks to; zero: not known
	name   sockaddr       // addr as the kernel wrote it
	size   uint32         // of name

	unpinned atomic.Bool // local cannot be sent from any more
	flat     refusal     // of UDP_SEGMENT on the way to the node

	heard int64 // last authenticated control message; guarded by Server.mu
}

// streamTransport is the transport of a TLS connection. The address is that of
// the TCP peer.
func streamTransport(c stream, addr netip.AddrPort) *transport {
	return &transport{conn: c, addr: addr}
}

// kind is the place of the transport's sequence numbers: datagrams of one can
// not be replayed on the other.
func (t *transport) kind() int {
	if t.conn != nil {
		return 1
	}
	return 0
}

const transportKinds = 2

// observed is the address a PONG tells: that of the UDP mapping.
func (t *transport) observed() netip.AddrPort {
	if t.conn != nil {
		return netip.AddrPort{}
	}
	return t.addr
}

// same reports whether two transports are one way.
func (t *transport) same(o *transport) bool {
	return t.conn == o.conn && t.socket == o.socket && t.name == o.name && t.local == o.local
}

// sockaddr is a raw sockaddr_in or sockaddr_in6 as the kernel writes it.
type sockaddr [unix.SizeofSockaddrInet6]byte

// Offsets in sockaddr_in and sockaddr_in6; the family is in host order.
const (
	sockaddrPort  = 2
	sockaddrAddr4 = 4
	sockaddrAddr6 = 8
)

// get reads what the kernel wrote.
func (s *sockaddr) get() netip.AddrPort {
	port := binary.BigEndian.Uint16(s[sockaddrPort:])
	if binary.NativeEndian.Uint16(s[:]) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s[sockaddrAddr4:])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(s[sockaddrAddr6:])).Unmap(), port)
}

// refusal remembers for refusalTime that the kernel refused something: routes
// and devices change. The zero value remembers nothing. It is safe for
// concurrent use. Times are those of Server.clock.
type refusal struct{ until atomic.Int64 }

const refusalTime = 30 * time.Second

func (r *refusal) holds(now int64) bool { return now < r.until.Load() }

func (r *refusal) note(now int64) { r.until.Store(now + int64(refusalTime)) }
