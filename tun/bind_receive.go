package tun

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// Bounds of a receive.
const (
	receiveMessages = 4       // of one recvmmsg, each up to 64 datagrams
	receiveSize     = 1 << 16 // bytes of each
	receiveControl  = 128     // local address and segment size
)

// arrival is one message of recvmmsg: a datagram, or several of one sender that
// the kernel joined, all of size segment but the last.
type arrival struct {
	data    []byte
	segment int
	ep      *endpoint  // of the sender
	at      netip.Addr // local address
}

// receiver is the receiving half of a socket. What one call cannot take stays
// under the cursor for the next. One goroutine uses it.
type receiver struct {
	b       *bind
	s       *socket
	msgs    [receiveMessages]mmsghdr
	iovs    [receiveMessages]unix.Iovec
	names   [receiveMessages]sockaddr
	control [receiveMessages][receiveControl]byte
	bufs    [receiveMessages][]byte

	count int // messages of the last recvmmsg
	next  int // the one after the one under the cursor
	now   arrival

	stranger *endpoint // the last sender nobody registered
	index    uint32    // of the messages being counted
	peer     *peer     // whose session that is
	taken    int       // how many
	bytes    int       // and how large
	timer    *time.Timer
	errno    syscall.Errno
	run      func(fd uintptr) bool
}

func newReceiver(b *bind, s *socket) *receiver {
	r := &receiver{b: b, s: s, timer: time.NewTimer(time.Hour)}
	r.timer.Stop()
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
	for i := range r.msgs {
		r.msgs[i].head.Namelen = unix.SizeofSockaddrInet6
		r.msgs[i].head.SetControllen(receiveControl)
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.msgs[0])),
			receiveMessages, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			r.count, r.next = int(n), 0
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

// receive is a conn.ReceiveFunc. It returns an error only after Close.
func (r *receiver) receive(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	for {
		if len(r.now.data) == 0 && r.next == r.count {
			if err := r.s.raw.Read(r.run); err != nil || r.errno != 0 {
				return 0, net.ErrClosed
			}
		}
		if room, _ := r.b.inbound.wait(r.timer, r.s.done); room == 0 {
			return 0, net.ErrClosed
		}
		if n := r.deliver(packets, sizes, eps); n > 0 {
			return n, nil
		}
	}
}

// deliver copies WireGuard's datagrams out until packets is full or nothing is
// left, and hands STUN over on the way.
func (r *receiver) deliver(packets [][]byte, sizes []int, eps []conn.Endpoint) int {
	n := 0
	for n < len(packets) {
		if len(r.now.data) == 0 {
			if !r.advance() {
				break
			}
			continue
		}
		size := min(r.now.segment, len(r.now.data))
		b := r.now.data[:size]
		r.now.data = r.now.data[size:]
		switch frameOf(b) {
		case frameWireGuard:
			if size > len(packets[n]) {
				r.b.drops.foreign.Add(1)
				continue
			}
			r.take(b)
			sizes[n], eps[n] = copy(packets[n], b), r.now.ep
			n++
		case frameSTUN:
			if r.b.config.Receive != nil {
				r.b.config.Receive(b, r.now.ep.to, r.now.at)
			}
		default:
			r.b.drops.foreign.Add(1)
		}
	}
	r.charge()
	return n
}

// take counts a message of a session of ours. Those of no session are dropped
// by wireguard-go at once and cost no credit.
func (r *receiver) take(b []byte) {
	if !isData(b) {
		return
	}
	if i := indexOf(b); r.taken == 0 || r.index != i {
		r.charge()
		r.peer, r.index = r.b.peers.byIndex(i), i
	}
	r.taken++
	r.bytes += len(b)
}

// charge books what take counted.
func (r *receiver) charge() {
	if r.taken > 0 && r.peer != nil {
		r.b.inbound.take(&r.peer.in, r.taken, r.bytes)
	}
	r.taken, r.bytes = 0, 0
}

// advance puts the next message under the cursor.
func (r *receiver) advance() bool {
	if r.next == r.count {
		return false
	}
	m := &r.msgs[r.next]
	size := int(m.size)
	local, segment := parseControl(r.control[r.next][:m.head.Controllen])
	if segment <= 0 || segment > size {
		segment = size
	}
	r.now = arrival{data: r.bufs[r.next][:size], segment: segment, ep: r.sender(r.names[r.next].get(), local), at: local}
	r.next++
	return true
}

// sender is the endpoint of an address. A stranger's is kept only until the
// next stranger, and answered from the local address it wrote to. That of a path
// is not moved by a datagram which anybody can have sent.
func (r *receiver) sender(a netip.AddrPort, local netip.Addr) *endpoint {
	if e := r.b.peers.at(a); e != nil {
		return e
	}
	if r.stranger == nil || r.stranger.to != a {
		r.stranger = newEndpoint(a, nil)
	}
	r.stranger.pin(local)
	return r.stranger
}

// parseControl reads the local address and the segment size, 0 for a single
// datagram, from ancillary data of the kernel.
func parseControl(b []byte) (local netip.Addr, segment int) {
	for len(b) >= unix.CmsgLen(0) {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			break
		}
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			local = netip.AddrFrom4([4]byte(data[4:8])) // ipi_spec_dst
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			local = netip.AddrFrom16([16]byte(data[:16]))
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			segment = int(int32(binary.NativeEndian.Uint32(data)))
		}
		b = rest
	}
	return local, segment
}
