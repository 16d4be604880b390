package portmap

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// raceWindow is how long a better protocol may take to answer while a worse
	// one has answered.
	raceWindow = 300 * time.Millisecond
	// findTimeout ends the search for all of them.
	findTimeout = 3 * time.Second
)

// race looks for all protocols at once, and gives them out, the best first.
type race struct {
	open   []protocol // not found, and not given up
	found  []protocol // and not given out
	order  []protocol
	closes time.Time // end of the window
	ends   chan outcome
	failed failures
}

type outcome struct {
	protocol protocol
	err      error
}

// startRace starts the search; stop ends it, and may be called more than once.
func startRace(ctx context.Context, order []protocol) (r *race, stop func()) {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	r = &race{
		open: slices.Clone(order), order: order, closes: time.Now().Add(raceWindow),
		ends: make(chan outcome, len(order)), failed: failures{},
	}
	var searches sync.WaitGroup
	for _, p := range order {
		searches.Go(func() { r.ends <- outcome{p, p.find(ctx)} })
	}
	return r, func() {
		cancel()
		searches.Wait()
	}
}

// next returns the best protocol that was found, waiting within the window for
// better ones; nil: there is no other.
func (r *race) next(ctx context.Context) protocol {
	window := time.NewTimer(time.Until(r.closes))
	defer window.Stop()
	for {
		if p := r.best(time.Now()); p != nil || len(r.open) == 0 && len(r.found) == 0 {
			return p
		}
		select {
		case <-ctx.Done():
			return nil
		case <-window.C:
		case o := <-r.ends:
			r.open = slices.DeleteFunc(r.open, func(p protocol) bool { return p == o.protocol })
			if o.err == nil {
				r.found = append(r.found, o.protocol)
			} else {
				r.failed[o.protocol.name()] = o.err
			}
		}
	}
}

// best takes the best one found unless a better one may still answer in time.
func (r *race) best(now time.Time) protocol {
	for _, p := range r.order {
		switch i := slices.Index(r.found, p); {
		case i >= 0:
			r.found = slices.Delete(r.found, i, i+1)
			return p
		case slices.Contains(r.open, p) && now.Before(r.closes):
			return nil
		}
	}
	return nil
}
