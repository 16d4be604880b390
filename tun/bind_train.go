package tun

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// trainPieces is how many pieces of memory one sendmmsg gathers: a header and a
// part for every fragment, or for every message in a flow. Some super-packets' worth; what is more goes with the
// next call.
const trainPieces = 512

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	head unix.Msghdr
	size uint32
}

// batch is what train.load sends. The zero place is its beginning.
type batch struct {
	bufs    [][]byte  // messages
	to      *endpoint // where the datagrams go
	lead    []byte    // what each begins with: the header of a flow, or nothing
	source  netip.Addr
	limit   int  // longer messages are cut to datagrams of so many bytes, without lead; 0: none is
	segment bool // equal neighbours travel as one
}

// place is where in a batch something begins.
type place struct {
	message  int
	fragment int // of that message, when it is cut
}

// bulk is what the kernel gets as one message: datagrams of one size, but for
// the last, which may be shorter.
type bulk struct {
	count int // datagrams
	size  int // of the first, in bytes
	bytes int // of all
}

// train is one sendmmsg of groups. Pooled; one goroutine uses it at a time.
type train struct {
	msgs    [batchSize]mmsghdr
	groups  [batchSize]bulk
	starts  [batchSize + 1]place // of each message, and what comes after
	control [batchSize][controlSpace]byte
	count   int // messages

	iovs   [trainPieces]unix.Iovec
	used   int
	heads  [trainPieces / 2][flowHeader + fragmentHeader]byte
	headed int
	zeros  [maxFragments]byte // padding

	next  int // first message not yet sent
	errno syscall.Errno
	run   func(fd uintptr)
}

func newTrain() *train {
	t := &train{}
	t.run = t.sendmmsg
	return t
}

// sendmmsg sends what is left. A raw system call: the socket never sleeps, and
// telling the scheduler costs more than it gains.
func (t *train) sendmmsg(fd uintptr) {
	waited := false
	for t.next < t.count {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&t.msgs[t.next])),
			uintptr(t.count-t.next), unix.MSG_DONTWAIT, 0, 0)
		t.errno = errno
		switch {
		case errno == 0:
			t.next += int(n)
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && !waited:
			waited = true
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, fullWait)
		default:
			return
		}
	}
}

// load groups the datagrams of o from a place on, as many as there is room for.
func (t *train) load(o *batch, from place) {
	t.count, t.next, t.errno = 0, 0, 0
	t.starts[0] = from
	for at := from; at.message < len(o.bufs) && t.count < batchSize; t.count++ {
		first := t.used
		at = t.couple(o, at)
		g := t.groups[t.count]
		if g.count == 0 {
			return
		}
		m := &t.msgs[t.count].head
		m.Name, m.Namelen = &o.to.name[0], o.to.size
		m.Iov = &t.iovs[first]
		m.SetIovlen(t.used - first)
		c := control{b: t.control[t.count][:0]}
		c.source(o.source)
		if g.count > 1 {
			c.segment(g.size)
		}
		c.attach(m)
		t.starts[t.count+1] = at
	}
}

// couple makes the next group, empty when there is no room, of what is at a
// place, and returns the place behind it.
func (t *train) couple(o *batch, at place) place {
	g := bulk{}
	for at.message < len(o.bufs) {
		m := o.bufs[at.message]
		f, fragmented := cut(m, o.limit)
		size, left := len(o.lead)+len(m), 1
		if fragmented {
			size, left = len(o.lead)+fragmentHeader+f.size, f.count-at.fragment
		}
		n := min(left, t.room(g, size, o.segment))
		// A message is torn only when no group has room for it.
		if n == 0 || n < left && o.segment && (g.count > 0 || t.short(left)) || fragmented && g.count > 0 && size != g.size {
			break
		}
		for range n {
			f.index = at.fragment
			t.add(o.lead, m, f)
			at.fragment++
		}
		if g.count == 0 {
			g.size = size
		}
		g.count += n
		g.bytes += n * size
		if n == left {
			at = place{message: at.message + 1}
		}
		if n < left || size < g.size || !o.segment {
			break
		}
	}
	t.groups[t.count] = g
	return at
}

// room is how many datagrams of a size g may still get.
func (t *train) room(g bulk, size int, segment bool) int {
	n := (trainPieces - t.used - 1) / 2
	switch {
	case g.count == 0 && (!segment || size == 0):
		return min(n, 1)
	case g.count == 0:
		return min(n, maxSegments, max(1, maxTrain/size))
	case size == 0 || size > g.size:
		return 0
	}
	return min(n, maxSegments-g.count, (maxTrain-g.bytes)/size)
}

// short reports whether the next sendmmsg would have more room for fragments.
func (t *train) short(left int) bool { return t.used > 0 && (trainPieces-t.used-1)/2 < left }

// add puts a datagram into the group being made: a fragment of a message, or all
// of it, behind lead.
func (t *train) add(lead, message []byte, f fragment) {
	if f.count == 0 {
		if len(lead) > 0 {
			t.piece(lead)
		}
		t.piece(message)
		return
	}
	head := t.heads[t.headed][:len(lead)+fragmentHeader]
	t.headed++
	copy(head, lead)
	f.put(head[len(lead):])
	t.piece(head)
	t.piece(f.part(message))
	if f.index == f.count-1 && f.padding > 0 {
		t.piece(t.zeros[:f.padding])
	}
}

func (t *train) piece(b []byte) {
	t.iovs[t.used].Base = unsafe.SliceData(b)
	t.iovs[t.used].SetLen(len(b))
	t.used++
}

// unload lets go of the caller's memory.
func (t *train) unload() {
	clear(t.iovs[:t.used])
	for i := range t.msgs[:t.count] {
		t.msgs[i].head.Name = nil
	}
	t.count, t.used, t.headed = 0, 0, 0
}

// rest is where what was not sent begins, and whether that was refused as a
// group.
func (t *train) rest() (place, bool) {
	return t.starts[t.next], t.next < t.count && t.groups[t.next].count > 1
}

// control builds ancillary data in b, which has the room.
type control struct{ b []byte }

// add appends a message with n bytes of data and returns them, zeroed.
func (c *control) add(level, kind int32, n int) []byte {
	at := len(c.b)
	c.b = c.b[:at+unix.CmsgSpace(n)]
	clear(c.b[at:])
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.b[at]))
	h.Level, h.Type = level, kind
	h.SetLen(unix.CmsgLen(n))
	return c.b[at+unix.CmsgLen(0):][:n]
}

// source makes the datagram leave from a. The interface stays open: routing
// chooses it.
func (c *control) source(a netip.Addr) {
	switch {
	case a.Is4():
		ip := a.As4()
		copy(c.add(unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)[4:], ip[:]) // ipi_spec_dst
	case a.Is6():
		ip := a.As16()
		copy(c.add(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo), ip[:])
	}
}

func (c *control) segment(size int) {
	binary.NativeEndian.PutUint16(c.add(unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2), uint16(size))
}

// hops sets the TTL or hop limit of this datagram alone.
func (c *control) hops(v4 bool, n int) {
	level, kind := int32(unix.IPPROTO_IPV6), int32(unix.IPV6_HOPLIMIT)
	if v4 {
		level, kind = unix.IPPROTO_IP, unix.IP_TTL
	}
	binary.NativeEndian.PutUint32(c.add(level, kind, 4), uint32(n))
}

func (c *control) attach(m *unix.Msghdr) {
	m.Control = nil
	m.SetControllen(len(c.b))
	if len(c.b) > 0 {
		m.Control = &c.b[0]
	}
}
