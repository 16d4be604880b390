package punch

import (
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

const (
	// samplesWanted is how many mappings classify a NAT; sampleServers is how many
	// servers make them, at most.
	samplesWanted = 16
	sampleServers = 4
	sampleGap     = 10 * time.Millisecond // between two of them
	// A lost request is repeated; what is missing after jobTime stays away.
	sampleRepeat = 150 * time.Millisecond
	sampleTries  = 3
	jobTime      = 800 * time.Millisecond
	baseTime     = 400 * time.Millisecond
	// sampleAgain is how soon sampling that failed is repeated.
	sampleAgain = 10 * time.Second
	baseAsks    = 2
)

// job is a series of requests that make mappings in our NAT.
type job struct {
	asks  []*ask
	base  bool // for the port that a sequential NAT gives out now
	fresh bool // for the mapping of a fresh socket: one answer is enough
	began time.Time
	next  time.Time // zero: there is none
}

// ask is the request of one socket to one server.
type ask struct {
	id     transactionID
	local  uint16
	server Server
	first  time.Time // when it left; zero: not yet
	next   time.Time
	tries  int
	mapped netip.AddrPort
}

// sample begins to sample our NAT where servers see different ports, unless it is
// known or was sampled in vain lately.
func (a *Agent) sample(now time.Time) {
	h := &a.hard
	_, differ := a.seen4()
	if !differ || h.nat.Mapping != 0 || !h.job.next.IsZero() || now.Before(h.again) {
		return
	}
	servers := a.sampleServers()
	count := (samplesWanted + len(servers) - 1) / len(servers)
	ports, ok := a.sockets(count, now)
	if !ok {
		return
	}
	h.job = job{began: now, next: now}
	for _, port := range ports {
		for _, s := range servers {
			h.job.add(port, s, now)
		}
	}
	h.again = now.Add(sampleAgain)
}

// sampleBase begins to ask for the port that our NAT gives out now. The socket
// is one that asked no server yet.
func (a *Agent) sampleBase(port uint16, now time.Time) {
	h := &a.hard
	servers := a.sampleServers()
	h.job = job{base: true, began: now, next: now}
	for _, s := range servers[:min(len(servers), baseAsks)] {
		h.job.add(port, s, now)
	}
	for _, ask := range h.job.asks {
		ask.next = now
	}
}

func (j *job) add(port uint16, s Server, now time.Time) {
	at := now.Add(time.Duration(len(j.asks)) * sampleGap)
	j.asks = append(j.asks, &ask{id: stun.NewTransactionID(), local: port, server: s, next: at})
}

func (a *Agent) sampleServers() []Server {
	var list []Server
	for _, s := range a.servers {
		if s.fresh && s.mapped.Addr().Is4() && len(list) < sampleServers {
			list = append(list, s.Server)
		}
	}
	return list
}

func (j *job) find(id transactionID) *ask {
	i := slices.IndexFunc(j.asks, func(k *ask) bool { return k.id == id })
	if i < 0 || j.asks[i].tries == 0 {
		return nil
	}
	return j.asks[i]
}

// sampled takes the answer of a server to a spare socket.
func (a *Agent) sampled(k *ask, m *stun.Message, from, at netip.AddrPort) {
	if from != k.server.Addr || at.Port() != k.local || k.mapped.IsValid() {
		return
	}
	if len(k.server.Username) > 0 && stun.MessageIntegrity(k.server.Key).Check(m) != nil {
		return
	}
	mapped, err := mappedOf(m)
	if err != nil || !mapped.Addr().Is4() {
		return
	}
	k.mapped = mapped
	if j := &a.hard.job; j.enough() {
		j.next = k.first // now
		a.notify()
	}
}

// enough reports whether no further answer is awaited.
func (j *job) enough() bool {
	answered := func(k *ask) bool { return k.mapped.IsValid() }
	if j.fresh {
		return slices.ContainsFunc(j.asks, answered)
	}
	return !slices.ContainsFunc(j.asks, func(k *ask) bool { return !answered(k) })
}

// runJob sends the requests that are due, and ends the job.
func (a *Agent) runJob(now time.Time) {
	j := &a.hard.job
	if j.next.IsZero() || now.Before(j.next) {
		return
	}
	limit := jobTime
	if j.base || j.fresh {
		limit = baseTime
	}
	end := j.began.Add(limit)
	if j.enough() || !now.Before(end) {
		a.endJob(now)
		return
	}
	next := end
	for _, k := range j.asks {
		if k.mapped.IsValid() {
			continue
		}
		if !now.Before(k.next) && k.tries < sampleTries {
			a.ask(k, now)
		}
		if k.tries < sampleTries {
			next = earliest(next, k.next)
		}
	}
	j.next = next
}

func (a *Agent) ask(k *ask, now time.Time) {
	b, err := k.server.marshal(k.id)
	if err != nil {
		a.log.Error("request not built", "err", err)
		return
	}
	if k.tries == 0 {
		k.first = now
	}
	k.tries++
	k.next = now.Add(sampleRepeat)
	a.sends = append(a.sends, datagram{b: b, to: k.server.Addr, from: socket(k.local)})
}

// endJob uses the answers.
func (a *Agent) endJob(now time.Time) {
	h := &a.hard
	done := h.job
	h.job = job{}
	var samples []Sample
	for _, k := range done.asks {
		if k.mapped.IsValid() {
			samples = append(samples, Sample{Local: k.local, Server: k.server.Addr, Mapped: k.mapped, At: k.first})
		}
	}
	if done.base {
		a.based(samples, now)
		a.wakeHard(now)
		return
	}
	if done.fresh {
		a.freshSampled(samples, now)
		return
	}
	n := Classify(samples)
	a.log.Debug("nat sampled", "samples", len(samples), "mapping", n.Mapping, "allocation", n.Allocation, "step", n.Step, "low", n.Low, "high", n.High)
	if len(samples) < leastBlock {
		h.sweepAt = now // their mappings are not new any more
		a.wakeHard(now)
		return
	}
	h.nat, h.churn = n, churn(samples, n)
	a.wakeHard(now)
}

// sockets returns so many spare sockets, which no path uses. When there are not
// enough, it has more opened, and Run looks again.
func (a *Agent) sockets(count int, now time.Time) ([]uint16, bool) {
	h := &a.hard
	used := a.socketsInUse(now)
	free := slices.DeleteFunc(slices.Clone(h.open), func(port uint16) bool { return used[port] })
	count = max(0, min(count, maxSockets-len(used)))
	if len(free) >= count {
		h.sweepAt = now.Add(sweepGap)
		return free[:count], true
	}
	if h.opening || now.Sub(h.refused) < sampleAgain {
		return nil, false
	}
	h.opening = true
	missing := count - len(free)
	a.effects = append(a.effects, func() { a.openSockets(missing) })
	return nil, false
}

// openSockets is called without the lock.
func (a *Agent) openSockets(count int) {
	ports, err := a.cfg.OpenSockets(count)
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	h := &a.hard
	h.opening = false
	if err != nil || len(ports) == 0 {
		a.log.Debug("spare sockets not opened", "count", count, "err", err)
		h.refused = now
		return
	}
	h.open = append(h.open, ports...)
	h.sweepAt = now.Add(sweepGap)
	a.wakeHard(now)
	if r := h.round; r != nil && r.stage == preparing {
		r.next = now
	}
	a.notify()
}

// socketsInUse are those that a path leads through, or may soon: the peer was
// heard there.
func (a *Agent) socketsInUse(now time.Time) map[uint16]bool {
	used := map[uint16]bool{}
	if f := a.hard.fresh; f.port != 0 && now.Sub(f.since) < freshFor {
		used[f.port] = true
	}
	for _, p := range a.peers {
		for _, q := range p.pairs {
			alive := q.valid || q == p.selected || q == p.copying.to || now.Sub(q.heard) < remember || now.Before(q.clear)
			if port := q.local.Port(); port != 0 && alive {
				used[port] = true
			}
		}
	}
	return used
}

// sweep closes the sockets that nobody uses.
func (a *Agent) sweep(now time.Time) {
	h := &a.hard
	if h.sweepAt.IsZero() || now.Before(h.sweepAt) {
		return
	}
	if h.sweepAt = now.Add(sweepGap); h.round != nil || !h.job.next.IsZero() {
		return
	}
	used := a.socketsInUse(now)
	var idle []uint16
	h.open = slices.DeleteFunc(h.open, func(port uint16) bool {
		if !used[port] {
			idle = append(idle, port)
		}
		return !used[port]
	})
	if len(h.open) == 0 {
		h.sweepAt = time.Time{}
	}
	if len(idle) > 0 && a.cfg.CloseSockets != nil {
		a.effects = append(a.effects, func() { a.cfg.CloseSockets(idle) })
	}
}
