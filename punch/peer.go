package punch

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"
)

// source says who named a candidate.
type source uint8

const (
	published source = 1 << iota // the netmap
	signalled                    // the peer, in a signal
	learnt                       // an authenticated check came from there
	relay                        // SetRelays; such a pair has no other source
	announced                    // the peer, or who says so, by multicast in our LAN
)

// maxOutstanding is how many checks on one pair may wait for their answers.
const maxOutstanding = 16

// pair is one candidate of a peer, checked from one of our sockets.
type pair struct {
	addr   netip.AddrPort
	typ    CandidateType
	source source
	tried  bool // was part of a round

	attempt int       // checks of this round that left
	next    time.Time // next check of this round; zero: none
	held    bool      // next waits for the peer's NAT
	clear   time.Time // until then the peer's NAT is open for it, as it said itself
	asked   bool      // the peer called: all checks of the round are wanted
	sent    time.Time // last packet since the network changed
	opened  time.Time // last packet
	waiting []transactionID

	local    netip.AddrPort // ours: the socket, and where the answer arrived; zero: any
	valid    bool           // answered an authenticated check
	suspect  bool           // did not answer lately
	answered time.Time      // last answer
	heard    time.Time      // last authenticated message from there
	since    time.Time      // when it was first heard
	rtt      time.Duration
	varied   time.Duration // mean deviation of the RTT
	samples  int
	better   int // samples in a row that beat the selected pair
	tally    tally
	quality  quality
	reach    reach

	seenAs   netip.AddrPort // ours, as the peer saw it in the last answer
	seenTime time.Time      // when that was

	// Of relayed pairs only.
	here    bool // the peer was seen at the relay
	extra   time.Duration
	late    time.Time // when an answer is overdue; zero: none is awaited
	doubted time.Time // when that was reported last
}

// peer is what the agent knows of a peer.
type peer struct {
	key       Key
	secrets   *secrets
	name      user    // ours, in checks to it
	users     [2]user // its, in checks to us
	published Nonce
	online    bool
	pairs     []*pair // at most MaxCandidates, and MaxRelays relayed ones
	limits    buckets[netip.AddrPort]
	newcomers newcomers
	strangers newcomers // packets to addresses that are scarce
	checks    replay
	signals   replay
	counter   uint64 // of our checks and signals to it
	talked    Signals
	refused   []Refusal // at most MaxCandidates
	message   []byte    // that the signal under way carries; see SendMessage

	due   time.Time // position in the queue
	index int       // -1: not in it

	// Wishes of the outside world, granted in step.
	wantCall   bool
	wantAnswer bool // the peer called
	wantOpen   bool // it has new candidates
	wantProbe  bool

	// The call: openers, signals, rounds of checks.
	series    time.Time // when the calls without a pause began
	called    time.Time // last call
	calls     int
	openTo    []netip.AddrPort // where the peer's NAT is open to, as last signalled
	openAt    time.Time        // when that was
	released  [2]bool          // by an authenticated check, per family
	holdUntil time.Time        // full TTL towards unverified public pairs before: no
	retryAt   time.Time
	recall    recall
	backoff   time.Duration
	talk      bucket // signals

	// The path in use.
	selected     *pair
	history      history
	copying      copying
	probe        probe
	suspectSince time.Time
	uncertain    bool      // only an answer clears a suspicion of the direct path, not data
	moved        bool      // we lost the address of the last direct path
	consentAt    time.Time // last consent check
	search       Attempt   // for a direct path; without what collect can tell
	hint         hint      // that we have no session
	hinted       time.Time // when the peer last said that it has none
	meeting      meeting   // hard rounds
	fair         fairness  // in them, to other peers
	fresh        outing    // of fresh sockets
	review       review    // of its quality
	belief       belief    // in what it says of our mapping

	// Traffic.
	seen        Activity
	observed    time.Time // when seen was read; zero: never
	activeUntil time.Time
	demanded    time.Time
	received    time.Time // last authenticated receipt
	arrived     time.Time // last data; zero: the silence since was questioned
	pace        pace      // of data
	sentAt      time.Time // last packet on the selected path
	sendingFrom time.Time // first packet after the last receipt; zero: none
	unanswered  time.Time // first packet after the last data; zero: none
	missed      bool      // the peer misses packets
}

func (a *Agent) newPeer(k Key) (*peer, error) {
	s, err := derive(a.private, a.cfg.Mesh, k)
	if err != nil {
		return nil, fmt.Errorf("new peer: %w", err)
	}
	p := &peer{key: k, secrets: s, limits: buckets[netip.AddrPort]{}, index: -1}
	for i, nonce := range a.cfg.Nonces {
		p.users[i] = s.user(nonce)
		a.users[p.users[i]] = p
	}
	return p, nil
}

// LogValue names the peer by the beginning of its key.
func (p *peer) LogValue() slog.Value {
	return slog.StringValue(fmt.Sprintf("%x", p.key[:4]))
}

func (p *peer) setNonce(n Nonce) { p.name = p.secrets.user(n) }

// active reports whether there was traffic in the last seconds.
func (p *peer) active(now time.Time) bool { return now.Before(p.activeUntil) }

// wanted reports whether a path should be looked for without being asked.
func (p *peer) wanted(now time.Time) bool {
	return p.online || p.active(now) || now.Sub(p.demanded) < demandMemory && !p.demanded.IsZero()
}

func (p *peer) path() Path {
	q := p.selected
	path := Path{Peer: p.key, Addr: q.addr, Local: q.local, Type: q.typ, RTT: q.rtt}
	path.Loss, path.MTU = q.quality.loss(), q.reach.size
	if p.copying.to != nil {
		path.Also, path.AlsoLocal = p.copying.to.addr, p.copying.to.local
	}
	if left := p.avoided(); left != nil {
		path.Left = left.quality.left
	}
	return path
}

// find returns the pair of an address of the peer and one of our sockets.
func (p *peer) find(addr netip.AddrPort, port uint16) *pair {
	for _, q := range p.pairs {
		if q.addr == addr && q.local.Port() == port {
			return q
		}
	}
	return nil
}

// setCandidates replaces what one source says of a peer, and reports whether
// there are new candidates.
func (a *Agent) setCandidates(p *peer, list []Candidate, from source) bool {
	for _, q := range p.pairs {
		q.source &^= from
	}
	p.forgive(from)
	added := false
	for _, c := range list {
		addr := plain(c.Addr)
		q := p.find(addr, 0)
		if c.Type == Relayed || !a.allowed(addr) || q != nil && q.relayed() {
			a.refuse(p, c, from)
			continue
		}
		if q == nil {
			if q = a.addPair(p, addr, 0); q == nil {
				a.refuse(p, c, from)
				continue
			}
			added = true
		}
		q.source |= from
		if q.typ != ServerReflexive || c.Type != Host {
			q.typ = c.Type
		}
	}
	p.pairs = slices.DeleteFunc(p.pairs, func(q *pair) bool {
		gone := q.source == 0 && !q.valid && q != p.selected && q != p.copying.to
		if gone {
			a.forget(q)
		}
		return gone
	})
	return added
}

// addPair makes room for one more pair. Pairs that nobody names any more go
// first, then those learnt longest ago; nil: all are worth more.
func (a *Agent) addPair(p *peer, addr netip.AddrPort, port uint16) *pair {
	count := 0
	for _, q := range p.pairs {
		if !q.relayed() {
			count++
		}
	}
	if count >= MaxCandidates {
		worst := -1
		for i, q := range p.pairs {
			named := q.source&(published|signalled|relay) != 0 // anybody in the LAN can announce
			if q == p.selected || q == p.copying.to || named || q.valid && !q.suspect {
				continue
			}
			if worst < 0 || q.heard.Before(p.pairs[worst].heard) {
				worst = i
			}
		}
		if worst < 0 {
			return nil
		}
		a.forget(p.pairs[worst])
		p.pairs = slices.Delete(p.pairs, worst, worst+1)
	}
	q := &pair{addr: addr, local: socket(port)}
	p.pairs = append(p.pairs, q)
	return q
}

// learn returns the pair of an authenticated check that one of our sockets got.
func (a *Agent) learn(p *peer, addr netip.AddrPort, port uint16) *pair {
	q := p.find(addr, port)
	if q == nil && a.allowed(addr) {
		if q = a.addPair(p, addr, port); q != nil {
			q.typ = a.found(p, addr, port)
			a.log.Debug("candidate revealed", "peer", p, "addr", addr, "type", q.typ)
		}
	}
	if q != nil && !q.relayed() {
		q.source |= learnt
	}
	return q
}

// forget drops the checks on a pair that wait for their answers.
func (a *Agent) forget(q *pair) {
	for _, id := range q.waiting {
		delete(a.sent, id)
	}
	q.waiting = nil
	q.late = time.Time{}
}
