package overlay

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

// viaPeer is the way over a relay in a node, viaTCP a connection to the peer.
const (
	viaPeer = "peer-relay"
	viaTCP  = "tcp"
)

// status is this node's view; full is for root: keys and endpoints.
func (s *session) status(full bool) (Status, error) {
	stats, err := s.dev.Load().Stats()
	if err != nil {
		return Status{}, fmt.Errorf("read the peers' counters: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Schema: 1, Self: s.selfStatus(full), Peers: []PeerStatus{}, Relays: s.links.status(full)}
	for _, m := range s.roster.members {
		if !m.peer() {
			continue
		}
		st.Peers = append(st.Peers, s.peerStatus(m, stats[tun.Key(m.cert.WireGuard)], full))
	}
	slices.SortFunc(st.Peers, func(a, b PeerStatus) int { return cmp.Compare(a.Name, b.Name) })
	return st, nil
}

func (s *session) selfStatus(full bool) SelfStatus {
	self := SelfStatus{
		Name: s.self.Name, IPv4: s.self.IP4, IPv6: s.self.IP6, Online: s.online,
		Mesh: s.roster.mesh.State().Name, Interface: s.settings.Interface, PeerRelay: s.peerRelay.status(),
	}
	if !s.online {
		self.Trouble = "only root may see why"
	}
	if full {
		if !s.online {
			self.Trouble = troubleText(s.trouble)
		}
		self.PublicKey = tun.Key(s.self.WireGuard).String()
		self.Server = strings.Join(s.roster.mesh.State().Servers, ",")
	}
	return self
}

func (s *session) peerStatus(m *member, st tun.Stats, full bool) PeerStatus {
	k := punch.Key(m.cert.WireGuard)
	p := PeerStatus{
		Name: m.cert.Name, IPv4: m.cert.IP4, IPv6: m.cert.IP6, Online: m.node.Online,
		RxBytes: st.RxBytes, TxBytes: st.TxBytes, Path: s.pathStatus(m, full),
		Segments: max(1, s.dev.Load().Segments(tun.Key(k))),
	}
	if path, ok := s.agent.Path(k); ok && p.Path.Kind != "none" && path.RTT > 0 {
		p.RTTms = milliseconds(path.RTT)
	}
	if !st.LastHandshake.IsZero() {
		at := st.LastHandshake.UTC()
		p.LastHandshake = &at
	}
	if full {
		p.PublicKey = tun.Key(k).String()
	}
	return p
}

// pathStatus is how a peer is reached; mu is held.
func (s *session) pathStatus(m *member, full bool) PathStatus {
	path, _ := s.endpoints.path(punch.Key(m.cert.WireGuard))
	return s.describe(m, path, full)
}

// describe puts a path to a peer into words, the zero one too. What leads to a peer that
// is gone is none. mu is held.
func (s *session) describe(m *member, path punch.Path, full bool) PathStatus {
	st := s.route(path, full)
	if st.Kind == "direct" {
		return st
	}
	if now, ok := s.agent.Path(punch.Key(m.cert.WireGuard)); ok {
		if st.Reason = badPath(now); st.Reason != "" {
			return st
		}
	}
	e, _ := s.agent.Explain(punch.Key(m.cert.WireGuard))
	reached := st.Via != "" && alive(m.node.Online, e, time.Now())
	if !reached && !m.node.Online {
		st = PathStatus{Kind: "none"}
	}
	st.Reason = s.hurdlesTo(m, e, reached).reason()
	return st
}

// route is describe without a reason.
func (s *session) route(path punch.Path, full bool) PathStatus {
	switch {
	case !path.Addr.IsValid():
		return PathStatus{Kind: "none"}
	case path.Type != punch.Relayed:
		st := PathStatus{Kind: "direct", Via: via(path.Type), MTU: packetMTU(path)}
		if full {
			st.Endpoint = path.Addr.String()
		}
		return st
	}
	if far, ok := s.links.direct(path.Addr); ok {
		st := PathStatus{Kind: "direct", Via: viaTCP}
		if full && far.IsValid() {
			st.Endpoint = far.String()
		}
		return st
	}
	name, over := s.links.relayed(path.Addr, full)
	st := PathStatus{Kind: "relay", Relay: name}
	switch {
	case over == relay.None:
	case s.links.byPeer(path.Addr):
		st.Via = viaPeer
	default:
		st.Via = "relay-" + over.String()
	}
	return st
}

func milliseconds(d time.Duration) *float64 {
	ms := float64(d.Round(10*time.Microsecond)) / float64(time.Millisecond)
	return &ms
}

// peersText is the last progress line of up.
func (s *session) peersText() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var online []string
	known := 0
	for _, m := range s.roster.members {
		if !m.peer() {
			continue
		}
		known++
		if !m.node.Online {
			continue
		}
		text := m.cert.Name + " (no path yet)"
		if p, ok := s.endpoints.path(punch.Key(m.cert.WireGuard)); ok {
			text = fmt.Sprintf("%s (%s)", m.cert.Name, s.pathText(p))
		}
		online = append(online, text)
	}
	slices.Sort(online)
	if len(online) == 0 {
		return fmt.Sprintf("none online, %d known", known)
	}
	const most = 5
	if len(online) > most {
		return fmt.Sprintf("%d online: %s and %d more", len(online), strings.Join(online[:most], ", "), len(online)-most)
	}
	return fmt.Sprintf("%d online: %s", len(online), strings.Join(online, ", "))
}

func (s *session) pathText(p punch.Path) string {
	where := "direct " + p.Addr.String()
	if p.Type == punch.Relayed {
		where = s.links.describe(p.Addr)
	}
	if p.RTT == 0 {
		return where
	}
	return fmt.Sprintf("%s, %s", where, p.RTT.Round(100*time.Microsecond))
}

// find looks a peer up by name or overlay address.
func (s *session) find(name string) (*member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == s.self.Name || name == s.self.IP4.String() || name == s.self.IP6.String() {
		return nil, ThisMachine(name)
	}
	names := make([]string, 0, len(s.roster.members))
	for _, m := range s.roster.members {
		if m.cert.Name == name || m.cert.IP4.String() == name || m.cert.IP6.String() == name {
			if !m.peer() {
				return nil, NotAPeer(name)
			}
			return m, nil
		}
		names = append(names, m.cert.Name)
	}
	return nil, UnknownPeer(name, names)
}

// ThisMachine is the error for a peer that is the machine itself.
func ThisMachine(name string) error {
	return fail(Usage, "see: overlay status", "%q is this machine", name)
}

// NotAPeer is the error for a relay.
func NotAPeer(name string) error {
	return fail(Usage, "see: overlay status", "%q is a relay, not a machine to connect to", name)
}

// UnknownPeer is the error for a name that nobody has, with the nearest of the
// names that exist.
func UnknownPeer(name string, names []string) error {
	best, distance := "", 3
	slices.Sort(names)
	for _, n := range names {
		d := editDistance(name, n)
		if strings.HasPrefix(n, name) {
			d = min(d, 2)
		}
		if d < distance {
			best, distance = n, d
		}
	}
	if best == "" {
		return fail(Usage, "see: overlay status", "no node %q", name)
	}
	return fail(Usage, "see: overlay status", "no node %q; did you mean %q?", name, best)
}

// editDistance counts the insertions, deletions, replacements and swaps of
// neighbours between two names.
func editDistance(a, b string) int {
	if len(a) > 255 || len(b) > 255 {
		return 255
	}
	var before, prev []int
	cur := make([]int, len(b)+1)
	for j := range cur {
		cur[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, prev, cur = prev, cur, make([]int, len(b)+1)
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
	}
	return cur[len(b)]
}
