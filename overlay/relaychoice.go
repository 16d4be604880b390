package overlay

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
)

const (
	// maxLinks is how many relays a node keeps a link to, and nearestRelays how
	// many of them are standalone ones chosen for their distance alone.
	maxLinks      = 8
	nearestRelays = 3
	// giveUpRelay is how long a relay may be silent before another one is tried
	// in its place.
	giveUpRelay = 5 * time.Second
	// A relay takes over from one in use when it is 20 % and relayGain nearer.
	relayGain = 5 * time.Millisecond
	// homeSamples is in how many measurements it has to be; homeSettle how long
	// after a start or a change of the network the nearest one wins at once.
	homeSamples = 3
	homeSettle  = 2 * time.Second
)

// nearer reports whether a trip is so much shorter than another that a change
// is worth it.
func nearer(a, b time.Duration) bool { return a*5 < b*4 && a+relayGain < b }

// candidate is a relay as the choice of the links sees it.
type candidate struct {
	key    punch.Key
	own    bool          // in the own server
	online bool          // as far as the server knows
	linked bool          // there is a link, up or not
	up     bool          // the link carries
	failed bool          // the link has been silent for long, or cannot be made
	trip   time.Duration // round trip when it was measured last; 0: never
	home   bool          // a wanted peer is to be reached there
	peer   bool          // in a node, and worth a link
}

// class orders relays: those that are sure to be of use first.
func (c candidate) class() int {
	switch {
	case c.own:
		return 0
	case c.failed || !c.online && !c.linked:
		return 3
	case c.trip > 0:
		return 1
	}
	return 2
}

// weight is the trip by which relays are compared; one in use stays unless
// another is clearly nearer.
func (c candidate) weight() time.Duration {
	if c.linked {
		return max(0, min(c.trip*4/5, c.trip-relayGain))
	}
	return c.trip
}

// chooseRelays tells which relays to keep a link to: the own server's, the
// nearest ones, the homes of peers, those in nodes, and as many as there is room
// for of those whose distance is not known yet, or that are silent while too few
// answer. What is up does not end because the server, which may have restarted,
// says that the relay is offline.
func chooseRelays(all []candidate) []punch.Key {
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.class(), b.class()), cmp.Compare(a.weight(), b.weight()), slices.Compare(a.key[:], b.key[:]))
	})
	var use []punch.Key
	peers := false
	pick := func(keep func(candidate) bool) {
		for _, c := range all {
			if len(use) < maxLinks && c.peer == peers && keep(c) && !slices.Contains(use, c.key) {
				use = append(use, c.key)
			}
		}
	}
	pick(func(c candidate) bool { return c.own })
	near, up := 0, 0
	pick(func(c candidate) bool {
		if c.class() != 1 || near == nearestRelays {
			return false
		}
		near++
		if c.up {
			up++
		}
		return true
	})
	pick(func(c candidate) bool { return c.up && !c.online })
	pick(func(c candidate) bool { return c.home })
	peers = true
	pick(func(candidate) bool { return true })
	peers = false
	pick(func(c candidate) bool { return c.class() == 2 })
	pick(func(c candidate) bool {
		return c.class() == 3 && (near < nearestRelays || c.linked && up < nearestRelays)
	})
	return use
}

// home is the relay at which this node is to be reached first. The zero value
// has none yet.
type home struct {
	key    punch.Key
	chosen bool
	free   time.Time // until then the nearest one wins at once
	better map[punch.Key]int
}

// settle lets the nearest relay win at once for a moment.
func (h *home) settle(now time.Time) { h.free = now.Add(homeSettle) }

// measured takes in a new measurement of the relay k, or that it is down; up are
// the trips to all relays that are up. It reports whether the home is another
// one now.
func (h *home) measured(k punch.Key, up map[punch.Key]time.Duration, now time.Time) bool {
	best, any := nearestOf(up)
	if !any {
		return false // the last one, until there is another
	}
	current, alive := up[h.key]
	switch {
	case !h.chosen || !alive, now.Before(h.free) && up[best] < current:
		return h.move(best)
	case k == h.key || up[k] == 0:
		return false
	case !nearer(up[k], current):
		delete(h.better, k)
		return false
	}
	if h.better == nil {
		h.better = map[punch.Key]int{}
	}
	if h.better[k]++; h.better[k] < homeSamples {
		return false
	}
	return h.move(k)
}

func (h *home) move(to punch.Key) bool {
	moved := !h.chosen || h.key != to
	h.key, h.chosen = to, true
	clear(h.better)
	return moved
}

func nearestOf(up map[punch.Key]time.Duration) (best punch.Key, ok bool) {
	for k, trip := range up {
		if !ok || trip < up[best] || trip == up[best] && slices.Compare(k[:], best[:]) < 0 {
			best, ok = k, true
		}
	}
	return best, ok
}

// tripList is what the record says of the relays that are up: the home first,
// then by distance.
func tripList(home punch.Key, up map[punch.Key]time.Duration) []trust.RelayTrip {
	keys := slices.SortedFunc(maps.Keys(up), func(a, b punch.Key) int {
		return cmp.Or(-compareBool(a == home, b == home), cmp.Compare(up[a], up[b]), slices.Compare(a[:], b[:]))
	})
	list := make([]trust.RelayTrip, 0, maxLinks)
	for _, k := range keys[:min(len(keys), maxLinks)] {
		ms := (up[k] + time.Millisecond - 1) / time.Millisecond
		list = append(list, trust.RelayTrip{Relay: trust.Key(k), Trip: uint16(max(1, min(ms, 1<<16-1)))})
	}
	return list
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// sameTrips reports whether two lists say the same to those who choose by them:
// the same home, the same relays, at about the same distance.
func sameTrips(a, b []trust.RelayTrip) bool {
	if len(a) != len(b) || len(a) > 0 && a[0].Relay != b[0].Relay {
		return false
	}
	return !slices.ContainsFunc(a, func(x trust.RelayTrip) bool {
		y, ok := tripTo(b, x.Relay)
		if !ok {
			return true
		}
		p, q := time.Duration(x.Trip)*time.Millisecond, time.Duration(y)*time.Millisecond
		return nearer(p, q) || nearer(q, p)
	})
}

func tripTo(list []trust.RelayTrip, k trust.Key) (ms uint16, ok bool) {
	for _, r := range list {
		if r.Relay == k {
			return r.Trip, true
		}
	}
	return 0, false
}

// worth reports whether a peer is to be looked for at a relay: where it says it
// is, unless that is a node to be left alone, and anywhere while none of the relays
// it named is up; its record may be old. Those in nodes do not count: they are more
// than what a pair shares, and never all. mu is held.
func (l *links) worth(k *relayLink, p linkPeer) bool {
	if _, listed := tripTo(p.relays, trust.Key(k.info.key)); listed || k.info.peer {
		return listed && !(k.info.peer && l.via.resting(trial{k.info.key, p.key}, time.Now()))
	}
	return !slices.ContainsFunc(p.relays, func(r trust.RelayTrip) bool {
		other := l.open[punch.Key(r.Relay)]
		return other != nil && !other.info.peer && other.up()
	})
}
