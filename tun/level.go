package tun

import (
	"sync"
	"sync/atomic"
	"time"
)

// Segments per message. What one datagram loses costs the whole message, so
// only a clean path carries large ones.
const (
	levelPlain = 1
	levelSome  = 4
	levelWhole = 64 // a super-packet of the kernel, whatever it has
)

// leveler chooses how many segments a message to one peer has, from the losses
// the peer reports. The zero value starts at levelSome. Safe for concurrent use.
type leveler struct {
	now atomic.Int32 // 0: levelSome

	mu sync.Mutex
}

// segments is the number of segments a message may have now.
func (l *leveler) segments() int {
	if n := l.now.Load(); n != 0 {
		return int(n)
	}
	return levelSome
}

// report takes the peer's counters of messages, both cumulative and modulo
// 2^32, and the time since the Bind was made.
func (l *leveler) report(received, missing uint32, now time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _, _ = received, missing, now
}

// reset begins anew, on another path.
func (l *leveler) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now.Store(0)
}
