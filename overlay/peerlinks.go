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
)

// usage is what was seen of a peer that is reached over a relay.
type usage struct {
	packets uint64
	since   time.Time // reached over a relay
	used    time.Time // zero: not while it was looked at
}

// trial is a peer relay and the peer it was tried for; the zero peer is anybody.
type trial struct{ relay, peer punch.Key }

// peerRelays is what the links know of peer relays. All is guarded by the mutex of
// links.
type peerRelays struct {
	infos  map[punch.Key]relayInfo // to keep a link to
	wanted map[punch.Key]bool      // of them
	left   map[punch.Key]time.Time // of the others, since when they are not
	tries  map[trial]time.Time     // since when, of those that are wanted
	rests  map[trial]time.Time     // until then
	usage  map[punch.Key]usage     // of peers over relays
	next   time.Time               // not looked before
}

func newPeerRelays() peerRelays {
	return peerRelays{
		infos: map[punch.Key]relayInfo{}, wanted: map[punch.Key]bool{}, left: map[punch.Key]time.Time{},
		tries: map[trial]time.Time{}, rests: map[trial]time.Time{}, usage: map[punch.Key]usage{},
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
	online := make([]linkPeer, 0, len(l.peers))
	for _, p := range l.peers {
		if p.online {
			online = append(online, p)
		}
	}
	l.mu.Unlock()
	seen := map[punch.Key]usage{}
	var far []farPeer
	for _, p := range online {
		path, packets := l.cfg.path(p.key)
		if _, tcp := l.direct(path.Addr); path.Type != punch.Relayed || tcp {
			continue
		}
		l.mu.Lock()
		u := l.via.usage[p.key].after(packets, now)
		f := farPeer{key: p.key, trips: p.relays, base: l.base(p)}
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

// after takes a new count of packets into account.
func (u usage) after(packets uint64, now time.Time) usage {
	switch {
	case u.since.IsZero():
		u.since = now
	case packets != u.packets:
		u.used = now
	}
	u.packets = packets
	return u
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
	return now.Before(v.rests[t]) || now.Before(v.rests[trial{relay: t.relay}])
}

// settlePeers makes what was chosen the peer relays to keep a link to; mu is held.
func (l *links) settlePeers(offers []peerOffer, chosen []peerChoice, now time.Time) {
	v := &l.via
	maps.DeleteFunc(v.rests, func(_ trial, until time.Time) bool { return !now.Before(until) })
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
		if !offered || !v.wanted[k] && now.Sub(v.left[k]) >= peerLinger {
			delete(v.infos, k)
			delete(v.left, k)
			continue
		}
		v.infos[k] = info
	}
	l.collectAddrs()
}

// inVain notes a peer relay that does not answer, or over which the peer is not
// reached since it was first tried, and reports that; mu is held.
func (l *links) inVain(c peerChoice, since, now time.Time) bool {
	k := l.open[c.relay]
	switch {
	case k == nil:
	case !k.up() && now.Sub(k.began) >= giveUpRelay:
		l.via.rests[trial{relay: c.relay}] = now.Add(peerRest)
		return true
	case k.up() && !k.here[c.peer] && now.Sub(since) >= peerTrial:
		l.via.rests[trial{c.relay, c.peer}] = now.Add(peerRest)
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
			list = append(list, peerOffer{info: m.peerRelayInfo(s.mesh), trips: m.record.Relays})
		}
	}
	return list
}

// peerRelayInfo is a node as the relay that it says it is: on addresses of its own
// that the server has seen.
func (m *member) peerRelayInfo(mesh []netip.Prefix) relayInfo {
	info := relayInfo{key: punch.Key(m.cert.WireGuard), name: m.cert.Name, online: m.node.Online, peer: true}
	for _, e := range m.record.Candidates {
		a := netip.AddrPortFrom(e.Addr.Addr(), m.record.RelayPort)
		if len(info.addrs) < maxPeerAddrs && outside(a.Addr(), mesh) && internet(a.Addr()) && !slices.Contains(info.addrs, a) {
			info.addrs = append(info.addrs, a)
		}
	}
	return info
}

// pathTo tells the path to a peer, and how many packets went either way.
func (s *session) pathTo(k punch.Key) (punch.Path, uint64) {
	path, _ := s.agent.Path(k)
	a := s.activity(k)
	return path, a.Sent + a.Received
}
