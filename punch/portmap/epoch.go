package portmap

import (
	"sync"
	"time"
)

// epoch judges the clocks that routers send along (RFC 6887 section 8.5, which
// is at least as strict as RFC 6886 section 3.6): one that does not go on as ours
// does has lost its mappings. The zero epoch has seen nothing.
type epoch struct {
	mu     sync.Mutex
	server uint32 // seconds, as last received
	at     time.Time
	reset  bool // the last mapping was made before the router started anew
}

// note takes what an answer says.
func (e *epoch) note(server uint32, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.at.IsZero() && !continues(e.server, server, now.Sub(e.at)) {
		e.reset = true
	}
	e.server, e.at = server, now
}

// mapped says that the router has just made or renewed the mapping.
func (e *epoch) mapped() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reset = false
}

// lost reports whether the router started anew since.
func (e *epoch) lost() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.reset
}

// continues reports whether a clock that showed before shows now, after the time
// that passed here: it may not go back, and may run slower or faster by a
// sixteenth and two seconds.
func continues(before, now uint32, passed time.Duration) bool {
	if int64(now)+1 < int64(before) {
		return false
	}
	client, server := int64(passed/time.Second), int64(now)-int64(before)
	return client+2 >= server-server/16 && server+2 >= client-client/16
}
