package overlay

import (
	"context"
	"time"

	"overlay/coord"
)

// loadCache takes in what was known last, so that nodes are verified with the
// server down. Everything in it is verified again.
func (h *relayHost) loadCache() {
	var c cache
	ok, err := h.store.load(netmapFile, &c)
	if err != nil {
		h.log.Warn("cached netmap not used", "err", err)
		return
	}
	if !ok {
		return
	}
	h.control.resumeSerial(c.Serial)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.roster.apply(&coord.Netmap{State: c.State, Revocations: c.Revocations, Nodes: c.Nodes}, false)
}

// tend writes the netmap down when it changed, and tells what was forwarded.
func (h *relayHost) tend(ctx context.Context) error {
	save, tell := time.NewTicker(cacheEvery), time.NewTicker(relayStatsEvery)
	defer save.Stop()
	defer tell.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-save.C:
			h.saveCache()
		case <-tell.C:
			h.log.Debug("relayed", "stats", h.server.Stats())
		}
	}
}

func (h *relayHost) saveCache() {
	serial := h.control.published()
	h.mu.Lock()
	if !h.dirty && serial == h.saved {
		h.mu.Unlock()
		return
	}
	h.dirty, h.saved = false, serial
	c := h.roster.snapshot()
	h.mu.Unlock()
	c.Serial = serial
	if err := h.store.save(netmapFile, &c); err != nil {
		h.log.Warn("netmap not cached", "err", err)
		h.mu.Lock()
		h.dirty = true // until there is space again
		h.mu.Unlock()
	}
}
