package tun

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of receiving from spare sockets.
const (
	poolEvents = 16 // sockets of one epoll_wait
	poolTurns  = 16 // receives from one before the others are looked at
)

// pool is what arrives at the spare sockets of one Open: an epoll instance, which
// itself is a file that the runtime polls. One goroutine receives for all of
// them, whether they are 256 that are tried or one that carries a stream.
type pool struct {
	*intake // of the socket received from last
	file    *os.File
	raw     syscall.RawConn
	bell    *bell
	done    chan struct{} // closed by close

	events [poolEvents]unix.EpollEvent
	ready  int // events of the last epoll_wait
	seen   int // of them
	turns  int // receives from one socket, one after the other
	got    bool
	poll   func(fd uintptr) bool
	take   func(fd uintptr)
}

func newPool(b *bind) (*pool, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make epoll instance: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // or the runtime would not poll it
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make epoll instance: %w", err)
	}
	p := &pool{intake: newIntake(b, nil), file: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{})}
	p.poll, p.take = p.epollWait, func(fd uintptr) { p.got = p.recvmmsg(fd) }
	if p.raw, err = p.file.SyscallConn(); err != nil {
		_ = p.file.Close()
		return nil, fmt.Errorf("own epoll instance: %w", err)
	}
	return p, nil
}

// add has what comes to a spare socket received. Closing the socket ends that.
func (p *pool) add(port uint16, s *socket) error {
	var err error
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(port)} // Fd is ours to use
	failed := p.raw.Control(func(set uintptr) {
		failed := s.raw.Control(func(fd uintptr) { err = unix.EpollCtl(int(set), unix.EPOLL_CTL_ADD, int(fd), &event) })
		err = errors.Join(err, failed)
	})
	return errors.Join(err, failed)
}

func (p *pool) close() {
	close(p.done)
	_ = p.file.Close()
}

// epollWait reports false when no socket has anything.
func (p *pool) epollWait(fd uintptr) bool {
	n, err := unix.EpollWait(int(fd), p.events[:], 0)
	p.ready, p.seen = max(n, 0), 0
	if err == nil && n == 0 {
		p.bell.waiting.Store(true)
		return false
	}
	return true // after an error the loop comes again
}

// wait waits for datagrams at any of the sockets. False means that all are
// closed. The one that brought the last is asked first: a stream goes on.
func (p *pool) wait() bool {
	p.b.bells.look(p.b.now())
	if p.turns++; p.turns < poolTurns && p.read() {
		return true
	}
	for p.turns = 0; ; {
		for p.seen < p.ready {
			p.spare = p.b.peers.spare(uint16(p.events[p.seen].Fd))
			if p.seen++; p.read() {
				return true
			}
		}
		err := p.raw.Read(p.poll)
		p.bell.waiting.Store(false)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			_ = p.file.SetReadDeadline(time.Time{}) // fails once closed
		case err != nil:
			return false
		}
	}
}

// read receives from the socket looked at, and reports whether there was
// anything.
func (p *pool) read() bool {
	if p.spare == nil {
		return false
	}
	if p.s = p.spare.now.Load(); p.s == nil {
		return false
	}
	p.got = false
	return p.s.raw.Control(p.take) == nil && p.got
}

// next is the next message. From a socket that is only tried, which joins no
// datagrams, it is STUN, or WireGuard's: the peer chooses its own path, which may
// lead here while ours does not.
func (p *pool) next(a *arrival) bool {
	for p.intake.next(a) {
		if p.spare.kept.Load() {
			return true
		}
		switch frameOf(a.data) {
		case frameWireGuard, frameFragment:
			p.adopt(a.data)
			return true
		case frameSTUN:
			return true
		}
		p.b.drops.foreign.Add(1)
		a.data = nil
	}
	return false
}

// adopt keeps a socket to which a message of a session came.
func (p *pool) adopt(b []byte) {
	index := uint32(0)
	if f, ok := parseFragment(b); ok {
		index = f.session
	} else if b[0] == typeData {
		index = indexOf(b)
	}
	if index != 0 && p.b.peers.byIndex(index) != nil {
		_ = p.b.keep(p.spare.port) // or it stays as small as it is
	}
}
