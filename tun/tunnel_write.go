package tun

import (
	"net/netip"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writer is the writing half of a tunnel: it joins packets of a flow to
// super-packets and writes those. Safe for concurrent use.
type writer struct {
	n *tunnel

	mu     sync.Mutex
	raw    syscall.RawConn
	header bool // packets begin with a virtio header
	tcp    bool // super-packets of TCP are written
	udp    bool // and of UDP
	groups [batchSize]group
	count  int
	head   virtio
	iovs   [maxJoined + 1]unix.Iovec
	errno  syscall.Errno // the first of the call
	run    func(fd uintptr) bool

	from    sources
	packets int // taken in this call

	cutter  split           // of a super-packet the kernel does not take
	scratch [maxPacket]byte // what it cuts
	one     [1][]byte
}

func (w *writer) init(n *tunnel, o offloads, c *Config) {
	w.n, w.raw, w.header, w.run = n, n.raw, o.header, w.flush
	plain := c.switched(offGRO)
	w.tcp, w.udp = o.tcp && !plain, o.udp && !plain
}

// write gives packets of p to the kernel, in order within each flow; src is one
// of its addresses. It returns how many there were, with those in containers,
// and the first error.
func (w *writer) write(bufs [][]byte, offset int, p *peer, src netip.Addr) (int, syscall.Errno) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errno, w.packets = 0, 0
	w.from = sources{peer: p, first: src}
	for _, b := range bufs {
		b = b[offset:]
		if len(b) == 0 || packetSize(b) != len(b) {
			continue // wireguard-go adds IPv6 lengths modulo 2^16, and leaves a stump of such a packet
		}
		if contained(b) {
			w.unpack(b)
			continue
		}
		one := pieceOf(b)
		w.place(&one)
	}
	w.deliver()
	w.from = sources{}
	return w.packets, w.errno
}

// place joins p to the newest group of its flow or begins another.
func (w *writer) place(p *piece) {
	w.packets++
	if w.joins(p.layout.flow.proto) {
		for i := w.count - 1; i >= max(0, w.count-lookBack); i-- {
			g := &w.groups[i]
			if g.layout.flow != p.layout.flow {
				continue
			}
			if g.add(p) {
				return
			}
			break
		}
	} else {
		p.layout.joinable = false
	}
	if w.count == len(w.groups) {
		w.deliver()
	}
	w.groups[w.count].begin(p)
	w.count++
}

func (w *writer) joins(proto uint8) bool {
	return proto == unix.IPPROTO_TCP && w.tcp || proto == unix.IPPROTO_UDP && w.udp
}

// deliver writes the groups and begins anew.
func (w *writer) deliver() {
	if err := w.raw.Write(w.run); err != nil {
		w.fail(unix.EBADF)
	}
	w.clear()
}

// flush writes the groups in the order they began.
func (w *writer) flush(fd uintptr) bool {
	for i := range w.groups[:w.count] {
		w.fail(w.give(fd, &w.groups[i]))
	}
	return true
}

// give writes one group.
func (w *writer) give(fd uintptr, g *group) syscall.Errno {
	if g.segments > 1 && !w.joins(g.layout.flow.proto) || g.partial && !w.header {
		return w.apart(fd, g, 0)
	}
	w.head = g.join()
	errno := w.writev(fd, g.packets, g.layout.headers)
	if errno != 0 && g.segments > 1 && errno != unix.EIO && !closedTUN(errno) {
		g.part()
		return w.apart(fd, g, errno)
	}
	return errno
}

// apart writes what the kernel refused packet by packet. When it cannot have
// super-packets at all, not even those made here, there will be no more.
func (w *writer) apart(fd uintptr, g *group, refused syscall.Errno) syscall.Errno {
	if refused == unix.EINVAL && len(g.packets) == g.segments {
		w.tcp = w.tcp && g.layout.flow.proto != unix.IPPROTO_TCP
		w.udp = w.udp && g.layout.flow.proto != unix.IPPROTO_UDP
	}
	var first syscall.Errno
	for _, p := range g.packets {
		errno := w.single(fd, p, g)
		if first == 0 {
			first = errno
		}
	}
	return first
}

// single writes one packet of a group, cut when it is a super-packet.
func (w *writer) single(fd uintptr, p []byte, g *group) syscall.Errno {
	segments := g.count(p)
	w.head = g.head(segments)
	if segments == 1 {
		if g.partial && !w.header {
			complete(p, w.head)
		}
		w.one[0] = p
		return w.writev(fd, w.one[:], 0)
	}
	if !w.cutter.start(p, w.head) {
		return unix.EINVAL
	}
	w.head = virtio{}
	var first syscall.Errno
	for w.cutter.left() > 0 {
		w.one[0] = w.scratch[:w.cutter.next(w.scratch[:])]
		if errno := w.writev(fd, w.one[:], 0); first == 0 {
			first = errno
		}
	}
	return first
}

// writev writes one packet made of the first and the payloads of the others.
func (w *writer) writev(fd uintptr, packets [][]byte, headers int) syscall.Errno {
	iovs := w.iovs[:0]
	if w.header {
		iovs = append(iovs, unix.Iovec{Base: (*byte)(unsafe.Pointer(&w.head))})
		iovs[0].SetLen(virtioSize)
	}
	for i, p := range packets {
		if i > 0 {
			p = p[headers:]
		}
		iovs = append(iovs, unix.Iovec{Base: unsafe.SliceData(p)})
		iovs[len(iovs)-1].SetLen(len(p))
	}
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iovs))), uintptr(len(iovs)))
		if errno != unix.EINTR {
			return errno
		}
	}
}

func (w *writer) fail(errno syscall.Errno) {
	if w.errno == 0 {
		w.errno = errno
	}
}

// clear lets go of the caller's memory.
func (w *writer) clear() {
	clear(w.iovs[:])
	for i := range w.groups[:w.count] {
		clear(w.groups[i].packets)
	}
	w.count = 0
	w.one[0], w.cutter = nil, split{}
}
