package relay

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	maxSegments  = 64    // datagrams of one UDP_SEGMENT send
	maxTrain     = 65507 // bytes of one, the largest UDP payload of IPv4
	trainGroups  = 64    // messages of one sendmmsg
	trainPieces  = 512   // pieces of memory of all of them
	fullWait     = 2     // ms to wait for a full socket, once per sendmmsg
	controlSpace = 64    // source address and segment size
)

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	head unix.Msghdr
	size uint32
}

// group is what the kernel gets as one message: datagrams of one size, but for
// the last, which may be shorter. They are one piece of memory, or a piece each.
type group struct {
	to     *transport
	first  int // of its pieces
	pieces int
	count  int // datagrams
	bytes  int
	stride int  // bytes of each but the last
	own    bool // an answer of ours, not forwarded
	pinned bool // it leaves from the address the node talks to
}

// train is one sendmmsg on one socket. One goroutine uses it at a time. What is
// added stays in the caller's memory and must not change before flush.
type train struct {
	s       *Server
	socket  *socket
	now     int64
	msgs    [trainGroups]mmsghdr
	groups  [trainGroups]group
	control [trainGroups][controlSpace]byte
	iovs    [trainPieces]unix.Iovec
	count   int // groups
	used    int // pieces

	next   int // first group not yet sent
	waited bool
	alone  unix.Msghdr // a datagram of a group that was refused
	piece  unix.Iovec
	run    func(fd uintptr)
}

func newTrain(s *Server) *train {
	t := &train{s: s}
	t.run = t.sendmmsg
	return t
}

// add queues datagrams for a UDP transport: those of run, all but the last of
// stride bytes.
func (t *train) add(to *transport, run []byte, stride int) {
	if stride >= len(run) || !to.segments(t.now) {
		for ; len(run) > 0; run = run[min(stride, len(run)):] {
			t.begin(to, 1)
			t.append(run[:min(stride, len(run))])
			t.end()
		}
		return
	}
	t.begin(to, 1)
	t.append(run)
	g := &t.groups[t.count]
	g.stride, g.count = stride, (len(run)+stride-1)/stride
	t.end()
}

// begin opens a group for which append will be called at most so many times.
func (t *train) begin(to *transport, pieces int) {
	if t.socket != to.socket || t.count == trainGroups || t.used+pieces > trainPieces {
		t.flush()
		t.socket = to.socket
	}
	t.groups[t.count] = group{to: to, first: t.used}
}

// append adds a datagram, or several at once, to the group that was begun.
func (t *train) append(b []byte) {
	g := &t.groups[t.count]
	if g.count == 0 {
		g.stride = len(b)
	}
	g.count++
	g.pieces++
	g.bytes += len(b)
	t.iovs[t.used].Base = unsafe.SliceData(b)
	t.iovs[t.used].SetLen(len(b))
	t.used++
}

// end closes the group.
func (t *train) end() {
	g := &t.groups[t.count]
	m := &t.msgs[t.count].head
	m.Name, m.Namelen = &g.to.name[0], g.to.size
	m.Iov = &t.iovs[g.first]
	m.SetIovlen(g.pieces)
	g.pinned = g.to.local.IsValid() && !g.to.unpinned.Load()
	t.ancillary(t.count)
	t.count++
}

// ancillary writes a group's control data.
func (t *train) ancillary(i int) {
	g := &t.groups[i]
	c := control{b: t.control[i][:0]}
	if g.pinned {
		c.source(g.to.local, g.to.socket.v4)
	}
	if g.count > 1 {
		c.segment(g.stride)
	}
	c.attach(&t.msgs[i].head)
}

// flush sends what was added, and lets go of it.
func (t *train) flush() {
	if t.count == 0 {
		return
	}
	t.next, t.waited = 0, false
	if err := t.socket.raw.Control(t.run); err != nil {
		t.lose(unix.EBADF, t.count-t.next)
	}
	clear(t.iovs[:t.used])
	for i := range t.groups[:t.count] {
		t.groups[i].to, t.msgs[i].head.Name = nil, nil
	}
	t.count, t.used = 0, 0
}

// sendmmsg sends all groups. Raw system calls: the socket never sleeps, and
// telling the scheduler costs more than it gains.
func (t *train) sendmmsg(fd uintptr) {
	for t.next < t.count {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&t.msgs[t.next])),
			uintptr(t.count-t.next), unix.MSG_DONTWAIT, 0, 0)
		if errno != 0 {
			t.recover(fd, errno)
			continue
		}
		for i := range t.groups[t.next : t.next+int(n)] {
			if g := &t.groups[t.next+i]; !g.own {
				t.sent(g.count, g.bytes)
			}
		}
		t.next += int(n)
	}
}

func (t *train) sent(count, bytes int) {
	t.s.count.datagrams.Add(uint64(count))
	t.s.count.bytes.Add(uint64(bytes))
}

// recover deals with the refusal of the next group: it is sent in another way,
// or lost.
func (t *train) recover(fd uintptr, errno syscall.Errno) {
	g := &t.groups[t.next]
	switch {
	case errno == unix.EINTR:
	case errno == unix.EAGAIN && !t.waited:
		t.wait(fd)
	case errno == unix.EAGAIN:
		t.lose(errno, t.count-t.next)
	case g.count > 1 && (errno == unix.EIO || errno == unix.EINVAL || errno == unix.EMSGSIZE):
		if errno == unix.EIO {
			g.to.socket.flat.note(t.now)
		} else {
			g.to.flat.note(t.now)
		}
		t.split(fd, g)
		t.next++
	case g.pinned && badSource(errno):
		g.to.unpinned.Store(true)
		g.pinned = false
		t.ancillary(t.next)
	default:
		t.lose(errno, 1)
	}
}

// wait waits a moment for room in the socket.
func (t *train) wait(fd uintptr) {
	t.waited = true
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, fullWait)
}

// lose gives up the next groups.
func (t *train) lose(errno syscall.Errno, groups int) {
	n := 0
	for _, g := range t.groups[t.next : t.next+groups] {
		n += g.count
	}
	t.next += groups
	t.lost(errno, n)
}

func (t *train) lost(errno syscall.Errno, n int) {
	c := &t.s.count.unsent
	switch errno {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		c = &t.s.count.full
	case unix.EMSGSIZE:
		c = &t.s.count.oversize
	}
	c.Add(uint64(n))
}

// split sends the datagrams of a group one by one.
func (t *train) split(fd uintptr, g *group) {
	for _, v := range t.iovs[g.first : g.first+g.pieces] {
		b := unsafe.Slice(v.Base, int(v.Len))
		for len(b) > 0 {
			n := min(g.stride, len(b))
			t.single(fd, g, b[:n])
			b = b[n:]
		}
	}
}

// single sends a datagram of a group alone.
func (t *train) single(fd uintptr, g *group, b []byte) {
	t.piece.Base = unsafe.SliceData(b)
	t.piece.SetLen(len(b))
	t.alone = unix.Msghdr{Name: &g.to.name[0], Namelen: g.to.size, Iov: &t.piece}
	t.alone.SetIovlen(1)
	for {
		c := control{b: t.control[t.next][:0]}
		if g.pinned {
			c.source(g.to.local, g.to.socket.v4)
		}
		c.attach(&t.alone)
		_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&t.alone)), unix.MSG_DONTWAIT)
		switch {
		case errno == 0:
			t.sent(1, len(b))
			return
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && !t.waited:
			t.wait(fd)
		case g.pinned && badSource(errno):
			g.to.unpinned.Store(true)
			g.pinned = false
		default:
			t.lost(errno, 1)
			return
		}
	}
}

// badSource reports whether an error can come from a local address that is gone
// or does not fit the route any more.
func badSource(errno syscall.Errno) bool {
	return errno == unix.EINVAL || errno == unix.EADDRNOTAVAIL || errno == unix.ENETUNREACH
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

// source makes the datagram leave from a, on a socket of IPv4 or of IPv6 that
// may carry both. The interface stays open: routing chooses it.
func (c *control) source(a netip.Addr, v4 bool) {
	if v4 {
		ip := a.As4()
		copy(c.add(unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)[4:], ip[:]) // ipi_spec_dst
		return
	}
	ip := a.As16()
	copy(c.add(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo), ip[:])
}

func (c *control) segment(size int) {
	binary.NativeEndian.PutUint16(c.add(unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2), uint16(size))
}

func (c *control) attach(m *unix.Msghdr) {
	m.Control = nil
	m.SetControllen(len(c.b))
	if len(c.b) > 0 {
		m.Control = &c.b[0]
	}
}
