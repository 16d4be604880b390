package overlay

import (
	"fmt"
	"time"

	"overlay/punch"
)

// lookFor is how long a direct path is looked for before its absence means
// something.
const lookFor = 3 * time.Second

// hurdles are what stands between this node and a peer.
type hurdles struct {
	peer    string // its name
	online  bool
	reached bool  // there is a path, by a relay
	reach   reach // of this node to relays
	attempt punch.Attempt
	now     time.Time
}

// reason says in plain words why there is no direct path.
func (h hurdles) reason() string {
	looking := h.attempt.Calls == 0 || h.now.Sub(h.attempt.Since) < lookFor
	switch {
	case !h.online && !h.reached:
		return h.peer + " is not connected"
	case h.reach.noUDP() && !h.attempt.Mapped:
		return "this network passes no UDP"
	case h.reach.none() && !h.attempt.Mapped && !looking:
		return "nothing answers: no relay, and no server over UDP"
	case looking:
		return "still looking for a direct path"
	case h.reach.none():
		return "no relay is reached, and no direct path answers"
	case h.reach.noUDP():
		return "no relay answers over UDP: this network may pass none now"
	case !h.attempt.Public:
		return fmt.Sprintf("%s's network passes no UDP", h.peer)
	case !h.attempt.Answered:
		return h.peer + " has answered no call yet"
	}
	return "no answer on any direct path: a NAT or firewall on one side or both refuses"
}
