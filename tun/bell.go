package tun

import (
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lookEvery = 50 * time.Microsecond // the shortest time between two looks
	maxBells  = 4                     // the TUN, a socket of each family, and all spare ones
)

// bells wake goroutines that wait for a file. Go asks the kernel which files are
// ready only when it has nothing else to run: on one processor, with a stream to
// carry, a single packet would wait for up to 10 ms. So those who are busy look
// after those who wait; a ping during a stream takes a third less time. The zero
// value has none. Safe for concurrent use.
type bells struct {
	last atomic.Int64 // when somebody looked, since the Bind was made

	mu   sync.Mutex
	list []*bell
}

// bell is that of one goroutine and its file.
type bell struct {
	waiting atomic.Bool // the goroutine does, or is about to
	fd      int32
	ring    func()
}

// hang adds the bell of a file. It rings by a read deadline in the past: the one
// who waits takes the deadline back.
func (l *bells) hang(raw syscall.RawConn, deadline func(time.Time) error) *bell {
	b := &bell{fd: -1, ring: func() { _ = deadline(time.Unix(1, 0)) }} // fails once closed
	if raw.Control(func(fd uintptr) { b.fd = int32(fd) }) != nil {
		return b
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, b)
	return b
}

// take takes a bell down, before its file is closed: the number of the file may
// be another's then.
func (l *bells) take(b *bell) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = slices.DeleteFunc(l.list, func(one *bell) bool { return one == b })
}

// look rings for those whose file is ready.
func (l *bells) look(now int64) {
	last := l.last.Load()
	if now-last < int64(lookEvery) || !l.last.CompareAndSwap(last, now) || !l.mu.TryLock() {
		return
	}
	defer l.mu.Unlock()
	var fds [maxBells]unix.PollFd
	var asked [maxBells]*bell
	n := 0
	for _, b := range l.list {
		if n < maxBells && b.waiting.Load() {
			fds[n], asked[n] = unix.PollFd{Fd: b.fd, Events: unix.POLLIN}, b
			n++
		}
	}
	if n == 0 {
		return
	}
	if ready, err := unix.Poll(fds[:n], 0); err != nil || ready == 0 {
		return
	}
	for i, b := range asked[:n] {
		if fds[i].Revents != 0 && b.waiting.Swap(false) {
			b.ring()
		}
	}
}
