package relay

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	socketBuffer    = 7 << 20 // bytes asked for, each way
	receiveMessages = 16      // of one recvmmsg, each up to 64 datagrams
	largeMessages   = 4       // when the last ones were large: what is sent soon is still in the cache
	receiveSize     = 1 << 16 // bytes of each
	receiveControl  = 96      // local address and segment size
)

// socket is one UDP socket nodes send to. It is safe for concurrent use.
type socket struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	v4   bool    // of family AF_INET
	gso  bool    // UDP_SEGMENT works
	flat refusal // of UDP_SEGMENT by the device
}

func openSocket(c *net.UDPConn) (*socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	s := &socket{conn: c, raw: raw}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = s.prepare(int(fd)) })
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, fmt.Errorf("prepare socket %s: %w", c.LocalAddr(), err)
	}
	return s, nil
}

// prepare sets the options. Buffers and offloads are worth trying only.
func (s *socket) prepare(fd int) error {
	for _, option := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF, unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, socketBuffer)
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	s.gso = err == nil && !manglesTrains(release())
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	if s.v4 = family == unix.AF_INET; s.v4 {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
}

// release is the kernel's version, "6.18.44-generic".
func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// manglesTrains reports whether a kernel has the bug of 7.0 to 7.1.4, which
// damages UDP_SEGMENT sends whose segments are all of one size.
func manglesTrains(release string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(release, "%d.%d.%d", &major, &minor, &patch); n < 2 {
		return false
	}
	return major == 7 && (minor == 0 || minor == 1 && patch <= 4)
}

// segments reports whether datagrams to the node may travel as groups.
func (t *transport) segments(now int64) bool {
	return t.socket.gso && !t.socket.flat.holds(now) && !t.flat.holds(now)
}

// arrival is one message of recvmmsg: a datagram, or several of one sender that
// the kernel joined, all of stride bytes but the last. It is valid until the
// next receive.
type arrival struct {
	data   []byte
	stride int
	name   *sockaddr // of the sender
	size   uint32    // of name
	local  netip.Addr
}

// receiver is the receiving half of a socket. One goroutine uses it.
type receiver struct {
	socket  *socket
	msgs    [receiveMessages]mmsghdr
	iovs    [receiveMessages]unix.Iovec
	names   [receiveMessages]sockaddr
	control [receiveMessages][receiveControl]byte
	bufs    [receiveMessages][]byte

	count int
	bytes int // of the last recvmmsg
	errno syscall.Errno
	run   func(fd uintptr) bool
}

func newReceiver(s *socket) *receiver {
	r := &receiver{socket: s}
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
func (r *receiver) recvmmsg(fd uintptr) bool {
	most := receiveMessages
	if r.bytes > receiveSize {
		most = largeMessages
	}
	for i := range r.msgs[:most] {
		r.msgs[i].head.Namelen = unix.SizeofSockaddrInet6
		r.msgs[i].head.SetControllen(receiveControl)
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.msgs[0])),
			uintptr(most), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			r.count, r.bytes = int(n), 0
			for i := range r.msgs[:n] {
				r.bytes += int(r.msgs[i].size)
			}
			return true
		case unix.EAGAIN:
			return false
		case unix.EBADF, unix.ENOTSOCK:
			r.errno = errno
			return true
		}
		// Anything else is news about a datagram sent earlier; reading it
		// removed it.
	}
}

// receive waits for datagrams and returns how many messages there are.
func (r *receiver) receive() (int, error) {
	r.count = 0
	if err := r.socket.raw.Read(r.run); err != nil {
		return 0, err
	}
	if r.errno != 0 {
		return 0, r.errno
	}
	return r.count, nil
}

// arrival describes a message that was received.
func (r *receiver) arrival(i int) arrival {
	m := &r.msgs[i]
	a := arrival{data: r.bufs[i][:m.size], stride: int(m.size), name: &r.names[i], size: m.head.Namelen}
	a.parse(r.control[i][:m.head.Controllen])
	return a
}

// parse reads ancillary data of the kernel.
func (a *arrival) parse(b []byte) {
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
			if n := int(int32(binary.NativeEndian.Uint32(data))); n > 0 && n < a.stride {
				a.stride = n
			}
		}
		b = rest
	}
	if a.local.IsUnspecified() { // it came before that was asked for
		a.local = netip.Addr{}
	}
}

// transport is where the arrival came from, and can be answered.
func (a *arrival) transport(s *socket) *transport {
	return &transport{addr: a.name.get(), socket: s, local: a.local, name: *a.name, size: a.size}
}

// stop ends a receive that waits, now and later.
func (s *socket) stop() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) } // fails once closed
