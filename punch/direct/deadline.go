package direct

import (
	"sync"
	"time"
)

// deadline is a time that can be waited for and moved, as net.Conn wants it. The
// zero value never comes.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	moves int           // how often it was moved
	ended chan struct{} // closed when the time has come; nil: nobody waits
}

// set moves the deadline; zero: it never comes.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.moves++
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.ended == nil || closed(d.ended) {
		d.ended = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	if wait := time.Until(t); wait > 0 {
		moves := d.moves
		d.timer = time.AfterFunc(wait, func() { d.end(moves) })
	} else {
		close(d.ended)
	}
}

// end has the time come, unless the deadline was moved meanwhile.
func (d *deadline) end(moves int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if moves == d.moves {
		close(d.ended)
	}
}

// done is closed when the time has come.
func (d *deadline) done() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended == nil {
		d.ended = make(chan struct{})
	}
	return d.ended
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
