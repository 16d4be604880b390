package overlay

import (
	"cmp"
	"slices"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
)

const (
	// maxPeerLinks is how many peer relays a node keeps a link to, of all its links,
	// and peerTries how many it tries for one peer that is at none of them yet.
	maxPeerLinks = 3
	peerTries    = 2
	// farRelay is the round trip over a relay from which on another is looked for
	// among the nodes, and farAfter how long a peer in use has to be so far away:
	// until then a direct path may be found.
	farRelay = 30 * time.Millisecond
	farAfter = 5 * time.Second
	// peerIdle is how long after its last packet a peer is in use, and peerLinger how
	// long a link that nobody uses stays, for what is still on its way.
	peerIdle   = time.Minute
	peerLinger = 30 * time.Second
	// peerTrial is how long a peer may take to come to a peer relay, and peerRest how
	// long one that was tried in vain is left alone at first. That doubles each time,
	// and is forgotten when it is not for maxPeerRest.
	peerTrial   = 20 * time.Second
	peerRest    = 2 * time.Minute
	maxPeerRest = time.Hour
)

// farPeer is a peer in use that is reached over a relay.
type farPeer struct {
	key    punch.Key
	online bool              // says the server; if not, it may only have lost the server
	trips  []trust.RelayTrip // as it published them
	base   time.Duration     // round trip over the best relay that is no node; 0: there is none
}

// peerOffer is a node that relays for others.
type peerOffer struct {
	info  relayInfo
	trips []trust.RelayTrip // as it published them
	trip  time.Duration     // our round trip to it; 0: unknown
	up    bool              // there is a link that carries
	rests func(peer punch.Key) bool
}

// estimate tells how long a round trip to a peer over a node is at the least, and
// whether that is because the peer says that it is there.
func (o *peerOffer) estimate(p *farPeer) (trip time.Duration, there bool) {
	own := o.trip
	if own == 0 {
		own = p.base / 2 // worth a try
	}
	if ms, listed := tripTo(p.trips, trust.Key(o.info.key)); listed {
		return own + time.Duration(ms)*time.Millisecond, true
	}
	return own + apart(p.trips, o.trips), false
}

// apart is how far two nodes are from each other at the least, by their trips to the
// relays that both know.
func apart(a, b []trust.RelayTrip) (least time.Duration) {
	for _, t := range a {
		if ms, ok := tripTo(b, t.Relay); ok {
			least = max(least, (time.Duration(t.Trip)-time.Duration(ms)).Abs()*time.Millisecond)
		}
	}
	return least
}

// peerChoice is a peer relay that is worth a link for a peer.
type peerChoice struct {
	relay, peer punch.Key
	there       bool          // the peer says that it is there
	saves       time.Duration // of the round trip
}

// choosePeerRelays tells which peer relays are worth a link, and for whom: those
// where a peer that is far away over all other relays is already, and the nearest
// ones for it to come to. Both sides do so; what one tries the other hears of by its
// record, so that of all these they use the one with the least sum of trips. A node
// is no way to itself.
func choosePeerRelays(peers []farPeer, offers []peerOffer) []peerChoice {
	var all []peerChoice
	for _, p := range peers {
		all = append(all, p.choices(offers)...)
	}
	slices.SortFunc(all, func(a, b peerChoice) int {
		return cmp.Or(-compareBool(a.there, b.there), -cmp.Compare(a.saves, b.saves), slices.Compare(a.relay[:], b.relay[:]))
	})
	var use []punch.Key
	return slices.DeleteFunc(all, func(c peerChoice) bool {
		if !slices.Contains(use, c.relay) && len(use) < maxPeerLinks {
			use = append(use, c.relay)
		}
		return !slices.Contains(use, c.relay)
	})
}

// choices are the peer relays worth a link for one peer. One in use is, as long as
// it is nearer at all, or there is no other relay.
func (p *farPeer) choices(offers []peerOffer) []peerChoice {
	var list []peerChoice
	for i := range offers {
		o := &offers[i]
		if o.info.key == p.key || !o.info.online && !o.up || len(o.info.addrs) == 0 || o.rests(p.key) {
			continue
		}
		trip, there := o.estimate(p)
		used := there && o.up && (p.base == 0 || trip < p.base)
		if used || p.online && p.base >= farRelay && nearer(trip, p.base) {
			list = append(list, peerChoice{o.info.key, p.key, there, p.base - trip})
		}
	}
	slices.SortFunc(list, func(a, b peerChoice) int {
		return cmp.Or(-cmp.Compare(a.saves, b.saves), slices.Compare(a.relay[:], b.relay[:]))
	})
	tries := 0
	return slices.DeleteFunc(list, func(c peerChoice) bool {
		if !c.there {
			tries++
		}
		return !c.there && tries > peerTries
	})
}
