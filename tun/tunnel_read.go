package tun

import (
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directSize is how much of a packet is read straight into wireguard-go's
// buffer. A whole super-packet there would leave 64 KiB of every buffer in
// memory.
const directSize = 2048

// reader is the reading half of a tunnel. One goroutine uses it.
type reader struct {
	n        *tunnel
	offloads offloads
	timer    *time.Timer
	run      func(fd uintptr) bool

	head  virtio
	iovs  [3]unix.Iovec
	spill [maxPacket + directSize]byte // what of a packet comes after directSize
	super split                        // packets not yet delivered, in spill

	dst  netip.Addr // of the last packet
	peer *peer      // whose that is

	bufs   [][]byte // of the call in progress
	sizes  []int
	offset int
	count  int
	room   int // credits left, in messages
	bytes  int // and in bytes
	errno  syscall.Errno
}

func (r *reader) init(n *tunnel, o offloads) {
	r.n, r.offloads, r.run = n, o, r.fill
	r.timer = time.NewTimer(time.Hour)
	r.timer.Stop()
	if o.header {
		r.iovs[0].Base = (*byte)(unsafe.Pointer(&r.head))
		r.iovs[0].SetLen(virtioSize)
	}
	r.iovs[2].Base = &r.spill[directSize]
	r.iovs[2].SetLen(maxPacket)
}

// fill takes packets until the kernel has none, the buffers are full or the
// credits used up. It reports false when there was nothing.
func (r *reader) fill(fd uintptr) bool {
	r.errno = 0
	for r.count < len(r.bufs) {
		if r.super.left() > 0 {
			r.cut()
			continue
		}
		if r.room <= 0 || r.bytes <= 0 {
			break
		}
		n, errno := r.readv(fd)
		switch errno {
		case 0:
			r.accept(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return r.count > 0
		default:
			r.errno = errno
			return true
		}
	}
	return true
}

// readv reads one packet: its virtio header, its head into the next buffer and
// the rest into spill.
func (r *reader) readv(fd uintptr) (int, syscall.Errno) {
	direct := r.bufs[r.count][r.offset:]
	r.iovs[1].Base = unsafe.SliceData(direct)
	r.iovs[1].SetLen(min(directSize, len(direct)))
	n, _, errno := unix.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iovs)), uintptr(len(r.iovs)))
	if r.offloads.header {
		return int(n) - virtioSize, errno
	}
	return int(n), errno
}

// accept takes the packet of n bytes that readv left.
func (r *reader) accept(n int) {
	direct := r.bufs[r.count][r.offset:]
	if n <= 0 || n > maxPacket {
		return
	}
	if r.head.kind != kindNone {
		copy(r.spill[:directSize], direct)
		if r.super.start(r.spill[:n], r.head) && !r.admit(r.spill[:n], r.super.left()) {
			r.super = split{}
		}
		return
	}
	if n > len(direct) {
		return
	}
	if n > directSize {
		copy(direct[directSize:], r.spill[directSize:n])
	}
	if r.head.flags&needsSum != 0 && !complete(direct[:n], r.head) {
		return
	}
	if r.admit(direct[:n], 1) {
		r.sizes[r.count] = n
		r.count++
	}
}

// cut delivers packets of the super-packet as long as there are buffers.
func (r *reader) cut() {
	for r.count < len(r.bufs) && r.super.left() > 0 {
		n := r.super.next(r.bufs[r.count][r.offset:])
		if n == 0 {
			return
		}
		r.sizes[r.count] = n
		r.count++
	}
}

// admit counts n messages to the peer of a packet, tells the node when the peer
// has no path, and reports whether they may pass. Packets to no peer pass:
// wireguard-go drops them at once.
func (r *reader) admit(p []byte, n int) bool {
	_, dst := innerAddrs(p)
	if dst != r.dst || r.peer == nil {
		r.dst, r.peer = dst, r.n.peers.byAddr(dst)
	}
	if r.peer == nil {
		return true
	}
	if !r.peer.pathed.Load() {
		r.n.bind.demand(r.peer)
	}
	if !r.n.bind.out.take(&r.peer.out, n, len(p)) {
		return false
	}
	r.room -= n
	r.bytes -= len(p)
	return true
}
