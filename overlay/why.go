package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
)

// Why says how a peer is reached, what was tried to reach it directly, and what
// stands in the way. Lists are never null, and times are null when there is none.
// Only root is told addresses.
type Why struct {
	Schema int        `json:"schema"`
	Name   string     `json:"name"`
	IPv4   netip.Addr `json:"ipv4"`
	IPv6   netip.Addr `json:"ipv6"`
	Online bool       `json:"online"` // as the server says
	Path   PathStatus `json:"path"`
	RTTms  *float64   `json:"rttMs"`
	Since  *time.Time `json:"since"`  // of the path
	Before PathStatus `json:"before"` // what it took over from; kind none: nothing
	Here   Side       `json:"here"`
	There  Side       `json:"there"` // as the peer told, or as follows from what it told
	Relays []RelayLeg `json:"relays"`
	Pairs  []WhyPair  `json:"pairs"`
	Rounds WhyRounds  `json:"rounds"`
	Steps  []WhyStep  `json:"steps"`
	// Failed names the first step that failed; empty while the path is direct.
	Failed    string     `json:"failed,omitempty"`
	Verdict   string     `json:"verdict"` // one sentence
	Help      []string   `json:"help"`
	NextRound *time.Time `json:"nextRound"` // when a direct path is looked for again
}

// Side is the network of one side.
type Side struct {
	// Told says that the side is known at all.
	Told bool `json:"told"`
	// UDP is passes, blocked, or empty: not known. UDPAnswer is when something answered
	// over it last, on this side; null: never, or not known.
	UDP       string     `json:"udp,omitempty"`
	UDPAnswer *time.Time `json:"udpAnswer"`

	IPv4   bool     `json:"ipv4"` // it has addresses of that family
	IPv6   bool     `json:"ipv6"`
	Public []string `json:"public,omitempty"` // as servers see it
	Port   uint16   `json:"port,omitempty"`   // its own UDP port
	// CarrierGrade says that a router in front of it has no public address itself.
	CarrierGrade bool      `json:"carrierGrade,omitempty"`
	NAT          NATStatus `json:"nat"`
}

// RelayLeg is a relay and both sides' way to it.
type RelayLeg struct {
	RelayStatus
	PeerTripMs *int `json:"peerTripMs"` // the peer's, as it published it; null: none
	PeerHere   bool `json:"peerHere"`   // the peer was seen there
}

// WhyPair is one candidate of the peer and what became of it. State and Obstacle
// are those of punch.PairReport.
type WhyPair struct {
	Remote   string     `json:"remote,omitempty"`
	Local    string     `json:"local,omitempty"`
	Relay    string     `json:"relay,omitempty"` // its name
	Kind     string     `json:"kind"`            // host, srflx, prflx, mapped, tcp or relay
	From     []string   `json:"from"`            // published, signalled, learnt, relay
	State    string     `json:"state"`
	Obstacle string     `json:"obstacle,omitempty"`
	Selected bool       `json:"selected"`
	Openers  int        `json:"openers"`
	Checks   int        `json:"checks"`
	Answers  int        `json:"answers"`
	Heard    int        `json:"heard"`
	Withheld int        `json:"withheld"`
	Error    string     `json:"error,omitempty"`
	First    *time.Time `json:"first"`
	Last     *time.Time `json:"last"`
	Answered *time.Time `json:"lastAnswer"`
	HeardAt  *time.Time `json:"lastHeard"`
	RTTms    *float64   `json:"rttMs"`
}

// WhyStep is a step to a direct path. State is ok, failed, or empty: not known.
type WhyStep struct {
	Name  string `json:"name"`
	State string `json:"state"`
	Text  string `json:"text"`
}

// totals sums the direct pairs up.
type totals struct {
	direct                  int // pairs, and candidates that made none
	barred, family, refused int // of them: not tried, of another IP version, refused by the system
	openers, checks         int
	answers, heard          int
	tried                   int // pairs
	first, last             time.Time
	back                    time.Time // when something came over one last
	err                     error
}

func totalsOf(e punch.Explanation) totals {
	t := totals{direct: len(e.Refused), barred: len(e.Refused)}
	for _, r := range e.Pairs {
		if r.Type == punch.Relayed {
			continue
		}
		t.direct++
		switch r.Obstacle {
		case punch.OtherFamily:
			t.family++
			t.barred++
		case punch.Unsendable:
			t.refused++
			t.err = r.Err
		default:
			if r.State == punch.PairBarred {
				t.barred++
			}
		}
		if r.Openers+r.Checks > 0 {
			t.tried++
		}
		t.openers, t.checks = t.openers+r.Openers, t.checks+r.Checks
		t.answers, t.heard = t.answers+r.Answers, t.heard+r.Heard
		if t.first.IsZero() || !r.First.IsZero() && r.First.Before(t.first) {
			t.first = r.First
		}
		if r.Last.After(t.last) {
			t.last = r.Last
		}
		for _, at := range []time.Time{r.LastAnswer, r.LastHeard} {
			if at.After(t.back) {
				t.back = at
			}
		}
	}
	return t
}

// hurdlesTo is what stands between this node and a member; mu is held.
func (s *session) hurdlesTo(m *member, e punch.Explanation, reached bool) hurdles {
	h := hurdles{
		peer: m.cert.Name, online: m.node.Online, server: s.online, reached: reached, reach: s.links.reach(),
		attempt: e.Attempt, now: time.Now(), totals: totalsOf(e), mute: s.mute(),
	}
	here := s.ownSide(false, h.totals.back)
	h.here, h.udp = here.NAT, here.UDP
	there := peerSide(m, e, false)
	h.there, h.deaf = there.NAT, there.UDP == udpBlocked
	var ports []uint16
	for _, server := range s.serverSTUN {
		if !slices.Contains(ports, server.Addr.Port()) {
			ports = append(ports, server.Addr.Port())
		}
	}
	h.ports = numbers(ports)
	return h
}

// mute reports whether no server ever saw anybody who is online, over UDP; mu is
// held.
func (s *session) mute() bool {
	online := 0
	for _, m := range s.roster.members {
		if !m.peer() || !m.node.Online || m.record.Serial == 0 {
			continue
		}
		online++
		for _, c := range m.record.Candidates {
			if punch.CandidateType(c.Type) == punch.ServerReflexive {
				return false
			}
		}
	}
	return online > 0
}

// why explains the path to a peer; full is for root: with addresses.
func (s *session) why(name string, full bool) (Why, error) {
	m, err := s.find(name)
	if err != nil {
		return Why{}, err
	}
	k := punch.Key(m.cert.WireGuard)
	e, _ := s.agent.Explain(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	back := totalsOf(e).back
	w := Why{
		Schema: 1, Name: m.cert.Name, IPv4: m.cert.IP4, IPv6: m.cert.IP6, Online: m.node.Online,
		Path: s.describe(m, e.Path, full), Since: moment(e.Since), NextRound: moment(e.Retry),
		Before: s.route(e.Before, full),
		Here:   s.ownSide(full, back), There: peerSide(m, e, full),
		Relays: s.links.legs(k, m.record.Relays, full), Pairs: s.whyPairs(e, full), Rounds: whyRounds(e.Rounds), Help: []string{},
	}
	if e.Path.RTT > 0 {
		w.RTTms = milliseconds(e.Path.RTT)
	}
	reached := w.Path.Via != "" && alive(m.node.Online, e, time.Now())
	h := s.hurdlesTo(m, e, reached)
	if !back.IsZero() && h.now.Sub(back) < udpOverdue && w.Here.UDP == udpPasses { // whatever servers say
		w.There.UDP = udpPasses
	}
	if full {
		h.port = w.Here.Port
	}
	if w.Path.Kind == "direct" {
		w.Verdict = w.directText(e)
	} else {
		d := h.diagnose()
		w.Failed, w.Help = d.step, d.help
		w.Verdict = w.relayedText(reached) + ": " + d.reason
	}
	w.Steps = steps(h, e, w)
	return w, nil
}

// lately is for how long a path over a relay counts as one that answers: longer than
// the pause between two keepalives.
const lately = 40 * time.Second

// alive reports whether the path in use is one that answers, or did not have to yet.
// Over a relay a peer that the server calls offline must have answered lately: a server
// that was started anew knows nobody, but a relay does not tell of all who go.
func alive(online bool, e punch.Explanation, now time.Time) bool {
	return slices.ContainsFunc(e.Pairs, func(r punch.PairReport) bool {
		heard := online || r.Type != punch.Relayed || now.Sub(r.LastAnswer) < lately || now.Sub(r.LastHeard) < lately
		return r.Selected && heard && r.State != punch.PairSuspect && r.Obstacle != punch.NotAtRelay
	})
}

// ownSide is this machine's network; heard is when a peer was last heard over a direct
// path. mu is held.
func (s *session) ownSide(full bool, heard time.Time) Side {
	n := s.agent.Network()
	udp := udpOf(n, s.links.reach(), heard, time.Now())
	side := Side{Told: true, NAT: NATStatus{}, UDP: udp.state, UDPAnswer: moment(udp.last)}
	own := hosts(n.Local)
	for _, p := range n.Local {
		side.IPv4 = side.IPv4 || p.Addr().Is4()
		side.IPv6 = side.IPv6 || p.Addr().Is6() && globalIPv6(p.Addr())
	}
	seen := []punch.Sample{}
	for _, r := range n.Servers {
		if !r.Fresh || !r.Mapped.IsValid() {
			continue
		}
		side.addPublic(r.Mapped, full)
		if r.Mapped.Addr().Is4() {
			seen = append(seen, punch.Sample{Local: n.Port, Server: r.Server, Mapped: r.Mapped, At: r.At})
		}
	}
	side.NAT = natStatus(seen, own)
	if side.NAT.hard() && n.NAT.Allocation != 0 {
		side.NAT = describeNAT(n.NAT) // from more sockets
	}
	if full {
		side.Port = n.Port
	}
	return side
}

// What is known of the UDP of a network.
const (
	udpPasses  = "passes"
	udpBlocked = "blocked"
)

// addPublic adds the host of an address as servers see it, once.
func (d *Side) addPublic(a netip.AddrPort, full bool) {
	if text := a.Addr().String(); full && !slices.Contains(d.Public, text) {
		d.Public = append(d.Public, text)
	}
}

// peerSide is what a peer told of its network. Addresses at which servers saw it
// tell of its NAT: one socket, seen at several ports.
func peerSide(m *member, e punch.Explanation, full bool) Side {
	side := Side{Told: m.record.Serial > 0 || e.Signals.Heard > 0}
	named, seen := namedBy(e), []netip.AddrPort{}
	for _, c := range named {
		side.IPv4 = side.IPv4 || c.Addr.Addr().Is4()
		side.IPv6 = side.IPv6 || globalIPv6(c.Addr.Addr())
		if c.Type == punch.ServerReflexive {
			side.UDP = udpPasses
			side.addPublic(c.Addr, full)
			seen = append(seen, c.Addr)
		}
	}
	if side.Told && side.UDP == "" {
		side.UDP = udpBlocked
	}
	side.NAT.Mapping = mappingSeen(seen, named)
	if e.NAT.Mapping != 0 {
		side.NAT = describeNAT(e.NAT)
	}
	return side
}

// namedBy lists what a peer named, whether it can be tried or not.
func namedBy(e punch.Explanation) []punch.Candidate {
	var list []punch.Candidate
	for _, r := range e.Pairs {
		if slices.Contains(r.From, punch.Published) || slices.Contains(r.From, punch.Signalled) {
			list = append(list, punch.Candidate{Addr: r.Remote, Type: r.Type})
		}
	}
	for _, r := range e.Refused {
		list = append(list, r.Candidate)
	}
	return list
}

// mappingSeen tells the mapping of one socket of which servers saw these addresses.
func mappingSeen(seen []netip.AddrPort, named []punch.Candidate) string {
	mapping := ""
	for i, x := range seen {
		if !x.Addr().Is4() {
			continue
		}
		if mapping == "" {
			mapping = endpointIndependent
		}
		if slices.ContainsFunc(named, func(c punch.Candidate) bool { return c.Type == punch.Host && c.Addr == x }) {
			return noNAT
		}
		if slices.ContainsFunc(seen[:i], func(y netip.AddrPort) bool { return x.Addr() == y.Addr() && x.Port() != y.Port() }) {
			mapping = endpointDependent
		}
	}
	return mapping
}

// legs lists the relays that this node or the peer uses.
func (l *links) legs(k punch.Key, trips []trust.RelayTrip, full bool) []RelayLeg {
	list := []RelayLeg{}
	for _, st := range l.status(full) {
		list = append(list, RelayLeg{RelayStatus: st})
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.known() {
		ms, there := tripTo(trips, trust.Key(r.key))
		at := slices.IndexFunc(list, func(leg RelayLeg) bool { return leg.Name == r.nameFor(full) })
		if at < 0 && there {
			list, at = append(list, RelayLeg{RelayStatus: RelayStatus{Name: r.nameFor(full)}}), len(list)
		}
		if at < 0 {
			continue
		}
		if there {
			trip := int(ms)
			list[at].PeerTripMs = &trip
		}
		if link := l.open[r.key]; link != nil {
			list[at].PeerHere = link.here[k]
		}
	}
	return list
}

// whyPairs lists the pairs, the one in use first, then direct ones; mu is held.
func (s *session) whyPairs(e punch.Explanation, full bool) []WhyPair {
	list := []WhyPair{}
	for _, r := range e.Pairs {
		p := WhyPair{
			Kind: cmp.Or(via(r.Type), "relay"), From: texts(r.From), State: string(r.State), Obstacle: string(r.Obstacle),
			Selected: r.Selected, Openers: r.Openers, Checks: r.Checks, Answers: r.Answers, Heard: r.Heard, Withheld: r.Withheld,
			First: moment(r.First), Last: moment(r.Last), Answered: moment(r.LastAnswer), HeardAt: moment(r.LastHeard),
		}
		if r.RTT > 0 {
			p.RTTms = milliseconds(r.RTT)
		}
		if r.Err != nil {
			p.Error = sendError(r.Err)
		}
		if far, tcp := s.links.direct(r.Remote); tcp {
			p.Kind, p.From = viaTCP, texts([]punch.Source{punch.Signalled})
			if full && far.IsValid() {
				p.Remote = far.String()
			}
		} else if r.Type == punch.Relayed {
			p.Relay, _ = s.links.relayed(r.Remote, full)
		} else if full {
			p.Remote, p.Local = r.Remote.String(), localText(r.Local)
		}
		list = append(list, p)
	}
	for _, r := range e.Refused {
		p := WhyPair{Kind: cmp.Or(via(r.Type), "relay"), From: texts([]punch.Source{r.From}), State: string(punch.PairBarred), Obstacle: string(r.Obstacle)}
		if full {
			p.Remote = r.Addr.String()
		}
		list = append(list, p)
	}
	slices.SortStableFunc(list, func(a, b WhyPair) int {
		return cmp.Or(-compareBool(a.Selected, b.Selected), compareBool(a.Kind == "relay", b.Kind == "relay"), cmp.Compare(b.Checks, a.Checks))
	})
	return list
}

// localText is an own address and port; port 0 is the main one.
func localText(a netip.AddrPort) string {
	switch {
	case !a.Addr().IsValid() && a.Port() != 0:
		return fmt.Sprintf("port %d", a.Port())
	case !a.IsValid():
		return ""
	case a.Port() == 0:
		return a.Addr().String()
	}
	return a.String()
}

func texts[T ~string](list []T) []string {
	all := []string{}
	for _, x := range list {
		all = append(all, string(x))
	}
	return all
}

// moment is a time in JSON: null when there is none.
func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Round(time.Millisecond)
	return &t
}
