package overlay

import (
	"context"
	"log/slog"
	"time"

	"overlay/coord"
	"overlay/punch"
	"overlay/tun"
)

// Bounds of how often the cache is written and drops are told.
const (
	cacheEvery = 2 * time.Second
	dropsEvery = time.Minute
)

// loadCache brings up what was known last, so that tunnels come back with the
// server down. Everything in it is verified again.
func (s *session) loadCache() {
	c, ok := s.readCache()
	if !ok {
		return
	}
	s.mu.Lock()
	_, changed := s.roster.apply(&coord.Netmap{State: c.State, Revocations: c.Revocations, Nodes: c.Nodes}, false)
	if c.Relay.usable() {
		s.relay = c.Relay
	}
	s.mu.Unlock()
	if c.Relay.usable() {
		s.links.setOwn(c.Relay.info(s.control.verify))
	}
	for i := range changed {
		p := &changed[i]
		last, ok := c.Paths[tun.Key(p.Key).String()]
		if ok && len(p.Candidates) < punch.MaxCandidates {
			p.Candidates = append(p.Candidates, last)
		}
	}
	s.configure(nil, changed)
}

// readCache gives what an earlier run saved.
func (s *session) readCache() (c cache, ok bool) {
	ok, err := s.store.load(netmapFile, &c)
	if err != nil {
		s.log.Warn("cached netmap not used", "err", err)
		return cache{}, false
	}
	if ok {
		s.control.resumeSerial(c.Serial)
	}
	return c, ok
}

// tend writes the netmap down when it changed, hands round trips on, and logs
// what was dropped.
func (s *session) tend(ctx context.Context) error {
	save, tell := time.NewTicker(cacheEvery), time.NewTicker(dropsEvery)
	defer save.Stop()
	defer tell.Stop()
	var told tun.Drops
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-save.C:
			s.saveCache()
			s.endpoints.measure(s.agent)
		case <-tell.C:
			told = logDrops(s.log, told, s.dev.Load().Drops())
		}
	}
}

// logDrops tells what was dropped in all, when it is more than was told.
func logDrops(log *slog.Logger, told, now tun.Drops) tun.Drops {
	if now != told {
		log.Debug("received and dropped", "foreign", now.Foreign, "fragments", now.Fragments,
			"incomplete", now.Incomplete, "broken", now.Broken, "forged", now.Forged)
	}
	return now
}

func (s *session) saveCache() {
	serial := s.control.published()
	s.mu.Lock()
	if !s.dirty && serial == s.saved {
		s.mu.Unlock()
		return
	}
	s.dirty, s.saved = false, serial
	c := s.roster.snapshot()
	c.Serial, c.Relay = serial, s.relay
	c.Paths = map[string]punch.Candidate{}
	for _, m := range s.roster.members {
		k := punch.Key(m.cert.WireGuard)
		if p, ok := s.endpoints.path(k); ok && p.Type != punch.Relayed {
			c.Paths[tun.Key(k).String()] = punch.Candidate{Addr: p.Addr, Type: p.Type}
		}
	}
	s.mu.Unlock()
	if err := s.store.save(netmapFile, &c); err != nil {
		s.log.Warn("netmap not cached", "err", err)
		s.mu.Lock()
		s.dirty = true // until there is space again
		s.mu.Unlock()
	}
}
