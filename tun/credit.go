package tun

import (
	"sync"
	"time"
)

// Bounds of what wireguard-go holds for us. Every message is a buffer of
// 64 KiB, and its own queues have room for gigabytes of them.
const (
	creditLimit   = 256                    // messages in flight, one direction
	creditBytes   = 128 << 10              // bytes in flight, one direction; the last message may exceed it
	creditStall   = 3 * time.Millisecond   // no progress for so long: the messages are lost or parked
	creditLive    = time.Second            // progress within this: lost, not parked
	parkedLimit   = 64                     // messages let through to a peer without a session
	parkedTrickle = 100 * time.Millisecond // and one more each so often, so that handshakes are tried
)

// credit counts the messages wireguard-go holds in one direction: handed over
// (take) and not yet out at the other end (settle). Who hands over waits for
// room first. What never comes out (a message for a peer without a session, a
// replay) is written off after creditStall without progress of its peer.
// Safe for concurrent use.
type credit struct {
	mu    sync.Mutex
	held  int
	bytes int
	busy  []*account // accounts with held > 0, and some that had
	base  time.Time
	wake  chan struct{} // holds one token
}

// maxNamed is more than an account ever holds: creditLimit, and what a batch
// exceeds it by.
const maxNamed = 4 * batchSize

// names are the messages an account holds, the oldest first, where they have
// names. The zero value is empty.
type names struct {
	ring  []uint64 // maxNamed, made at first use
	first int
	count int
}

func (l *names) add(list []uint64) {
	if l.ring == nil {
		l.ring = make([]uint64, maxNamed)
	}
	for _, name := range list {
		l.ring[(l.first+l.count)%maxNamed] = name
		l.count = min(l.count+1, maxNamed)
	}
}

// upTo forgets all up to a name and returns how many those were, 0 when the name
// is not there.
func (l *names) upTo(name uint64) int {
	for i := range l.count {
		if l.ring[(l.first+i)%maxNamed] == name {
			l.first, l.count = (l.first+i+1)%maxNamed, l.count-i-1
			return i + 1
		}
	}
	return 0
}

// account is one peer's share of a credit, guarded by the credit's mutex. The
// zero value is ready.
type account struct {
	held     int
	bytes    int // of the messages held, as far as settle can tell
	names    names
	listed   bool
	moved    time.Duration // last progress, or begin of waiting for it
	settled  time.Duration // last settle; meaningful once seen
	seen     bool
	parked   bool // wireguard-go keeps the peer's messages until there is a session
	admitted int  // while parked
	next     time.Duration
}

func newCredit() *credit {
	return &credit{base: time.Now(), wake: make(chan struct{}, 1)}
}

// full reports whether there is no room. Call with mu held.
func (c *credit) full() bool { return c.held >= creditLimit || c.bytes >= creditBytes }

// take counts n messages of so many bytes in all for a. False means that a is
// parked and has had its share: the sending side drops the messages, the
// receiving side passes them uncounted.
func (c *credit) take(a *account, n, bytes int) bool {
	now := time.Since(c.base)
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.parked {
		return a.trickle(n, now)
	}
	if a.seen && now-a.moved >= creditLive {
		// A peer that is never full would keep less and less room otherwise.
		c.forget(a)
	}
	if a.held == 0 {
		a.moved = now
		if !a.listed {
			a.listed = true
			c.busy = append(c.busy, a)
		}
	}
	a.held += n
	c.held += n
	a.bytes += bytes
	c.bytes += bytes
	return true
}

// takeNamed is take for messages that come out in their order, as far as they
// come out.
func (c *credit) takeNamed(a *account, list []uint64, bytes int) {
	if c.take(a, len(list), bytes) {
		c.mu.Lock()
		defer c.mu.Unlock()
		a.names.add(list)
	}
}

func (a *account) trickle(n int, now time.Duration) bool {
	if a.admitted >= parkedLimit && now < a.next {
		return false
	}
	a.admitted += n
	a.next = now + parkedTrickle
	return true
}

// settle takes back up to n messages of a, and their share of its bytes: who
// settles cannot tell the sizes exactly.
func (c *credit) settle(a *account, n int) { c.settleTo(a, 0, n) }

// settleTo takes back the named message and all before it, whether they came out
// or not, and n where that name is not known.
func (c *credit) settleTo(a *account, name uint64, n int) {
	now := time.Since(c.base)
	c.mu.Lock()
	full := c.full()
	if upTo := a.names.upTo(name); upTo > 0 {
		n = upTo
	}
	if n = min(n, a.held); n > 0 {
		share := a.bytes * n / a.held
		a.bytes -= share
		c.bytes -= share
		a.held -= n
		c.held -= n
	}
	a.moved, a.settled, a.seen = now, now, true
	a.parked, a.admitted = false, 0
	full = full && !c.full()
	c.mu.Unlock()
	if full {
		c.signal()
	}
}

// signal wakes one of those who wait.
func (c *credit) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// forget writes off what a holds. Call with mu held.
func (c *credit) forget(a *account) {
	c.held -= a.held
	c.bytes -= a.bytes
	a.held, a.bytes = 0, 0
	a.names.first, a.names.count = 0, 0
}

// wait blocks until there is room and returns how much, in messages and in
// bytes, or 0 when done is closed. The timer is the caller's, stopped or
// expired.
func (c *credit) wait(timer *time.Timer, done <-chan struct{}) (messages, bytes int) {
	for waited := false; ; waited = true {
		c.mu.Lock()
		messages, bytes = creditLimit-c.held, creditBytes-c.bytes
		c.mu.Unlock()
		if messages > 0 && bytes > 0 {
			if waited {
				c.signal() // two may wait, one per socket, and one was woken
			}
			return messages, bytes
		}
		if !waited && c.expire() {
			continue
		}
		timer.Reset(creditStall)
		select {
		case <-c.wake:
			timer.Stop()
		case <-timer.C:
			c.expire()
		case <-done:
			timer.Stop()
			return 0, 0
		}
	}
}

// expire writes off what peers without progress hold, and reports whether there
// was anything.
func (c *credit) expire() (some bool) {
	now := time.Since(c.base)
	c.mu.Lock()
	defer c.mu.Unlock()
	busy := c.busy[:0]
	for _, a := range c.busy {
		if a.held > 0 && now-a.moved >= creditStall {
			a.parked = !a.seen || now-a.settled >= creditLive
			if a.parked {
				a.admitted, a.next = a.held, now+parkedTrickle
			}
			c.forget(a)
			some = true
		}
		a.listed = a.held > 0
		if a.listed {
			busy = append(busy, a)
		}
	}
	clear(c.busy[len(busy):])
	c.busy = busy
	return some
}
