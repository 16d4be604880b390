package overlay

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
)

const (
	// surveyGap is the least time between two looks at the peers.
	surveyGap = time.Second
	// maxPeerAddrs is how many addresses of a peer relay are tried.
	maxPeerAddrs = 4
	// peerHellos is how often one is asked at an address without an answer: a member may
	// name those of others.
	peerHellos = 5
	// muteFor is how long packets may go to a peer over a peer relay while none comes:
	// checks and signals may pass where nothing else does.
	muteFor = 5 * time.Second
)

// usage is what was seen of a peer that is reached over a relay.
type usage struct {
	packets punch.Activity
	since   time.Time // reached over a relay
	used    time.Time // zero: not while it was looked at
	relay   punch.Key // the peer relay in use; zero: none
	mute    time.Time // since then packets went over that one, and none came; zero: one did
}

// trial is a peer relay and the peer it was tried for; the zero peer is anybody.
type trial struct{ relay, peer punch.Key }

// rest is how long a peer relay is left alone.
type rest struct {
	until time.Time
	pause time.Duration
}

// peerRelays is what the links know of peer relays. All is guarded by the mutex of
// links.
type peerRelays struct {
	infos  map[punch.Key]relayInfo // to keep a link to
	wanted map[punch.Key]bool      // of them
	left   map[punch.Key]time.Time // of the others, since when they are not
	tries  map[trial]time.Time     // since when, of those that are wanted
	rests  map[trial]rest
	usage  map[punch.Key]usage // of peers over relays
	next   time.Time           // not looked before
}

func newPeerRelays() peerRelays {
	return peerRelays{
		infos: map[punch.Key]relayInfo{}, wanted: map[punch.Key]bool{}, left: map[punch.Key]time.Time{},
		tries: map[trial]time.Time{}, rests: map[trial]rest{}, usage: map[punch.Key]usage{},
	}
}

// survey looks which peer relays are worth a link now, and tells how long until it
// is to be looked again.
func (l *links) survey(now time.Time) time.Duration {
	if l.cfg.offers == nil {
		return linkTick
	}
	l.mu.Lock()
	wait := l.via.next.Sub(now)
	if wait <= 0 {
		l.via.next = now.Add(surveyGap)
	}
	l.mu.Unlock()
	if wait > 0 {
		return wait
	}
	var peers []farPeer
	if !l.reach().noUDP() { // nodes relay over UDP alone
		peers = l.farPeers(now)
	}
	var offers []peerOffer
	if len(peers) > 0 || l.anyPeerLink() {
		offers = l.offersNow(now)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settlePeers(offers, choosePeerRelays(peers, offers), now)
	return linkTick
}

func (l *links) anyPeerLink() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.via.infos) > 0
}

// farPeers lists the peers in use that have been reached over relays alone for long
// enough.
func (l *links) farPeers(now time.Time) []farPeer {
	l.mu.Lock()
	list := make([]linkPeer, 0, len(l.peers))
	for _, p := range l.peers {
		if p.online || now.Before(l.demands[p.key]) {
			list = append(list, p)
		}
	}
	l.mu.Unlock()
	seen := map[punch.Key]usage{}
	var far []farPeer
	for _, p := range list {
		path, packets := l.cfg.path(p.key)
		if _, tcp := l.direct(path.Addr); path.Type != punch.Relayed || tcp {
			continue
		}
		l.mu.Lock()
		u := l.via.usage[p.key].after(packets, l.peerRelayOf(path.Addr), now)
		if !u.mute.IsZero() && now.Sub(u.mute) >= muteFor {
			l.via.rest(trial{u.relay, p.key}, now)
			u.mute = time.Time{}
		}
		f := farPeer{key: p.key, online: p.online, trips: p.relays, base: l.base(p)}
		l.mu.Unlock()
		seen[p.key] = u
		if now.Sub(u.since) >= farAfter && now.Sub(u.used) < peerIdle {
			far = append(far, f)
		}
	}
	l.mu.Lock()
	l.via.usage = seen
	l.mu.Unlock()
	return far
}

// after takes a new count of packets into account, and over which peer relay they go.
// One way alone counts as mute, too: that costs no more than the way over the server.
func (u usage) after(packets punch.Activity, by punch.Key, now time.Time) usage {
	sent, received := packets.Sent != u.packets.Sent, packets.Received != u.packets.Received
	switch {
	case u.since.IsZero():
		u.since = now
	case sent || received:
		u.used = now
	}
	switch {
	case received, by != u.relay, by == punch.Key{}:
		u.mute = time.Time{}
	case sent && u.mute.IsZero():
		u.mute = now
	}
	u.packets, u.relay = packets, by
	return u
}

// peerRelayOf is the peer relay that a handle leads through; mu is held.
func (l *links) peerRelayOf(handle netip.AddrPort) punch.Key {
	if k := l.byID(l.ways[handle].link); k != nil && k.info.peer {
		return k.info.key
	}
	return punch.Key{}
}

// better reports whether a link is a better way to a peer than another: one at which
// the peer is, of those one that is in no node, and then the nearer one. What is in
// nodes may be let down without that being seen.
func (k *relayLink) better(o *relayLink, to punch.Key) bool {
	switch {
	case k.here[to] != o.here[to]:
		return k.here[to]
	case k.info.peer != o.info.peer:
		return o.info.peer
	}
	return k.state.RTT < o.state.RTT
}

// base is the least round trip to a peer over relays that are no nodes; mu is held.
func (l *links) base(p linkPeer) (least time.Duration) {
	for _, k := range l.open {
		ms, listed := tripTo(p.relays, trust.Key(k.info.key))
		if k.info.peer || !k.up() || !listed || k.state.RTT == 0 {
			continue
		}
		if sum := k.state.RTT + time.Duration(ms)*time.Millisecond; least == 0 || sum < least {
			least = sum
		}
	}
	return least
}

// offersNow lists the nodes that relay for others, with how far they are: as far as
// the link to them, or else the direct path or the last link, of which neither is
// measured often.
func (l *links) offersNow(now time.Time) []peerOffer {
	list := l.cfg.offers()
	for i := range list {
		o := &list[i]
		k := o.info.key
		if path, _ := l.cfg.path(k); path.Type != punch.Relayed {
			o.trip = path.RTT
		}
		l.mu.Lock()
		if last := l.trips[k]; last > 0 && (o.trip == 0 || last < o.trip) {
			o.trip = last
		}
		if link := l.open[k]; link != nil && link.up() {
			o.up, o.trip = true, cmp.Or(link.state.RTT, o.trip)
		}
		l.mu.Unlock()
		o.rests = func(peer punch.Key) bool { return l.via.resting(trial{k, peer}, now) }
	}
	return list
}

func (v *peerRelays) resting(t trial, now time.Time) bool {
	return now.Before(v.rests[t].until) || now.Before(v.rests[trial{relay: t.relay}].until)
}

// rest leaves a peer relay alone, each time for twice as long.
func (v *peerRelays) rest(t trial, now time.Time) {
	if v.resting(t, now) {
		return
	}
	pause := min(max(2*v.rests[t].pause, peerRest), maxPeerRest)
	v.rests[t] = rest{now.Add(pause), pause}
}

// settlePeers makes what was chosen the peer relays to keep a link to; mu is held.
func (l *links) settlePeers(offers []peerOffer, chosen []peerChoice, now time.Time) {
	v := &l.via
	maps.DeleteFunc(v.rests, func(_ trial, r rest) bool { return now.Sub(r.until) >= maxPeerRest })
	known := map[punch.Key]relayInfo{}
	for _, o := range offers {
		known[o.info.key] = o.info
	}
	tries := map[trial]time.Time{}
	clear(v.wanted)
	for _, c := range chosen {
		t := trial{c.relay, c.peer}
		since, tried := v.tries[t]
		if !tried {
			since = now
		}
		if l.inVain(c, since, now) {
			continue
		}
		tries[t], v.wanted[c.relay], v.infos[c.relay] = since, true, known[c.relay]
		delete(v.left, c.relay)
	}
	v.tries = tries
	for k := range v.infos {
		info, offered := known[k]
		if _, noted := v.left[k]; !v.wanted[k] && !noted {
			v.left[k] = now
		}
		if !offered || !v.wanted[k] && (now.Sub(v.left[k]) >= peerLinger || l.open[k].silent(now)) {
			delete(v.infos, k)
			delete(v.left, k)
			continue
		}
		v.infos[k] = info
	}
	l.collectAddrs()
}

// silent says that a link, if there is one, has long been without an answer.
func (k *relayLink) silent(now time.Time) bool {
	return k != nil && !k.up() && now.Sub(k.began) >= giveUpRelay
}

// inVain notes a peer relay that does not answer, or over which the peer is not
// reached since it was first tried, and reports that; mu is held.
func (l *links) inVain(c peerChoice, since, now time.Time) bool {
	k := l.open[c.relay]
	switch {
	case k == nil:
	case k.silent(now):
		l.via.rest(trial{relay: c.relay}, now)
		return true
	case k.up() && !k.here[c.peer] && now.Sub(since) >= peerTrial:
		l.via.rest(trial{c.relay, c.peer}, now)
		return true
	}
	return false
}

// offers lists the nodes that relay for others.
func (s *session) offers() []peerOffer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []peerOffer
	for _, m := range s.roster.members {
		if m.peer() && m.record.RelayPort != 0 {
			info := m.peerRelayInfo(s.mesh)
			info.addrs = slices.DeleteFunc(info.addrs, s.atServer)
			list = append(list, peerOffer{info: info, trips: m.record.Relays})
		}
	}
	return list
}

// atServer says whether an address is the host of the server, at any port: a node there
// is no nearer than the server's relay.
func (s *session) atServer(a netip.AddrPort) bool {
	servers := s.servers.Load()
	if servers == nil {
		return false
	}
	for at := range *servers {
		if at.Addr().Unmap() == a.Addr() {
			return true
		}
	}
	return false
}

// peerRelayInfo is a node as the relay that it says it is: on addresses that it
// published, of which it may have made up those of IPv6. A port that a router maps is
// tried on all of them, because the record does not tell on which one that is.
func (m *member) peerRelayInfo(mesh []netip.Prefix) relayInfo {
	info := relayInfo{key: punch.Key(m.cert.WireGuard), name: m.cert.Name, online: m.node.Online, peer: true}
	for _, e := range m.record.Candidates {
		a := netip.AddrPortFrom(e.Addr.Addr(), m.record.RelayPort)
		if len(info.addrs) < maxPeerAddrs && outside(a.Addr(), mesh) && punch.Routed(a.Addr()) && !slices.Contains(info.addrs, a) {
			info.addrs = append(info.addrs, a)
		}
	}
	return info
}

// pathTo tells the path to a peer, and how many packets went each way.
func (s *session) pathTo(k punch.Key) (punch.Path, punch.Activity) {
	path, _ := s.agent.Path(k)
	return path, s.activity(k)
}
