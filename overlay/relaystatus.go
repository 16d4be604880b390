package overlay

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"overlay/punch/relay"
)

// nameFor names a relay; full is with what may name addresses.
func (r relayInfo) nameFor(full bool) string {
	if r.own && !full {
		return "server"
	}
	return r.name
}

// relayed tells which relay a handle leads through, and how that is reached; full
// is with what may name addresses.
func (l *links) relayed(handle netip.AddrPort, full bool) (name string, over relay.Transport) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.byID(l.ways[handle].link); k != nil {
		return k.info.nameFor(full), k.state.Transport
	}
	return "", relay.None
}

// byPeer says whether a handle leads through a node of the mesh.
func (l *links) byPeer(handle netip.AddrPort) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.byID(l.ways[handle].link)
	return k != nil && k.info.peer
}

// describe names a handle for people: "relay NAME (udp)", or "direct tcp".
func (l *links) describe(handle netip.AddrPort) string {
	if _, ok := l.direct(handle); ok {
		return "direct tcp"
	}
	name, over := l.relayed(handle, true)
	switch {
	case name == "":
		return "a relay"
	case over == relay.None:
		return fmt.Sprintf("relay %s (down)", name)
	}
	if l.byPeer(handle) {
		return fmt.Sprintf("relay %s (peer, %s)", name, over)
	}
	return fmt.Sprintf("relay %s (%s)", name, over)
}

// reach sums up how relays are reached.
type reach struct {
	links, udp, tls int
	// mute is since when none answers over UDP; of use while none does.
	mute time.Time
}

// noUDP says that no relay answers over UDP, but one does over TLS.
func (r reach) noUDP() bool { return r.udp == 0 && r.tls > 0 }

// none says that no relay is reached at all.
func (r reach) none() bool { return r.udp+r.tls == 0 }

func (l *links) reach() reach {
	l.mu.Lock()
	defer l.mu.Unlock()
	var r reach
	for _, k := range l.open {
		r.links++
		if k.mute.After(r.mute) {
			r.mute = k.mute
		}
		switch k.state.Transport {
		case relay.UDP:
			r.udp++
		case relay.TLS:
			r.tls++
		}
	}
	return r
}

// status lists the links by number; full is with what may name addresses.
func (l *links) status(full bool) []RelayStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := []RelayStatus{}
	for _, k := range slices.SortedFunc(maps.Values(l.open), func(a, b *relayLink) int { return cmp.Compare(a.id, b.id) }) {
		st := RelayStatus{
			Name: k.info.nameFor(full), Transport: k.state.Transport.String(),
			Home: l.home.chosen && l.home.key == k.info.key, Peer: k.info.peer,
		}
		if k.up() && k.state.RTT > 0 {
			st.RTTms = milliseconds(k.state.RTT)
		}
		if full && k.state.Err != nil {
			st.Trouble = serverError(k.state.Err, "the relay").Error()
		}
		list = append(list, st)
	}
	return list
}
