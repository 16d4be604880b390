package overlay

import (
	"bytes"
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

// spread is what the device, the agent and the clients were told last, so that
// they are told only what is new. Only links.run uses it.
type spread struct {
	links   *links
	carries map[uint16]relay.State // transport and address of the links told
	ways    map[punch.Key][]uint16
	relays  map[punch.Key][]punch.Relay
	asked   map[*relayLink][]punch.Key
	addrs   map[*relayLink][]netip.AddrPort
	servers []punch.Server
	streams map[uint16]*relay.Stream // of the TCP links told
}

func newSpread(l *links) *spread {
	return &spread{
		links: l, carries: map[uint16]relay.State{}, ways: map[punch.Key][]uint16{},
		relays: map[punch.Key][]punch.Relay{}, asked: map[*relayLink][]punch.Key{}, addrs: map[*relayLink][]netip.AddrPort{},
	}
}

// update tells all that changed: first how links are reached, then the ways over
// them, and then who may use those.
func (s *spread) update() {
	open := s.open()
	s.setLinks(open)
	s.setTCP()
	s.setWays(open)
	s.setRelays(open)
	s.setClients(open)
	s.setServers(open)
}

// open lists the links in use by number.
func (s *spread) open() []*relayLink {
	s.links.mu.Lock()
	defer s.links.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.links.open), func(a, b *relayLink) int { return cmp.Compare(a.id, b.id) })
}

func (s *spread) setLinks(open []*relayLink) {
	dev := s.links.cfg.device()
	now := map[uint16]relay.State{}
	for _, k := range open {
		s.links.mu.Lock()
		st := relay.State{Transport: k.state.Transport, Addr: k.overUDP()}
		s.links.mu.Unlock()
		now[k.id] = st
		if st == s.carries[k.id] {
			continue
		}
		to := tun.Link{Addr: st.Addr}
		if st.Transport == relay.TLS {
			to.Send = k.client.Offer
		}
		dev.SetLink(k.id, to)
	}
	for id, st := range s.carries {
		if _, there := now[id]; !there && st.Transport != relay.None {
			dev.SetLink(id, tun.Link{})
		}
	}
	s.carries = now
}

// overUDP is where flow frames of a link come from over UDP: also while it goes
// over TLS, because some come that were sent before. mu is held.
func (k *relayLink) overUDP() netip.AddrPort {
	switch {
	case k.state.Transport == relay.UDP:
		return k.state.Addr
	case k.state.Transport == relay.None:
		return netip.AddrPort{}
	case !k.stun.IsValid() && len(k.info.addrs) > 0:
		return k.info.addrs[0]
	}
	return k.stun
}

func (s *spread) setWays(open []*relayLink) {
	s.links.mu.Lock()
	peers := slices.Collect(maps.Keys(s.links.peers))
	for p := range s.ways {
		if _, there := s.links.peers[p]; !there {
			s.links.setHandles(p, nil, nil)
			delete(s.ways, p)
			delete(s.relays, p)
		}
	}
	s.links.mu.Unlock()
	for _, p := range peers {
		s.links.mu.Lock()
		ids := s.links.withTCP(p, s.links.over(p, open))
		s.links.mu.Unlock()
		if told, ok := s.ways[p]; ok && slices.Equal(told, ids) {
			continue
		}
		header := relay.FlowOf(s.links.cfg.own, p)
		ways := make([]tun.Way, 0, len(ids))
		for _, id := range ids {
			ways = append(ways, tun.Way{Link: id, Header: header})
		}
		handles := s.links.cfg.device().SetWays(tun.Key(p), ways)
		if slices.ContainsFunc(handles, func(h netip.AddrPort) bool { return !h.IsValid() }) {
			continue // not a peer of the device yet
		}
		s.ways[p] = ids
		s.links.mu.Lock()
		s.links.setHandles(p, ids, handles)
		s.links.mu.Unlock()
	}
}

// over lists the links over which a peer may come: those to relays in nodes only where
// it says it is; mu is held.
func (l *links) over(p punch.Key, open []*relayLink) []uint16 {
	ids := make([]uint16, 0, len(open))
	for _, k := range open {
		if !k.info.peer || l.worth(k, l.peers[p]) {
			ids = append(ids, k.id)
		}
	}
	return ids
}

// setHandles notes the handles of a peer, one for each link; mu is held.
func (l *links) setHandles(p punch.Key, ids []uint16, handles []netip.AddrPort) {
	for _, h := range l.handles[p] {
		delete(l.ways, h)
	}
	delete(l.handles, p)
	if len(ids) == 0 {
		return
	}
	l.handles[p] = map[uint16]netip.AddrPort{}
	for i, id := range ids {
		l.handles[p][id] = handles[i]
		l.ways[handles[i]] = way{p, id}
	}
}

func (s *spread) setRelays(open []*relayLink) {
	type news struct {
		peer punch.Key
		list []punch.Relay
	}
	var all []news
	s.links.mu.Lock()
	for _, p := range s.links.peers {
		list := s.links.usable(p, open)
		if !slices.Equal(list, s.relays[p.key]) {
			s.relays[p.key] = list
			all = append(all, news{p.key, list})
		}
	}
	s.links.mu.Unlock()
	for _, n := range all {
		s.links.cfg.relays(n.peer, n.list)
	}
}

// usable lists the relays over which a peer may be reached now; mu is held.
func (l *links) usable(p linkPeer, open []*relayLink) []punch.Relay {
	var list []punch.Relay
	for _, k := range open {
		handle := l.handles[p.key][k.id]
		worth, here := l.worth(k, p), k.here[p.key]
		if !k.up() || !handle.IsValid() || !worth && !here || k.info.peer && !(worth && here) {
			continue
		}
		r := punch.Relay{Addr: handle, Here: k.here[p.key]}
		if trip, ok := tripTo(p.relays, trust.Key(k.info.key)); ok && k.state.RTT > 0 {
			r.RTT = k.state.RTT.Round(time.Millisecond) + time.Duration(trip)*time.Millisecond
		}
		list = append(list, r)
	}
	return l.preferTCP(p.key, list)
}

func (s *spread) setClients(open []*relayLink) {
	for k := range s.asked {
		if !slices.Contains(open, k) {
			delete(s.asked, k)
			delete(s.addrs, k)
		}
	}
	for _, k := range open {
		s.links.mu.Lock()
		peers, addrs := s.links.wantedAt(k, time.Now()), k.info.addrs
		s.links.mu.Unlock()
		if told, ok := s.addrs[k]; !ok || !slices.Equal(told, addrs) {
			s.addrs[k] = addrs
			k.client.SetAddrs(addrs)
		}
		if told, ok := s.asked[k]; !ok || !slices.Equal(told, peers) {
			s.asked[k] = peers
			k.client.SetPeers(peers)
		}
	}
}

// wantedAt lists the peers to whom flows at a relay are to be open; mu is held.
// A peer may be there although its record does not say so yet: in a small mesh, and
// at the own server's relay, it asks for all.
func (l *links) wantedAt(k *relayLink, now time.Time) []punch.Key {
	var list []punch.Key
	all := k.info.own || !k.info.peer && len(l.peers) <= askEverywhere
	for _, p := range l.peers {
		demanded := now.Before(l.demands[p.key])
		if !demanded {
			delete(l.demands, p.key)
		}
		if (p.online || demanded) && (all || l.worth(k, p)) {
			list = append(list, p.key)
		}
	}
	slices.SortFunc(list, func(a, b punch.Key) int { return bytes.Compare(a[:], b[:]) })
	return list
}

// setServers offers the relays as STUN servers, at the address where they answered
// last, so that the own addresses are learnt with the server down, and before it
// is reached.
func (s *spread) setServers(open []*relayLink) {
	var list []punch.Server
	for _, k := range open {
		s.links.mu.Lock()
		at := k.stun
		s.links.mu.Unlock()
		if at.IsValid() && !k.info.peer {
			user, key := k.client.STUN()
			list = append(list, punch.Server{Addr: at, Username: user, Key: key})
		}
	}
	same := slices.EqualFunc(list, s.servers, func(a, b punch.Server) bool {
		return a.Addr == b.Addr && bytes.Equal(a.Username, b.Username)
	})
	if !same {
		s.servers = list
		s.links.cfg.servers(list)
	}
}
