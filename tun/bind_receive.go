package tun

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
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
	receiveControl  = 128     // local address, segment size and overflow
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
	slots    slots     // messages of which not all fragments are here
	overflow uint32    // what the socket dropped, as last heard

	known    bool              // of which peer index is
	index    uint32            // of the messages being counted
	peer     *peer             // whose session that is
	taken    int               // how many have content
	bytes    int               // and how large those are
	messages [batchSize]uint64 // their names
	counters [batchSize]uint64
	counted  int // how many counters
	timer    *time.Timer
	errno    syscall.Errno
	run      func(fd uintptr) bool
}

func newReceiver(b *bind, s *socket) *receiver {
	r := &receiver{b: b, s: s, timer: time.NewTimer(time.Hour)}
	r.slots.drops = &b.drops
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

// receive is a conn.ReceiveFunc. It returns an error only after Close.
func (r *receiver) receive(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	for {
		if len(r.now.data) == 0 && r.next == r.count {
			if err := r.wait(); err != nil || r.errno != 0 {
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

// wait waits for datagrams.
func (r *receiver) wait() error {
	r.b.bells.look(r.b.now())
	for {
		err := r.s.raw.Read(r.run)
		r.s.bell.waiting.Store(false)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		_ = r.s.conn.SetReadDeadline(time.Time{}) // fails once closed
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
		got := 0
		switch frameOf(b) {
		case frameWireGuard:
			if size > len(packets[n]) {
				r.b.drops.foreign.Add(1)
				break
			}
			got = copy(packets[n], b)
		case frameFragment:
			got, size = r.gather(packets[n], b)
		case frameSTUN:
			if r.b.config.Receive != nil {
				r.b.config.Receive(b, r.now.ep.to, r.now.at)
			}
		default:
			r.b.drops.foreign.Add(1)
		}
		r.now.data = r.now.data[size:]
		if got > 0 {
			r.take(packets[n][:got])
			sizes[n], eps[n] = got, r.now.ep
			n++
		}
	}
	r.charge()
	r.known, r.peer = false, nil
	return n
}

// gather takes the fragment b, which is under the cursor. Whose it is tells the
// index of its session, which nobody can guess; the path it takes need not be
// the one this side uses. It returns the size of
// the message that is complete with it, in dst, or 0, and how many bytes under
// the cursor it has dealt with: all of the message's, when they follow.
func (r *receiver) gather(dst, b []byte) (got, done int) {
	f, ok := parseFragment(b)
	if ok {
		p, from := r.owner(f.session), r.now.ep
		ok = p != nil && (from.peer == nil || from.peer == p) && !from.drop
	}
	if !ok {
		r.b.drops.fragments.Add(1)
		return 0, len(b)
	}
	done = len(b)
	if f.adjacent(dst, r.now.data) {
		got, done = f.length(), f.count*len(b)
	} else if got = r.slots.put(dst, source{r.peer, r.now.ep.peer != nil}, f, b[fragmentHeader:]); got == 0 {
		return 0, done
	}
	if !f.names(dst[:got]) {
		r.b.drops.fragments.Add(uint64(f.count))
		return 0, done
	}
	return got, done
}

// owner is the peer a session index was handed out to, nil when it was not. It
// is looked up once for neighbours, which are then counted together.
func (r *receiver) owner(index uint32) *peer {
	if !r.known || r.index != index {
		r.charge()
		r.peer, r.index, r.known = r.b.peers.byIndex(index), index, true
	}
	return r.peer
}

// take counts a message of a session of ours. Those of no session are dropped
// by wireguard-go at once and cost no credit.
func (r *receiver) take(b []byte) {
	if b[0] != typeData || r.owner(indexOf(b)) == nil {
		return
	}
	if r.counted == len(r.counters) {
		r.charge()
	}
	r.counters[r.counted] = counterOf(b)
	r.slots.pass(r.index, r.counters[r.counted])
	r.counted++
	if isData(b) {
		r.messages[r.taken] = nameOf(b)
		r.taken++
		r.bytes += len(b)
	}
}

// charge books what take counted.
func (r *receiver) charge() {
	if r.counted == 0 {
		return
	}
	if r.taken > 0 {
		r.b.inbound.takeNamed(&r.peer.in, r.messages[:r.taken], r.bytes)
	}
	r.peer.meter.note(r.index, r.counters[:r.counted], r.b.overflow.Load())
	if r.b.reported != nil && r.peer.meter.due(time.Duration(r.b.now())) {
		r.b.reported(r.peer)
	}
	r.taken, r.bytes, r.counted = 0, 0, 0
}

// advance puts the next message under the cursor.
func (r *receiver) advance() bool {
	if r.next == r.count {
		return false
	}
	m := &r.msgs[r.next]
	size := int(m.size)
	a := parseControl(r.control[r.next][:m.head.Controllen])
	if a.segment <= 0 || a.segment > size {
		a.segment = size
	}
	if a.overflow != 0 && a.overflow != r.overflow {
		r.b.overflow.Add(a.overflow - r.overflow)
		r.overflow = a.overflow
	}
	r.now = arrival{data: r.bufs[r.next][:size], segment: a.segment, ep: r.sender(r.names[r.next].get(), a.local), at: a.local}
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
