package tun

import (
	"math/bits"
	"sync"
	"time"
)

// Bounds of counting losses. A counter is not authenticated: whatever it says,
// it moves a window at most.
const (
	meterSessions = 4       // sessions of a peer that are watched, the newest
	meterWindow   = 1024    // counters that may still come
	meterLate     = 3       // a counter that comes behind more later ones counts as missing
	meterJump     = 1 << 16 // a counter so far ahead is no gap but another place

	// counterLimit is where wireguard-go gives a session up.
	counterLimit = 1<<64 - 1<<13 - 1

	reportInterval = 200 * time.Millisecond
	// reportLeast is how many messages are worth a report when nothing is
	// missing. Above 1, or two idle peers would answer each other's reports for
	// ever.
	reportLeast = 16
	// meterMute is how many intervals losses say nothing about the path after
	// this host's own sockets were full: the one it was seen in, and the next.
	meterMute = 2
)

// meter counts the messages of one peer that arrived and those that did not,
// by the counters in their headers: one is missing when it has not come by the
// time meterWindow later ones, or those of two report intervals, have. One that
// comes late counts as missing, too: a network that changes the order of
// datagrams delays nearly all large messages, and TCP takes that for loss. The
// zero value is ready. Safe for concurrent use.
type meter struct {
	mu                sync.Mutex
	received, missing uint32
	sessions          [meterSessions]window
	next              int    // session to be replaced
	overflow          uint32 // as last noted
	mute              int    // intervals left in which nothing counts
	ticked            time.Duration
	told              [2]uint32 // totals when due was last true
}

// window is one session's place in its counters.
type window struct {
	index  uint32
	used   bool
	base   uint64 // the lowest counter that may still come
	end    uint64 // after the highest that came; 0: none yet
	mark   uint64 // end at the last tick
	behind int    // counters below base, in a row
	seen   [meterWindow / 64]uint64
}

// note takes the counters of messages of one session, as they arrived, and how
// many datagrams the own sockets ever dropped because they were full.
func (m *meter) note(index uint32, counters []uint64, overflow uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if overflow != m.overflow {
		m.overflow, m.mute = overflow, meterMute
		for i := range m.sessions {
			m.sessions[i].restart()
		}
	}
	if m.mute > 0 {
		return
	}
	w := m.session(index)
	for _, c := range counters {
		received, missing := w.take(c)
		m.received += received
		m.missing += missing
	}
}

// session finds the window of an index or replaces the oldest by a new one.
// Call with mu held.
func (m *meter) session(index uint32) *window {
	for i := range m.sessions {
		if w := &m.sessions[i]; w.used && w.index == index {
			return w
		}
	}
	w := &m.sessions[m.next]
	m.next = (m.next + 1) % meterSessions
	*w = window{index: index, used: true}
	return w
}

// due reports whether the peer should be told, and that it is being told.
func (m *meter) due(now time.Duration) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now-m.ticked < reportInterval {
		return false
	}
	m.ticked = now
	m.mute = max(0, m.mute-1)
	for i := range m.sessions {
		m.missing += m.sessions[i].tick()
	}
	fresh := m.received - m.told[0]
	if fresh == 0 || fresh < reportLeast && m.missing == m.told[1] {
		return false
	}
	m.told = [2]uint32{m.received, m.missing}
	return true
}

// totals are cumulative, modulo 2^32.
func (m *meter) totals() (received, missing uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.received, m.missing
}

// take moves the window to a counter that came.
func (w *window) take(c uint64) (received, missing uint32) {
	switch {
	case c > counterLimit:
		return 0, 0
	case w.end == 0:
		w.begin(c)
	case c < w.base:
		// One forged counter far ahead must not make the meter deaf.
		if w.behind++; w.behind < meterWindow {
			return 0, 0
		}
		w.begin(c)
	case c >= w.end && c-w.end >= meterJump:
		w.begin(c)
	case c-w.base >= meterWindow:
		missing = w.retire(c - meterWindow + 1)
	}
	w.behind = 0
	late := c+meterLate+1 < w.end
	w.end = max(w.end, c+1)
	word, bit := &w.seen[c/64%uint64(len(w.seen))], uint64(1)<<(c%64)
	if *word&bit != 0 {
		return 0, missing
	}
	*word |= bit
	if late {
		return 0, missing + 1
	}
	return 1, missing
}

// begin puts the window at c, and what was in it is forgotten.
func (w *window) begin(c uint64) {
	*w = window{index: w.index, used: true, base: c, end: c + 1}
}

// restart forgets where the window is, but not whose it is.
func (w *window) restart() { *w = window{index: w.index, used: w.used} }

// tick gives up the counters before those of the last interval.
func (w *window) tick() (missing uint32) {
	if w.mark > w.base {
		missing = w.retire(w.mark)
	}
	w.mark = w.end
	return missing
}

// retire moves the base up and returns how many of the counters below did not
// come.
func (w *window) retire(base uint64) (missing uint32) {
	n := base - w.base
	came := 0
	if n >= meterWindow {
		for i, word := range w.seen {
			came += bits.OnesCount64(word)
			w.seen[i] = 0
		}
		w.base = base
		return uint32(n) - uint32(came)
	}
	for w.base < base {
		size := min(base-w.base, 64-w.base%64)
		mask := (^uint64(0) >> (64 - size)) << (w.base % 64)
		word := &w.seen[w.base/64%uint64(len(w.seen))]
		came += bits.OnesCount64(*word & mask)
		*word &^= mask
		w.base += size
	}
	return uint32(n) - uint32(came)
}
