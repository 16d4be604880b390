package punch

import (
	"context"
	"fmt"
	"time"
)

// pingInterval is the time between two checks of one Ping.
const pingInterval = 200 * time.Millisecond

// Ping sends an authenticated check on a peer's selected path, again every 200
// ms, until one is answered or ctx ends. While there is no path it looks for one
// and waits. The RTT of the path it returns is this check's.
func (a *Agent) Ping(ctx context.Context, k Key) (Path, error) {
	answered := make(chan Path, 1)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var moved <-chan struct{}
	for {
		select {
		case path := <-answered:
			return path, nil
		case <-ctx.Done():
			return Path{}, fmt.Errorf("ping %x: %w", k[:4], ctx.Err())
		case <-moved:
		case <-timer.C:
		}
		a.Demand(k)
		var err error
		if moved, err = a.pingOnce(k, answered); err != nil {
			return Path{}, fmt.Errorf("ping %x: %w", k[:4], err)
		}
		timer.Reset(pingInterval)
	}
}

// pingOnce sends one check, and returns what is closed when a path changes.
func (a *Agent) pingOnce(k Key, answered chan<- Path) (<-chan struct{}, error) {
	a.mu.Lock()
	p := a.peers[k]
	if p == nil {
		a.mu.Unlock()
		return nil, errUnknownPeer
	}
	if p.selected != nil {
		a.sendCheck(p, p.selected, outgoing{now: time.Now(), from: p.selected.from(), ping: answered})
	}
	moved, sends := a.moved, a.take()
	a.mu.Unlock()
	a.perform(sends)
	return moved, nil
}
