package tun

import (
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writer is the writing half of a tunnel: it joins packets of a flow to
// super-packets and writes those. Safe for concurrent use.
type writer struct {
	mu     sync.Mutex
	raw    syscall.RawConn
	header bool // packets begin with a virtio header
	tcp    bool // TCP is joined
	udp    bool // UDP is joined
	groups [batchSize]group
	count  int
	head   virtio
	iovs   [maxJoined + 1]unix.Iovec
	errno  syscall.Errno // the first of the call
	run    func(fd uintptr) bool
}

func (w *writer) init(n *tunnel, o offloads, plain bool) {
	w.raw, w.header, w.run = n.raw, o.header, w.flush
	w.tcp, w.udp = o.tcp && !plain, o.udp && !plain
}

// write gives packets to the kernel, in order within each flow. It returns how
// many there were and the first error.
func (w *writer) write(bufs [][]byte, offset int) (int, syscall.Errno) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errno = 0
	for rest := bufs; len(rest) > 0; {
		n := min(len(rest), batchSize)
		for _, b := range rest[:n] {
			w.place(b[offset:])
		}
		if err := w.raw.Write(w.run); err != nil {
			w.fail(unix.EBADF)
		}
		w.clear()
		rest = rest[n:]
	}
	return len(bufs), w.errno
}

// place joins p to the newest group of its flow or begins another.
func (w *writer) place(p []byte) {
	l := layoutOf(p)
	if w.joins(l.flow.proto) {
		for i := w.count - 1; i >= max(0, w.count-lookBack); i-- {
			g := &w.groups[i]
			if g.layout.flow != l.flow {
				continue
			}
			if g.add(p, l) {
				return
			}
			break
		}
	} else {
		l.joinable = false
	}
	w.groups[w.count].begin(p, l)
	w.count++
}

func (w *writer) joins(proto uint8) bool {
	return proto == unix.IPPROTO_TCP && w.tcp || proto == unix.IPPROTO_UDP && w.udp
}

// flush writes the groups in the order they began.
func (w *writer) flush(fd uintptr) bool {
	for i := range w.groups[:w.count] {
		g := &w.groups[i]
		w.head = g.join()
		errno := w.writev(fd, g.packets, g.layout.headers)
		if errno != 0 && len(g.packets) > 1 && errno != unix.EIO && !closedTUN(errno) {
			errno = w.apart(fd, g, errno)
		}
		w.fail(errno)
	}
	return true
}

// apart writes a group the kernel refused packet by packet. When it cannot have
// such groups at all there will be no more.
func (w *writer) apart(fd uintptr, g *group, refused syscall.Errno) syscall.Errno {
	if refused == unix.EINVAL {
		w.tcp = w.tcp && g.layout.flow.proto != unix.IPPROTO_TCP
		w.udp = w.udp && g.layout.flow.proto != unix.IPPROTO_UDP
	}
	g.part()
	w.head = virtio{}
	var first syscall.Errno
	for i := range g.packets {
		if errno := w.writev(fd, g.packets[i:i+1], 0); first == 0 {
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
}
