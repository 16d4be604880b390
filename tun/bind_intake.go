package tun

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bounds of a receive.
const (
	receiveMessages = 4       // of one recvmmsg, each up to 64 datagrams
	receiveSize     = 1 << 16 // bytes of each
	receiveControl  = 128     // local address, segment size and overflow
)

// intake is what arrives at a socket. The kernel joins datagrams. One goroutine
// uses it.
type intake struct {
	b       *bind
	s       *socket
	spare   *spare // which one s is; nil: a main socket
	msgs    [receiveMessages]mmsghdr
	iovs    [receiveMessages]unix.Iovec
	names   [receiveMessages]sockaddr
	control [receiveMessages][receiveControl]byte
	bufs    [receiveMessages][]byte

	count int // messages of the last recvmmsg
	at    int // the next of them

	stranger *endpoint // the last sender nobody registered
	errno    syscall.Errno
	run      func(fd uintptr) bool
}

func newIntake(b *bind, s *socket) *intake {
	r := &intake{b: b, s: s}
	for i := range r.msgs {
		r.bufs[i] = make([]byte, receiveSize)
		r.iovs[i].Base = &r.bufs[i][0]
		r.iovs[i].SetLen(receiveSize)
		m := &r.msgs[i].head
		m.Iov = &r.iovs[i]
		m.SetIovlen(1)
		m.Name = &r.names[i][0]
		m.Control = &r.control[i][0]
	}
	r.run = r.recvmmsg
	return r
}

// recvmmsg reports false when the socket is empty.
func (r *intake) recvmmsg(fd uintptr) bool {
	for i := range r.msgs {
		r.msgs[i].head.Namelen = unix.SizeofSockaddrInet6
		r.msgs[i].head.SetControllen(receiveControl)
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.msgs[0])),
			receiveMessages, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			r.count, r.at = int(n), 0
			return true
		case unix.EAGAIN:
			r.s.bell.waiting.Store(true)
			return false
		case unix.EBADF, unix.ENOTSOCK:
			r.errno = errno
			return true
		}
		// Anything else is news about a datagram sent earlier; reading it
		// removed it.
	}
}

// wait waits for datagrams. False means that the socket is closed.
func (r *intake) wait() bool {
	r.b.bells.look(r.b.now())
	for {
		err := r.s.raw.Read(r.run)
		r.s.bell.waiting.Store(false)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err == nil && r.errno == 0
		}
		_ = r.s.conn.SetReadDeadline(time.Time{}) // fails once closed
	}
}

// release does nothing: the buffers are its own.
func (r *intake) release() {}

// next is the next message of recvmmsg.
func (r *intake) next(now *arrival) bool {
	if r.at == r.count {
		return false
	}
	m := &r.msgs[r.at]
	size := int(m.size)
	a := parseControl(r.control[r.at][:m.head.Controllen])
	if a.segment <= 0 || a.segment > size {
		a.segment = size
	}
	if a.overflow != 0 && a.overflow != r.s.overflow {
		r.b.overflow.Add(a.overflow - r.s.overflow)
		r.s.overflow = a.overflow
	}
	*now = arrival{data: r.bufs[r.at][:size], segment: a.segment, ep: r.sender(r.names[r.at].get(), a.local)}
	now.at = netip.AddrPortFrom(a.local, r.spare.local())
	r.at++
	return true
}

// sender is the endpoint of an address. A stranger's is kept only until the
// next stranger, and answered from the local address it wrote to. That of a path
// is not moved by a datagram which anybody can have sent.
func (r *intake) sender(a netip.AddrPort, local netip.Addr) *endpoint {
	if e := r.b.peers.sender(a, r.spare); e != nil {
		return e
	}
	if r.stranger == nil || r.stranger.to != a || r.stranger.spare != r.spare {
		r.stranger = newEndpoint(a, nil)
		r.stranger.spare = r.spare
	}
	r.stranger.pin(local)
	return r.stranger
}

// ancillary is what the kernel says about an arrival.
type ancillary struct {
	local    netip.Addr // where it arrived
	segment  int        // bytes of each datagram; 0: there is one
	overflow uint32     // datagrams the socket ever dropped, modulo 2^32; 0: not said
}

// parseControl reads ancillary data of the kernel.
func parseControl(b []byte) (a ancillary) {
	for len(b) >= unix.CmsgLen(0) {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			break
		}
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			a.local = netip.AddrFrom4([4]byte(data[4:8])) // ipi_spec_dst
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			a.local = netip.AddrFrom16([16]byte(data[:16]))
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			a.segment = int(int32(binary.NativeEndian.Uint32(data)))
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL && len(data) >= 4:
			a.overflow = binary.NativeEndian.Uint32(data)
		}
		b = rest
	}
	return a
}
