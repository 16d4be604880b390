package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// Bounds of a send.
const (
	maxSegments  = 64    // datagrams of one UDP_SEGMENT send
	maxTrain     = 65507 // bytes of one, the largest UDP payload of IPv4
	fullWait     = 4     // ms to wait for a full socket, once per call
	sendTries    = 4     // with less each time: no source address, no segmentation
	controlSpace = 96    // source address, segment size and hop limit
)

// errMesh says that UDP was to be sent into the overlay itself.
var errMesh = errors.New("address is inside the overlay")

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	head unix.Msghdr
	size uint32
}

// train is one sendmmsg: datagrams grouped so that equal neighbours travel as
// one message the kernel cuts. Pooled; one goroutine uses it at a time.
type train struct {
	msgs    [batchSize]mmsghdr
	iovs    [batchSize]unix.Iovec
	firsts  [batchSize + 1]int // first datagram of each message
	control [batchSize][controlSpace]byte
	count   int // messages

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

// load groups bufs into messages to e.
func (t *train) load(bufs [][]byte, e *endpoint, source netip.Addr, segment bool) {
	t.count, t.next, t.errno = 0, 0, 0
	for i := 0; i < len(bufs); {
		n := 1
		if segment {
			n = runOf(bufs[i:])
		}
		for j, b := range bufs[i : i+n] {
			t.iovs[i+j].Base = unsafe.SliceData(b)
			t.iovs[i+j].SetLen(len(b))
		}
		m := &t.msgs[t.count].head
		m.Name, m.Namelen = &e.name[0], e.size
		m.Iov = &t.iovs[i]
		m.SetIovlen(n)
		c := control{b: t.control[t.count][:0]}
		c.source(source)
		if n > 1 {
			c.segment(len(bufs[i]))
		}
		c.attach(m)
		t.firsts[t.count] = i
		t.count++
		i += n
	}
	t.firsts[t.count] = len(bufs)
}

// unload lets go of the caller's memory.
func (t *train) unload() {
	clear(t.iovs[:t.firsts[t.count]])
	for i := range t.msgs[:t.count] {
		t.msgs[i].head.Name = nil
	}
	t.count = 0
}

// runOf counts the datagrams at the head of bufs that can travel as one: all of
// one size but the last, which may be shorter.
func runOf(bufs [][]byte) int {
	size, total := len(bufs[0]), len(bufs[0])
	if size == 0 {
		return 1
	}
	n := 1
	for n < len(bufs) && n < maxSegments {
		next := len(bufs[n])
		if next == 0 || next > size || total+next > maxTrain {
			break
		}
		total += next
		n++
		if next < size {
			break
		}
	}
	return n
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

// Send passes messages of wireguard-go to an endpoint. A handle drops them. An
// initiation of the side that should not initiate is held for a moment. It
// waits for a full socket a few milliseconds at most.
func (b *bind) Send(bufs [][]byte, ep conn.Endpoint) error {
	e, ok := ep.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if len(bufs) == 0 || len(bufs[0]) < keepaliveSize {
		return nil
	}
	content := 0
	for _, m := range bufs {
		if isData(m) {
			content++
		}
	}
	if e.peer != nil {
		b.book(bufs[0], e.peer, content)
	}
	if e.drop {
		b.drops.handled.Add(uint64(len(bufs)))
		if e.peer != nil {
			b.tell(e.peer)
		}
		return nil
	}
	if e.peer != nil {
		if bufs[0][0] == typeInitiation && len(bufs[0]) == initiationSize && !e.peer.initiate.Load() {
			b.holds.keep(bufs[0], e)
			return nil
		}
		b.spoke(e.peer, content, bufs[0][0] == typeInitiation)
	}
	return b.transmit(bufs, e)
}

// book gives credits back and learns from handshakes. A response means that
// the peer's initiation was accepted: ours, if one is held, is not needed.
func (b *bind) book(first []byte, p *peer, content int) {
	if content > 0 {
		b.out.settle(&p.out, content)
		return
	}
	switch first[0] {
	case typeResponse:
		b.holds.drop(p)
		b.peers.learn(indexOf(first), p)
	case typeInitiation:
		b.peers.learn(indexOf(first), p)
	}
}

// spoke counts what is sent on a path, and tells the node when the peer was not
// spoken to for a while.
func (b *bind) spoke(p *peer, content int, initiation bool) {
	if content == 0 && !initiation {
		return
	}
	p.sent.Add(uint64(content))
	now := b.now()
	if last := p.lastSent.Swap(now); now-last >= int64(silence) || last == 0 {
		b.tell(p)
	}
}

// transmitHeld sends an initiation whose time has come.
func (b *bind) transmitHeld(message []byte, to *endpoint) {
	b.spoke(to.peer, 0, true)
	if err := b.transmit([][]byte{message}, to); err != nil {
		b.config.logger().Debug("held initiation not sent", "to", to.to, "err", err)
	}
}

// transmit sends bufs on a path, without the source address and without
// segmentation when the kernel refuses those.
func (b *bind) transmit(bufs [][]byte, e *endpoint) error {
	open := b.open.Load()
	if open == nil {
		return net.ErrClosed
	}
	s := open.of(e.to.Addr())
	if s == nil {
		return fmt.Errorf("send to %s: %w", e.to, unix.EAFNOSUPPORT)
	}
	t := b.trains.Get().(*train)
	defer b.trains.Put(t)
	for len(bufs) > 0 {
		n := min(len(bufs), batchSize)
		if err := b.flush(t, bufs[:n], e, s); err != nil {
			return err
		}
		bufs = bufs[n:]
	}
	return nil
}

func (b *bind) flush(t *train, bufs [][]byte, e *endpoint, s *socket) error {
	for try := 0; ; try++ {
		source, segment := e.SrcIP(), s.gso.Load() && !e.flat.Load()
		t.load(bufs, e, source, segment)
		err := s.raw.Control(t.run)
		sent, failed := t.firsts[t.next], t.errno
		train := t.next < t.count && t.firsts[t.next+1]-sent > 1
		t.unload()
		if err != nil {
			return net.ErrClosed
		}
		bufs = bufs[sent:]
		switch {
		case len(bufs) == 0:
			return nil
		case failed == unix.EAGAIN:
			b.drops.full.Add(uint64(len(bufs)))
			return nil
		case try == sendTries:
			return fmt.Errorf("send to %s: %w", e.to, failed)
		case source.IsValid() && badSource(failed):
			e.pin(netip.Addr{})
		case train && failed == unix.EIO:
			s.gso.Store(false)
		case train && (failed == unix.EINVAL || failed == unix.EMSGSIZE):
			e.flat.Store(true)
		default:
			return fmt.Errorf("send to %s: %w", e.to, failed)
		}
	}
}

// badSource reports whether an error can come from a local address that is
// gone or does not fit the route any more.
func badSource(errno syscall.Errno) bool {
	return errno == unix.EINVAL || errno == unix.EADDRNOTAVAIL || errno == unix.ENETUNREACH
}

// send sends one datagram of ours, from a local address when from is valid, and
// with a TTL or hop limit of its own when ttl is not 0.
func (b *bind) send(p []byte, to netip.AddrPort, from netip.Addr, ttl int) error {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if b.config.meshed(to.Addr()) {
		return fmt.Errorf("send to %s: %w", to, errMesh)
	}
	open := b.open.Load()
	if open == nil {
		return fmt.Errorf("send to %s: %w", to, net.ErrClosed)
	}
	s := open.of(to.Addr())
	if s == nil {
		return fmt.Errorf("send to %s: %w", to, unix.EAFNOSUPPORT)
	}
	e := newEndpoint(to, nil)
	e.pin(from)
	err := b.sendOne(p, e, s, ttl)
	if errno := syscall.Errno(0); from.IsValid() && errors.As(err, &errno) && badSource(errno) {
		e.pin(netip.Addr{})
		err = b.sendOne(p, e, s, ttl)
	}
	if err != nil {
		return fmt.Errorf("send to %s: %w", to, err)
	}
	return nil
}

func (b *bind) sendOne(p []byte, e *endpoint, s *socket, ttl int) error {
	t := b.trains.Get().(*train)
	defer b.trains.Put(t)
	t.load([][]byte{p}, e, e.SrcIP(), false)
	if ttl > 0 {
		c := control{b: t.control[0][:0]}
		c.source(e.SrcIP())
		c.hops(e.to.Addr().Is4(), ttl)
		c.attach(&t.msgs[0].head)
	}
	err, errno := s.raw.Control(t.run), t.errno
	t.unload()
	switch {
	case err != nil:
		return net.ErrClosed
	case errno != 0:
		return errno
	}
	return nil
}
