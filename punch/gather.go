package punch

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

const (
	// MaxServers is how many STUN servers are asked; further ones are ignored.
	MaxServers = 16

	// Requests are repeated after 100, 200, 400, 800 and 1600 ms.
	gatherGap      = 100 * time.Millisecond
	gatherRequests = 6
	// promptRequests is after how many of them an answer is not waited for any more
	// where the other servers' are enough.
	promptRequests = 3
	// Mappings are refreshed after 20 to 26 s while there is traffic, else after
	// 60 to 75 s; a call refreshes those older than staleAfter.
	activeRefresh = 20 * time.Second
	activeSpread  = 6 * time.Second
	idleRefresh   = 60 * time.Second
	idleSpread    = 15 * time.Second
	staleAfter    = 25 * time.Second
	doubtAfter    = time.Second // or since the last receipt, when a path fails

	// tellDelay collects changes of the own candidates that come together.
	tellDelay = 20 * time.Millisecond

	maxReflexive = 4
	maxHosts     = MaxCandidates - maxReflexive - maxMapped
)

// server is a STUN server and what it said.
type server struct {
	Server
	id     transactionID
	asked  int       // requests of this round that left
	next   time.Time // next request; zero: the round is over
	mapped netip.AddrPort
	token  []byte
	fresh  bool      // answered since the network changed
	at     time.Time // of the last answer
	limit  bucket
}

// asking reports whether an answer may still come.
func (s *server) asking() bool { return !s.next.IsZero() }

// refresher decides when mappings are asked for again.
type refresher struct {
	began time.Time // last round; zero: none
	share float64   // drawn once per round
}

func (r refresher) next(active bool) time.Time {
	if r.began.IsZero() {
		return time.Time{}
	}
	least, spread := idleRefresh, idleSpread
	if active {
		least, spread = activeRefresh, activeSpread
	}
	return r.began.Add(least + time.Duration(r.share*float64(spread)))
}

// SetServers replaces the STUN servers and asks them at once. New servers mean
// that signals pass again, so peers without a living path are called without
// regard to back-off: an earlier call may have been lost with the connection.
func (a *Agent) SetServers(list []Server) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	old := a.servers
	a.servers = nil
	for _, info := range list[:min(len(list), MaxServers)] {
		s := &server{Server: info}
		s.Addr = plain(s.Addr)
		for _, known := range old {
			if known.Addr != s.Addr {
				continue
			}
			s.mapped, s.fresh, s.at, s.limit = known.mapped, known.fresh, known.at, known.limit
			if bytes.Equal(known.Username, s.Username) {
				s.token = known.token // another session's proves nothing in this one
			} else if len(known.token) > 0 {
				a.told = nil // who publishes now does so without, and has to hear of the next
			}
		}
		a.servers = append(a.servers, s)
	}
	for _, s := range old {
		delete(a.sent, s.id)
	}
	a.startGather(now)
	a.refresh(now)
	a.callLost(now)
	a.notify()
}

// callLost calls the wanted peers that have no living direct path.
func (a *Agent) callLost(now time.Time) {
	for _, p := range a.peers {
		if p.direct() == nil && p.wanted(now) {
			p.wantCall = true
			a.queue.set(p, now)
		}
	}
}

func (a *Agent) startGather(now time.Time) {
	a.refreshes = refresher{}
	if len(a.servers) == 0 {
		return
	}
	a.refreshes = refresher{began: now, share: rand.Float64()}
	for _, s := range a.servers {
		delete(a.sent, s.id)
		s.id = stun.NewTransactionID()
		s.asked, s.next = 0, now
		a.sent[s.id] = transaction{server: s, at: now}
	}
}

// freshen asks the servers again unless they were asked lately.
func (a *Agent) freshen(now time.Time, age time.Duration) {
	if len(a.servers) > 0 && now.Sub(a.refreshes.began) >= age {
		a.startGather(now)
		a.gather(now)
	}
}

// gather sends the requests that are due.
func (a *Agent) gather(now time.Time) {
	if at := a.gatherAgain(now); !at.IsZero() && !now.Before(at) {
		a.startGather(now)
	}
	lost := false
	for _, s := range a.servers {
		if s.next.IsZero() || s.next.After(now) {
			continue
		}
		if s.asked == gatherRequests {
			s.next = time.Time{}
			delete(a.sent, s.id)
			if !s.fresh {
				s.mapped, s.token = netip.AddrPort{}, nil
				lost = true
			}
			continue
		}
		if !s.limit.take(now, pairRate) {
			s.next = now.Add(s.limit.wait(pairRate))
			continue
		}
		b, err := s.marshal(s.id)
		if err != nil {
			a.log.Error("request not built", "err", err)
			s.next = time.Time{}
			continue
		}
		a.sends = append(a.sends, datagram{b: b, to: s.Addr})
		s.next = now.Add(gatherGap << s.asked)
		s.asked++
	}
	if lost {
		a.refresh(now)
	}
}

func (a *Agent) gatherAgain(now time.Time) time.Time {
	return a.refreshes.next(now.Before(a.activeUntil))
}

func (a *Agent) gatherNext(now time.Time) time.Time {
	next := a.gatherAgain(now)
	for _, s := range a.servers {
		next = earliest(next, s.next)
	}
	return next
}

// mapping takes the answer of a server.
func (a *Agent) mapping(s *server, m *stun.Message, now time.Time) {
	if len(s.Username) > 0 && stun.MessageIntegrity(s.Key).Check(m) != nil {
		return
	}
	mapped, err := mappedOf(m)
	if err != nil {
		return
	}
	delete(a.sent, s.id)
	s.next = time.Time{}
	if s.fresh && s.mapped.IsValid() && s.mapped != mapped && now.Before(a.activeUntil) {
		a.confirmed()
		a.remap(now)
	}
	s.fresh, s.at = true, now
	s.mapped, s.token = mapped, nil
	if token, err := m.Get(AttrToken); err == nil {
		s.token = slices.Clone(token)
	}
	a.log.Debug("mapping", "server", s.Addr, "mapped", mapped)
	a.refresh(now)
	for _, p := range a.peers {
		if now.Before(p.holdUntil) {
			a.release(p, now)
			a.queue.set(p, now)
		}
	}
}

// refresh lists the own candidates anew. A new one is an event for every peer
// without a path.
func (a *Agent) refresh(now time.Time) {
	old := a.own
	a.own = a.collect()
	if sameCandidates(a.own, a.told) {
		a.tellAt = time.Time{}
	} else if first := reflexive(a.own) && !reflexive(a.told); first || a.tellAt.IsZero() {
		a.tellAt = now
		if !first {
			a.tellAt = now.Add(tellDelay)
		}
	}
	added := slices.ContainsFunc(a.own, func(c Candidate) bool {
		return !slices.ContainsFunc(old, func(o Candidate) bool { return o.Addr == c.Addr })
	})
	if added {
		a.callLost(now)
	}
	a.notify()
}

// collect returns all own candidates, at most MaxCandidates.
func (a *Agent) collect() []Candidate {
	var hosts, seen []Candidate
	for _, s := range a.servers {
		known := slices.IndexFunc(seen, func(c Candidate) bool { return c.Addr == s.mapped })
		switch {
		case known >= 0 && len(seen[known].Token) == 0:
			seen[known].Token = s.token
		case known < 0 && a.probeable(s.mapped) && len(seen) < maxReflexive:
			seen = append(seen, Candidate{Addr: s.mapped, Type: ServerReflexive, Token: s.token})
		}
	}
	for _, prefix := range a.local {
		addr := netip.AddrPortFrom(prefix.Addr(), a.port)
		known := slices.ContainsFunc(seen, func(c Candidate) bool { return c.Addr == addr })
		if !known && a.probeable(addr) {
			hosts = append(hosts, Candidate{Addr: addr, Type: Host})
		}
	}
	slices.SortStableFunc(hosts, func(x, y Candidate) int { return preference(x.Addr) - preference(y.Addr) })
	hosts = hosts[:min(len(hosts), maxHosts)]
	return slices.Concat(hosts, seen, a.mappedBeside(hosts))
}

// preference orders host addresses by how often they lead somewhere.
func preference(addr netip.AddrPort) int {
	ip := addr.Addr()
	switch {
	case !Private(ip):
		return 0
	case ip.Is4():
		return 1
	}
	return 2
}

func reflexive(list []Candidate) bool {
	return slices.ContainsFunc(list, func(c Candidate) bool { return c.Type == ServerReflexive })
}

// sameCandidates compares addresses, and whether they are proven; a token that
// takes the place of another is no news.
func sameCandidates(x, y []Candidate) bool {
	return slices.EqualFunc(x, y, func(x, y Candidate) bool {
		return x.Addr == y.Addr && x.Type == y.Type && (len(x.Token) == 0) == (len(y.Token) == 0)
	})
}

// tell publishes the own candidates when they changed.
func (a *Agent) tell(now time.Time) {
	if a.tellAt.IsZero() || now.Before(a.tellAt) {
		return
	}
	a.tellAt = time.Time{}
	a.told = a.own
	if a.cfg.OnCandidates != nil {
		list := slices.Clone(a.own)
		a.effects = append(a.effects, func() { a.cfg.OnCandidates(list) })
	}
}

// Candidates returns the own candidates, with the newest tokens.
func (a *Agent) Candidates() []Candidate {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.own)
}
