package tun

import (
	"encoding/binary"
	"sync/atomic"
	"time"
)

const (
	// askAfter is how many initiations may go unanswered before the other side
	// is asked to begin.
	askAfter = 3
	// askPause is how long it is left to the other side then, and two round
	// trips: initiations of ours would make it drop its own, see holds.
	askPause = 2 * holdTime
	// receiverAt is where a response has the index of the initiation it answers.
	receiverAt = 8
)

// leave counts an initiation that is about to be sent, and reports whether it
// should not be: the peer answers none, so it is asked to begin instead, and
// gets the time to. A node whose clock was set back cannot begin: WireGuard takes
// only initiations with a later time than it has seen (TAI64N). The question
// goes where checks of the path go, which are answered all the same; where they
// are not it is lost as the initiation would be.
func (b *bind) leave(p *peer) bool {
	if b.config.SessionUnknown == nil {
		return false
	}
	if b.asked(p) {
		return true
	}
	if p.tries.Add(1) <= askAfter {
		return false
	}
	p.tries.Store(0)
	p.asked.Store(b.now())
	b.config.SessionUnknown(p.key)
	return true
}

// asked reports whether it is the peer's turn to begin.
func (b *bind) asked(p *peer) bool { return b.left(&p.asked, askPause, p) > 0 }

// begins is how long a start is to be put off because the peer begins, as far as
// this side can tell: it was asked to, or its initiation was answered just now and
// nothing has come in the new session yet. Expiring keys then would spoil it.
func (b *bind) begins(p *peer) time.Duration {
	return max(b.left(&p.asked, askPause, p), b.left(&p.answered, startInterval, p))
}

// left is what is left of a time and two round trips since something happened.
func (b *bind) left(since *atomic.Int64, d time.Duration, p *peer) time.Duration {
	at := since.Load()
	if at == 0 {
		return 0
	}
	return max(0, d+time.Duration(2*p.trip.Load()-(b.now()-at)))
}

// answers notes that the peer answers initiations, or sends its own.
func (p *peer) answers() {
	p.tries.Store(0)
	p.asked.Store(0)
}

// response notes that an initiation of ours was answered. The index of that
// nobody can guess who did not see it.
func (b *bind) response(message []byte) {
	if len(message) != responseSize {
		return
	}
	if p := b.peers.byIndex(binary.LittleEndian.Uint32(message[receiverAt:])); p != nil {
		p.answers()
	}
}
