package tun

import (
	"bytes"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/device"
)

// maxMessageSpace is the least room for a packet in a buffer of wireguard-go: it
// begins behind the header of a message and those of a container.
const maxMessageSpace = device.MaxMessageSize - device.MessageTransportHeaderSize - recordAt

// reader is the reading half of a tunnel: it takes what the kernel has on the
// shelf, and from there passes on what wireguard-go may hold, the most urgent
// first. One goroutine uses it.
//
// The shelf's packets lie in the first of wireguard-go's buffers, where a
// container has its first packet. What is cut from them or packed goes into the
// others, in order; a super-packet that leaves whole leaves where it is. A
// buffer of which Read says that it is empty stays as it is and where it is
// until the next call: wireguard-go takes only what is full.
type reader struct {
	n        *tunnel
	offloads offloads
	timer    *time.Timer
	run      func(fd uintptr) bool
	self     netip.Addr // own overlay IPv4; invalid: no containers
	mtu      int        // size of a container of small packets, as the Bind last had it
	largest  int        // size of a super-packet in one message

	head  virtio
	iovs  [3]unix.Iovec
	tail  [maxPacket - maxMessageSpace]byte // of a packet too large for a buffer
	shelf *shelf

	dst  netip.Addr // of the last packet
	peer *peer      // whose that is

	bufs   [][]byte // of the call in progress
	sizes  []int
	offset int
	count  int              // buffers to look at
	out    int              // the next one for what is cut or packed
	placed [shelfQueues]int // behind the last buffer with packets of each queue
	stuck  bool             // the next packet must wait for another call
	room   int              // credits left, in messages
	bytes  int              // and in bytes
	now    time.Duration
	pack   packer
	errno  syscall.Errno
}

func (r *reader) init(n *tunnel, o offloads, c *Config) {
	r.n, r.offloads, r.run = n, o, r.fill
	r.shelf = newShelf()
	for _, p := range c.Addrs {
		if p.Addr().Is4() && !r.self.IsValid() {
			r.self = p.Addr()
		}
	}
	r.timer = time.NewTimer(time.Hour)
	r.timer.Stop()
	r.iovs[2].Base = &r.tail[0]
	r.iovs[2].SetLen(len(r.tail))
	if o.header {
		r.iovs[0].Base = (*byte)(unsafe.Pointer(&r.head))
		r.iovs[0].SetLen(virtioSize)
	}
}

// begin takes the buffers of a call. Whose an address is may have changed since
// the last one.
func (r *reader) begin(bufs [][]byte, sizes []int, offset int) {
	r.bufs, r.sizes, r.offset = bufs, sizes, offset
	clear(sizes)
	r.count, r.out, r.stuck = 0, shelfSlots, false
	clear(r.placed[:])
	r.dst, r.peer = netip.Addr{}, nil
	r.shelf.renew()
}

// end lets go of the buffers and returns how many there are.
func (r *reader) end() int {
	r.shipAll()
	r.bufs, r.sizes = nil, nil
	return r.count
}

// fill passes packets on until there are none, the buffers are full or the
// credits used up. It reports false when there was nothing.
func (r *reader) fill(fd uintptr) bool {
	r.errno = 0
	r.resize()
	for {
		r.now = time.Duration(r.n.bind.now())
		more := r.drain(fd)
		if r.errno != 0 {
			return true
		}
		r.emit()
		if !more || r.full() || r.shelf.free == 0 {
			r.n.bell.waiting.Store(r.count == 0)
			return r.count > 0
		}
	}
}

// resize makes what is read from now on fit the paths.
func (r *reader) resize() {
	if mtu := int(r.n.bind.mtu.Load()); mtu != r.mtu {
		r.mtu, r.largest = mtu, superSize(mtu)
	}
}

func (r *reader) full() bool { return r.stuck || r.room <= 0 || r.bytes <= 0 || r.out >= len(r.bufs) }

// drain takes packets until the kernel has none or the shelf is full, and
// reports whether the kernel may have more.
func (r *reader) drain(fd uintptr) bool {
	for {
		i := r.shelf.vacant()
		if i == noSlot {
			return true
		}
		n, errno := r.readv(fd, r.bufs[i][r.offset+recordAt:])
		switch errno {
		case 0:
			r.accept(i, n)
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			r.errno = errno
			return false
		}
	}
}

// readv reads one packet and its virtio header.
func (r *reader) readv(fd uintptr, b []byte) (int, syscall.Errno) {
	r.iovs[1].Base = unsafe.SliceData(b)
	r.iovs[1].SetLen(len(b))
	n, _, errno := unix.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iovs)), uintptr(len(r.iovs)))
	if r.offloads.header {
		return int(n) - virtioSize, errno
	}
	return int(n), errno
}

// accept puts the packet of n bytes that readv left on the shelf.
func (r *reader) accept(i, n int) {
	b := r.bufs[i][r.offset+recordAt:]
	switch {
	case n <= 0 || n > len(b)+len(r.tail):
		return
	case n > len(b): // the kernel was told not to, see limitSuper
		b = append(bytes.Clone(b), r.tail[:n-len(b)]...)
	}
	if contained(b[:n]) {
		r.n.dropped.contained.Add(1)
		return
	}
	r.shelf.put(i, b[:n], r.head, r.now)
}

// route finds the peer of a packet, nil for none, and tells the node when it has
// no path.
func (r *reader) route(p []byte) *peer {
	_, dst := innerAddrs(p)
	if dst != r.dst || r.peer == nil {
		r.dst, r.peer = dst, r.n.peers.byAddr(dst)
	}
	if r.peer != nil && !r.peer.pathed.Load() {
		r.n.bind.demand(r.peer)
	}
	return r.peer
}

// takes reports whether containers can go to a peer, and to which address.
func (r *reader) takes(p *peer) (to netip.Addr, ok bool) {
	if p == nil || !p.large.Load() || !r.self.IsValid() {
		return to, false
	}
	a := p.inner4.Load()
	if a == nil {
		return to, false
	}
	return *a, true
}

// charge counts a message to a peer and reports whether it may pass. Packets
// to no peer pass: wireguard-go drops them at once.
func (r *reader) charge(p *peer, bytes int) bool {
	if p == nil {
		return true
	}
	if !r.n.bind.out.take(&p.out, 1, bytes) {
		return false
	}
	r.room--
	r.bytes -= bytes
	return true
}
