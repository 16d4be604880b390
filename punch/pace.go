package punch

import "time"

const (
	// hush is how long after data ends the path is checked, once. A side that only
	// answers has nothing to send when its router gets another address, and would
	// not notice before the next consent check. Data that came steadily is missed
	// sooner: after hushGaps of the usual gap, but not before minHush.
	hush     = time.Second
	minHush  = 300 * time.Millisecond
	hushGaps = 4
)

// pace is how far apart data arrives. The zero value knows of none.
type pace struct {
	last time.Time
	gap  time.Duration // smoothed
}

// note takes an arrival. A pause counts as one of hush.
func (c *pace) note(now time.Time) {
	gap := min(now.Sub(c.last), hush)
	if c.last.IsZero() {
		gap = hush
	}
	if c.gap == 0 {
		c.gap = gap
	}
	c.gap += (gap - c.gap) / 4
	c.last = now
}

// hush is how long a silence goes unquestioned.
func (c *pace) hush() time.Duration { return min(max(hushGaps*c.gap, minHush), hush) }
