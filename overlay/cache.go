package overlay

import (
	"context"
	"time"

	"overlay/coord"
	"overlay/punch"
	"overlay/tun"
)

// cacheEvery bounds how often the cache is written.
const cacheEvery = 2 * time.Second

// loadCache brings up what was known last, so that tunnels come back with the
// server down. Everything in it is verified again.
func (s *session) loadCache() {
	c, ok := s.readCache()
	if !ok {
		return
	}
	s.mu.Lock()
	_, changed := s.roster.apply(&coord.Netmap{State: c.State, Revocations: c.Revocations, Nodes: c.Nodes}, false)
	list := s.roster.peers(s.own)
	s.mu.Unlock()
	for i := range changed {
		p := &changed[i]
		last, ok := c.Paths[tun.Key(p.Key).String()]
		if ok && len(p.Candidates) < punch.MaxCandidates {
			p.Candidates = append(p.Candidates, last)
		}
	}
	s.configure(list, nil, changed)
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

// keepCache writes the netmap down when it changed.
func (s *session) keepCache(ctx context.Context) error {
	t := time.NewTicker(cacheEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			s.saveCache()
		}
	}
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
	c.Serial = serial
	c.Paths = map[string]punch.Candidate{}
	for _, m := range s.roster.members {
		k := punch.Key(m.cert.WireGuard)
		if p, ok := s.endpoints.path(k); ok {
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
