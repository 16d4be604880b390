package punch

import (
	"net/netip"
	"slices"
	"time"
)

// Explanation is what the agent knows of the way to a peer, and of the search for
// a direct one. Counts and times of pairs are since the network changed last.
type Explanation struct {
	Online  bool      // as the netmap says
	Path    Path      // in use; the zero Addr means that there is none
	Since   time.Time // when it was chosen; zero: there is none
	Before  Path      // what it took over from; the zero Addr: nothing
	Attempt Attempt   // the search for a direct path; zero while there is one
	Retry   time.Time // when the peer is called next; zero: not planned
	NAT     NAT       // the peer's, as it told; zero: not told
	Rounds  Rounds
	Signals Signals
	Pairs   []PairReport // at most MaxCandidates, and MaxRelays over relays
	Refused []Refusal    // candidates that made no pair; at most MaxCandidates
}

// Signals counts what was said to a peer, and by it, through a relay or the server.
type Signals struct {
	Sent, Failed, Heard int
	LastSent, LastHeard time.Time
	Err                 error // of the last one that could not be sent; nil if it went
}

// PairReport is one candidate of a peer and what became of it.
type PairReport struct {
	Remote   netip.AddrPort
	Local    netip.AddrPort // ours, at which answers arrive; port 0: the main port; zero: any
	Type     CandidateType
	From     []Source
	State    PairState
	Obstacle Obstacle // why the state is PairHeld or PairBarred; else empty
	Selected bool     // it is the path in use

	Openers  int   // low-TTL checks that left
	Checks   int   // others that left
	Answers  int   // answers that came
	Heard    int   // checks of the peer that came from there
	Withheld int   // packets that the limits held back
	Err      error // why the last packet could not be sent; nil if it left

	First, Last           time.Time // of what left
	LastAnswer, LastHeard time.Time
	RTT                   time.Duration // smoothed; zero: no answer yet
}

// Refusal is a candidate that made no pair, and why.
type Refusal struct {
	Candidate
	From     Source
	Obstacle Obstacle
}

// Source says who named a candidate.
type Source string

// The sources of candidates.
const (
	Published Source = "published" // the netmap
	Signalled Source = "signalled" // the peer, in a signal
	Learnt    Source = "learnt"    // an authenticated check came from there
	ByRelay   Source = "relay"     // SetRelays
	Announced Source = "announced" // multicast in our LAN
)

// PairState says how far a pair came.
type PairState string

// The states of a pair.
const (
	PairValid    PairState = "valid"    // it answers
	PairSuspect  PairState = "suspect"  // it answered, and does not now
	PairHeld     PairState = "held"     // checks wait; see Obstacle
	PairChecking PairState = "checking" // checks are being sent
	PairSilent   PairState = "silent"   // checks were sent, and none was answered
	PairUntried  PairState = "untried"  // nothing was sent yet
	PairBarred   PairState = "barred"   // nothing is sent, or nothing can leave; see Obstacle
)

// Obstacle says why checks on a pair wait or are not sent.
type Obstacle string

// The obstacles.
const (
	WaitsForPeer Obstacle = "waits-for-peer" // until the peer's NAT is open towards us
	OtherFamily  Obstacle = "other-family"   // we have no address of that family
	OtherSite    Obstacle = "other-site"     // a private address, and we are not at that site
	Forbidden    Obstacle = "forbidden"      // the mesh's own, a server's or a relay's
	Unusable     Obstacle = "unusable"       // loopback, multicast, broadcast, ours
	OverLimit    Obstacle = "limit"          // the limits on packets, or on candidates
	NotAtRelay   Obstacle = "not-at-relay"   // the peer is not at that relay
	Unsendable   Obstacle = "unsendable"     // the system refuses to send there; see Err
)

// tally counts what was sent on a pair and what came back.
type tally struct {
	openers, checks, answers, heard, withheld int
	first                                     time.Time
	last                                      time.Time
	err                                       error
}

// left counts a check that leaves.
func (t *tally) left(how outgoing) {
	if how.ttl > 0 {
		t.openers++
	} else {
		t.checks++
	}
	if t.first.IsZero() {
		t.first = how.now
	}
	t.last = how.now
	t.err = nil
}

// unsent notes that a datagram could not be sent.
func (a *Agent) unsent(d datagram, err error) {
	if d.pair == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	d.pair.tally.err = err
}

// said counts a signal that is sent; failed notes that it was not.
func (s *Signals) said(now time.Time) {
	s.Sent++
	s.LastSent, s.Err = now, nil
}

func (s *Signals) failed(err error) {
	s.Failed++
	s.Err = err
}

// history is how the path of a peer came to be.
type history struct {
	since  time.Time
	before Path
}

// noteHistory notes the path that ends, when another takes over.
func (p *peer) noteHistory(now time.Time) {
	before := Path{}
	if p.selected != nil {
		before = p.path()
		before.Also, before.AlsoLocal = netip.AddrPort{}, netip.AddrPort{}
	}
	p.history = history{since: now, before: before}
}

// Explain tells what the agent knows of the way to a peer; false: there is no such
// peer. Safe for concurrent use.
func (a *Agent) Explain(k Key) (Explanation, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[k]
	if p == nil {
		return Explanation{}, false
	}
	now := time.Now()
	e := Explanation{
		Online: p.online, Attempt: a.attempt(p), Retry: p.retryAt, Signals: p.talked,
		Refused: slices.Clone(p.refused), NAT: p.meeting.theirs.nat, Rounds: a.rounds(p, now),
	}
	if p.selected != nil {
		e.Path, e.Since, e.Before = p.path(), p.history.since, p.history.before
	}
	for _, q := range p.pairs {
		e.Pairs = append(e.Pairs, a.report(p, q, now))
	}
	return e, true
}

func (a *Agent) report(p *peer, q *pair, now time.Time) PairReport {
	t := q.tally
	r := PairReport{
		Remote: q.addr, Local: q.local, Type: q.typ, From: q.source.names(), Selected: q == p.selected,
		Openers: t.openers, Checks: t.checks, Answers: t.answers, Heard: t.heard, Withheld: t.withheld, Err: t.err,
		First: t.first, Last: t.last, LastAnswer: q.answered, LastHeard: q.heard,
	}
	if q.samples > 0 {
		r.RTT = q.rtt
	}
	r.State, r.Obstacle = a.stateOf(p, q, now)
	return r
}

// stateOf tells how far a pair came and what stands in its way.
func (a *Agent) stateOf(p *peer, q *pair, now time.Time) (PairState, Obstacle) {
	t := q.tally
	left := t.openers+t.checks > 0
	switch {
	case q.valid && q.suspect, q == p.selected && q.suspect:
		return PairSuspect, ""
	case q.valid:
		return PairValid, ""
	case q.relayed() && !q.reachable():
		return PairBarred, NotAtRelay
	case q.relayed() && !left:
		return PairUntried, ""
	case !q.relayed() && a.obstacle(p, q) != "":
		return PairBarred, a.obstacle(p, q)
	case t.err != nil:
		return PairBarred, Unsendable
	case !q.next.IsZero() && a.held(p, q, now):
		return PairHeld, WaitsForPeer
	case !left && t.withheld > 0:
		return PairBarred, OverLimit
	case !left:
		return PairUntried, ""
	case !q.next.IsZero():
		return PairChecking, ""
	}
	return PairSilent, ""
}

// obstacle tells why checks on a direct pair make no sense; empty: they do.
func (a *Agent) obstacle(p *peer, q *pair) Obstacle {
	switch {
	case !a.allowed(q.addr):
		return a.ban(q.addr)
	case !a.speaks(q.addr):
		return OtherFamily
	case !a.eligible(p, q):
		return OtherSite
	}
	return ""
}

// speaks reports whether we have an address of the family of addr, as far as we
// were told of any.
func (a *Agent) speaks(addr netip.AddrPort) bool {
	return len(a.local) == 0 || slices.ContainsFunc(a.local, func(ours netip.Prefix) bool {
		return ours.Addr().Is4() == addr.Addr().Is4()
	})
}

// ban tells why an address that is not allowed is not.
func (a *Agent) ban(addr netip.AddrPort) Obstacle {
	if probeable(addr) && a.cfg.Forbidden != nil && a.cfg.Forbidden(addr) {
		return Forbidden
	}
	return Unusable
}

// refuse notes a candidate that makes no pair, until the same source names others.
func (a *Agent) refuse(p *peer, c Candidate, from source) {
	if len(p.refused) >= MaxCandidates {
		return
	}
	why := OverLimit
	if !a.allowed(plain(c.Addr)) {
		why = a.ban(plain(c.Addr))
	}
	c.Token = nil
	p.refused = append(p.refused, Refusal{Candidate: c, From: from.names()[0], Obstacle: why})
}

// forgive drops what is noted of a source's candidates.
func (p *peer) forgive(from source) {
	p.refused = slices.DeleteFunc(p.refused, func(r Refusal) bool { return r.From == from.names()[0] })
}

func (s source) names() []Source {
	var list []Source
	for _, n := range []struct {
		bit  source
		name Source
	}{{published, Published}, {signalled, Signalled}, {learnt, Learnt}, {relay, ByRelay}, {announced, Announced}} {
		if s&n.bit != 0 {
			list = append(list, n.name)
		}
	}
	return list
}

// Network is what is known of our own network.
type Network struct {
	Local   []netip.Prefix // addresses of the interfaces
	Port    uint16         // ours
	Changed time.Time      // when it changed last; zero: not since the start
	NAT     NAT            // as spare sockets saw it; zero: there was no need to look
	Servers []ServerReport
}

// ServerReport is a STUN server and what it said.
type ServerReport struct {
	Server netip.AddrPort
	Mapped netip.AddrPort // where it saw us last; zero: nowhere, or it is long ago
	Fresh  bool           // it answered since the network changed
	Asking bool           // an answer may still come
	At     time.Time      // of the last answer; zero: none
}

// Network tells what is known of our own network. Safe for concurrent use.
func (a *Agent) Network() Network {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := Network{Local: slices.Clone(a.local), Port: a.port, Changed: a.changed, NAT: a.hard.nat}
	for _, s := range a.servers {
		n.Servers = append(n.Servers, ServerReport{
			Server: s.Addr, Mapped: s.mapped, Fresh: s.fresh, Asking: s.asking(), At: s.at,
		})
	}
	return n
}
