package tun

import (
	"math"
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

// Evidence that moves the level.
const (
	evidenceMessages = 20_000                 // of one window,
	evidenceTime     = 2 * time.Second        // or its length, when
	evidenceFew      = 2000                   // there are so many messages, or
	evidenceLongest  = 5 * time.Second        // its length when there are not
	evidenceLosses   = 2                      // fewer in one window prove nothing,
	evidencePlain    = 4                      // or not that messages must be plain
	deviations       = 3                      // beyond what chance makes of a share
	cleanMessages    = 200                    // fewer do not prove a path clean
	lossyShare       = 200                    // one missing of so many: plain messages
	cleanShare       = 2000                   // one missing of so many or more: clean
	someShare        = lossyShare * levelSome // the same of plain messages, before levelSome

	// reportLimit is more messages than arrive between two reports: the peer
	// counts from another beginning.
	reportLimit = 1 << 24

	// levelQuiet is how long reports may be about messages of the old size:
	// the round trip, and what the peer waits for late ones (meter.due).
	levelQuiet = 500 * time.Millisecond

	firstPatience = 400 * time.Millisecond // of clean evidence before a rise, until the first fall
	leastPatience = 10 * time.Second
	mostPatience  = 5 * time.Minute
)

// leveler chooses how many segments a message to one peer has, from the losses
// the peer reports. The zero value starts at levelPlain, so that TCP's slow start
// is not spoiled on a bad path, and soon rises on a good one. Safe for concurrent
// use.
type leveler struct {
	now atomic.Int32 // 0: levelPlain

	mu sync.Mutex
	track
}

// track is what a leveler knows about its path.
type track struct {
	last  evidence // the peer's totals
	begun bool     // last is set
	quiet bool     // reports do not count until levelQuiet after moved
	stale bool     // the next report begins to be quiet: the path is new
	rose  bool     // the last move was a rise
	moved time.Duration

	window   evidence      // the latest
	clean    evidence      // since the path may be clean
	patience time.Duration // with clean evidence before a rise; 0: firstPatience
}

// evidence is a count of messages since a moment.
type evidence struct {
	received, missing uint32
	since             time.Duration
}

func (e *evidence) add(received, missing uint32) {
	e.received += received
	e.missing += missing
}

func (e *evidence) messages() uint64 { return uint64(e.received) + uint64(e.missing) }

// exceeds reports whether more than one of so many messages is missing.
func (e *evidence) exceeds(share uint64) bool { return uint64(e.missing)*share > e.messages() }

// proves reports whether more than one of so many messages is missing, and
// that not by chance.
func (e *evidence) proves(share uint64) bool {
	mean := float64(e.messages()) / float64(share)
	return e.missing >= evidencePlain && float64(e.missing) > mean+deviations*math.Sqrt(mean)
}

// segments is the number of segments a message may have now.
func (l *leveler) segments() int {
	if n := l.now.Load(); n != 0 {
		return int(n)
	}
	return levelPlain
}

// report takes the peer's counters of messages, both cumulative and modulo
// 2^32, and the time since the Bind was made.
func (l *leveler) report(received, missing uint32, now time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := &l.track
	if t.stale {
		t.stale, t.quiet, t.moved = false, true, now
	}
	if t.quiet && now-t.moved < levelQuiet {
		return
	}
	t.quiet = false
	newly, lost := received-t.last.received, missing-t.last.missing
	t.last = evidence{received: received, missing: missing}
	if !t.begun || newly > reportLimit || lost > reportLimit {
		t.begun = true
		t.window, t.clean = evidence{since: now}, evidence{since: now}
		return
	}
	t.window.add(newly, lost)
	t.clean.add(newly, lost)
	l.judge(now)
}

// judge moves the level when the evidence is enough. Call with mu held.
func (l *leveler) judge(now time.Duration) {
	t := &l.track
	if l.segments() == levelWhole && now-t.moved >= mostPatience {
		t.patience = min(t.patience, leastPatience)
	}
	if w, to := t.window, l.bears(); w.messages() >= evidenceMessages || now-w.since >= evidenceLongest ||
		now-w.since >= evidenceTime && (w.messages() >= evidenceFew || to < l.segments()) ||
		to == levelPlain && to < l.segments() { // proven: no time to lose
		t.window = evidence{since: now}
		if l.dirty(&w) {
			t.clean = evidence{since: now}
		}
		if to < l.segments() {
			l.fall(to, now)
			return
		}
	}
	need := t.patience
	if need == 0 {
		need = firstPatience
	}
	if now-t.clean.since < need || t.clean.messages() < cleanMessages {
		return
	}
	clean := !t.clean.exceeds(l.riseShare())
	t.clean = evidence{since: now}
	if clean {
		l.rise(now)
	}
}

// bears is the level that the losses of the window allow: the one it is, or a
// lower one. Call with mu held.
func (l *leveler) bears() int {
	w := &l.track.window
	switch {
	case w.proves(lossyShare):
		return levelPlain
	case w.missing >= evidenceLosses && w.exceeds(cleanShare):
		return min(l.segments(), levelSome)
	}
	return l.segments()
}

// riseShare is the share of missing messages up to which they may become
// larger. A message of levelSome is lost with any of its segments: of plain
// ones so many fewer may be missing.
func (l *leveler) riseShare() uint64 {
	if l.segments() == levelPlain {
		return someShare
	}
	return cleanShare
}

// dirty reports whether a window ends what was a clean time.
func (l *leveler) dirty(w *evidence) bool {
	if l.segments() == levelPlain {
		return w.proves(someShare)
	}
	return w.missing >= evidenceLosses && w.exceeds(cleanShare)
}

// fall goes to a lower level, and makes the next rise wait longer when the last
// one was a mistake.
func (l *leveler) fall(to int, now time.Duration) {
	t := &l.track
	switch {
	case t.patience == 0:
		t.patience = leastPatience
	case t.rose && now-t.moved < leastPatience:
		t.patience = min(2*t.patience, mostPatience)
	}
	t.rose = false
	l.move(to, now)
}

func (l *leveler) rise(now time.Duration) {
	to := levelWhole
	switch l.segments() {
	case levelWhole:
		return
	case levelPlain:
		to = levelSome
	}
	l.track.rose = true
	l.move(to, now)
}

func (l *leveler) move(to int, now time.Duration) {
	l.now.Store(int32(to))
	l.track.moved, l.track.quiet, l.track.begun = now, true, false
}

// reset begins anew, on another path.
func (l *leveler) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now.Store(0)
	l.track = track{stale: l.track.begun || l.track.quiet || l.track.stale}
}
