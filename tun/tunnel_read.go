package tun

import (
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directSize is how much of a packet is read straight into wireguard-go's
// buffer as long as super-packets are cut. A whole one there would leave 64 KiB
// of every buffer in memory.
const directSize = 2048

// reader is the reading half of a tunnel. One goroutine uses it.
type reader struct {
	n        *tunnel
	offloads offloads
	timer    *time.Timer
	run      func(fd uintptr) bool
	self     netip.Addr // own overlay IPv4; invalid: no containers
	mtu      int        // size of a container of small packets
	largest  int        // size of a super-packet in one message

	head  virtio
	iovs  [3]unix.Iovec
	spill [maxPacket]byte // what of a packet comes after reach, at the same place
	at    int             // where in the buffer the packet under way begins
	reach int             // how much of it is there
	super rest

	dst   netip.Addr // of the last packet
	peer  *peer      // whose that is
	apart bool       // packets are likely to become records
	whole bool       // super-packets are likely to leave uncut

	bufs   [][]byte // of the call in progress
	sizes  []int
	offset int
	count  int
	room   int // credits left, in messages
	bytes  int // and in bytes
	pack   packer
	errno  syscall.Errno
}

// rest is a super-packet being cut, in spill.
type rest struct {
	split
	peer *peer
	to   netip.Addr // of containers
	step int        // packets of one message
	kind uint8      // of the record
}

func (r *reader) init(n *tunnel, o offloads, c *Config) {
	r.n, r.offloads, r.run = n, o, r.fill
	r.mtu, r.largest = c.MTU, superSize(c.MTU)
	for _, p := range c.Addrs {
		if p.Addr().Is4() && !r.self.IsValid() {
			r.self = p.Addr()
		}
	}
	r.timer = time.NewTimer(time.Hour)
	r.timer.Stop()
	if o.header {
		r.iovs[0].Base = (*byte)(unsafe.Pointer(&r.head))
		r.iovs[0].SetLen(virtioSize)
	}
}

// begin takes the buffers of a call. Whose an address is may have changed since
// the last one.
func (r *reader) begin(bufs [][]byte, sizes []int, offset int) {
	r.bufs, r.sizes, r.offset, r.count = bufs, sizes, offset, 0
	r.dst, r.peer = netip.Addr{}, nil
}

// end lets go of the buffers and returns how many there are.
func (r *reader) end() int {
	r.shipAll()
	r.bufs, r.sizes = nil, nil
	return r.count
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

// readv reads one packet: its virtio header, its head into the next buffer,
// where the last ones had to be, and the rest into spill.
func (r *reader) readv(fd uintptr) (int, syscall.Errno) {
	direct := r.bufs[r.count][r.offset:]
	r.at, r.reach = 0, directSize
	if r.apart {
		r.at = recordAt
	}
	if r.whole {
		r.reach = r.largest
	}
	direct = direct[r.at:]
	r.reach = min(r.reach, len(direct))
	r.iovs[1].Base = unsafe.SliceData(direct)
	r.iovs[1].SetLen(r.reach)
	r.iovs[2].Base = &r.spill[r.reach]
	r.iovs[2].SetLen(len(r.spill) - r.reach)
	n, _, errno := unix.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iovs)), uintptr(len(r.iovs)))
	if r.offloads.header {
		return int(n) - virtioSize, errno
	}
	return int(n), errno
}

// gather brings the packet of n bytes that readv left together at a place in
// the buffer. It returns nil when it does not fit.
func (r *reader) gather(n, at int) []byte {
	direct := r.bufs[r.count][r.offset:]
	if at+n > len(direct) {
		return nil
	}
	if here := min(n, r.reach); at != r.at || here < n {
		copy(direct[at:], direct[r.at:r.at+here])
		copy(direct[at+here:], r.spill[here:n])
		r.at, r.reach = at, n
	}
	return direct[at : at+n]
}

// accept takes the packet of n bytes that readv left.
func (r *reader) accept(n int) {
	if n <= 0 || n > maxPacket {
		return
	}
	front := r.bufs[r.count][r.offset+r.at:][:min(n, r.reach)]
	if contained(front) {
		r.n.dropped.contained.Add(1)
		return
	}
	p := r.route(front)
	to, able := r.takes(p)
	r.apart = able
	switch {
	case r.head.kind != kindNone:
		r.acceptSuper(n, p, to)
	case able && r.small(n):
		r.acceptSmall(n, p, to)
	default:
		r.acceptPlain(n, p)
	}
}

// acceptPlain makes the packet a message of its own.
func (r *reader) acceptPlain(n int, p *peer) {
	b := r.gather(n, 0)
	if b == nil || r.head.flags&needsSum != 0 && !complete(b, r.head) {
		return
	}
	r.shipOf(p)
	if r.charge(p, 1, n) {
		r.sizes[r.count] = n
		r.count++
	}
}

// acceptSuper makes a super-packet one message, or begins to cut it.
func (r *reader) acceptSuper(n int, p *peer, to netip.Addr) {
	step := 1
	if r.apart {
		step = p.level.segments()
	}
	r.whole = step >= levelWhole
	if r.whole && n <= r.largest && r.passWhole(n, p, to) {
		return
	}
	direct := r.bufs[r.count][r.offset+r.at:]
	copy(r.spill[:n], direct[:min(n, r.reach)])
	b := r.spill[:n]
	s := piece{data: b, layout: layoutOf(b)}
	kind := s.layout.superKind()
	if step > 1 {
		if !s.layout.matches(r.head) || !s.is(kind, int(r.head.segment)) {
			step = 1
		} else {
			step = max(1, min(step, (r.largest-s.layout.headers)/s.segment))
		}
	}
	r.shipOf(p)
	r.super = rest{peer: p, to: to, step: step, kind: kind}
	if r.super.start(b, r.head) && !r.charge(p, (r.super.left()+step-1)/step, n) {
		r.super = rest{}
	}
}

// passWhole makes a super-packet one message, or reports false: it is none that
// the far side could take.
func (r *reader) passWhole(n int, p *peer, to netip.Addr) bool {
	b := r.gather(n, recordAt)
	if b == nil {
		return false
	}
	s := piece{data: b, layout: layoutOf(b)}
	kind := s.layout.superKind()
	if !s.layout.matches(r.head) || !s.is(kind, int(r.head.segment)) {
		return false
	}
	r.shipOf(p)
	if r.charge(p, 1, n) {
		r.record(kind, n, s.segment, p, to)
	}
	return true
}

// record makes the super-packet of n bytes behind the headers in the next buffer
// a container.
func (r *reader) record(kind uint8, n, segment int, p *peer, to netip.Addr) {
	b := r.bufs[r.count][r.offset:]
	putRecord(b[ipv4HeaderSize:], kind, n, segment)
	r.sizes[r.count] = r.seal(b, p, to, recordAt+n, recordAt+r.largest+reportRecord)
	r.count++
}

// cut delivers messages of the super-packet as long as there are buffers.
func (r *reader) cut() {
	s := &r.super
	for r.count < len(r.bufs) && s.left() > 0 {
		b := r.bufs[r.count][r.offset:]
		if s.step > 1 && s.left() > 1 {
			n := s.chunk(b[recordAt:], s.step)
			if n == 0 {
				return
			}
			r.record(s.kind, n, s.segment, s.peer, s.to)
			continue
		}
		n := s.next(b)
		if n == 0 {
			return
		}
		r.sizes[r.count] = n
		r.count++
	}
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

// charge counts n messages to a peer and reports whether they may pass. Packets
// to no peer pass: wireguard-go drops them at once.
func (r *reader) charge(p *peer, n, bytes int) bool {
	if p == nil {
		return true
	}
	if !r.n.bind.out.take(&p.out, n, bytes) {
		return false
	}
	r.room -= n
	r.bytes -= bytes
	return true
}
