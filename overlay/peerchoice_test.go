package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// tripsAt are trips of given lengths.
func tripsAt(trips map[byte]uint16) (list []trust.RelayTrip) {
	for k, ms := range trips {
		list = append(list, trust.RelayTrip{Relay: trust.Key(relayKey(k)), Trip: ms})
	}
	return list
}

func TestChoosePeerRelays(t *testing.T) {
	never := func(punch.Key) bool { return false }
	offer := func(n byte, trip time.Duration) peerOffer {
		info := relayInfo{key: relayKey(n), online: true, peer: true, addrs: []netip.AddrPort{relayAddr("x")}}
		return peerOffer{info: info, trip: trip, rests: never}
	}
	with := func(o peerOffer, change func(*peerOffer)) peerOffer { change(&o); return o }
	far := func(n byte, base time.Duration, trips map[byte]uint16) farPeer {
		return farPeer{key: relayKey(n), online: true, base: base, trips: tripsAt(trips)}
	}
	alone := far(1, 200*ms, nil)
	for name, x := range map[string]struct {
		peers  []farPeer
		offers []peerOffer
		want   string // peer by relay, the best first
	}{
		"none offers":               {[]farPeer{alone}, nil, ""},
		"nobody is far":             {nil, []peerOffer{offer(5, ms)}, ""},
		"the nearest two are tried": {[]farPeer{alone}, []peerOffer{offer(5, 30*ms), offer(6, 10*ms), offer(7, 20*ms)}, "1 by 6, 1 by 7"},
		"not by the peer itself":    {[]farPeer{alone}, []peerOffer{offer(1, ms)}, ""},
		"not one that is far, too":  {[]farPeer{alone}, []peerOffer{offer(5, 170*ms)}, ""},
		"not with a near relay":     {[]farPeer{far(1, 29*ms, nil)}, []peerOffer{offer(5, ms)}, ""},
		"unknown ones are tried":    {[]farPeer{alone}, []peerOffer{offer(5, 0)}, "1 by 5"},
		"not an offline one":        {[]farPeer{alone}, []peerOffer{with(offer(5, ms), func(o *peerOffer) { o.info.online = false })}, ""},
		"an offline one that is up": {[]farPeer{alone}, []peerOffer{with(offer(5, ms), func(o *peerOffer) { o.info.online, o.up = false, true })}, "1 by 5"},
		"not without an address":    {[]farPeer{alone}, []peerOffer{with(offer(5, ms), func(o *peerOffer) { o.info.addrs = nil })}, ""},
		"not one that rests":        {[]farPeer{alone}, []peerOffer{with(offer(5, ms), func(o *peerOffer) { o.rests = func(p punch.Key) bool { return p == relayKey(1) } })}, ""},
		"where the peer is, first": {
			[]farPeer{far(1, 200*ms, map[byte]uint16{7: 40})},
			[]peerOffer{offer(5, 10*ms), offer(6, 11*ms), offer(7, 50*ms)},
			"1 by 7, 1 by 5, 1 by 6",
		},
		"the least sum": {
			[]farPeer{far(1, 200*ms, map[byte]uint16{6: 90, 7: 20})},
			[]peerOffer{offer(6, 10*ms), offer(7, 50*ms)},
			"1 by 7, 1 by 6",
		},
		"not where the sum is no less": {[]farPeer{far(1, 200*ms, map[byte]uint16{7: 190})}, []peerOffer{offer(7, 5*ms)}, ""},
		"one in use, while it is less": {
			[]farPeer{far(1, 200*ms, map[byte]uint16{7: 190})},
			[]peerOffer{with(offer(7, 5*ms), func(o *peerOffer) { o.up = true })},
			"1 by 7",
		},
		"not one that must be far from the peer": {
			[]farPeer{far(1, 200*ms, map[byte]uint16{9: 180})},
			[]peerOffer{with(offer(5, 10*ms), func(o *peerOffer) { o.trips = tripsAt(map[byte]uint16{9: 5}) })},
			"",
		},
		"at most three": {
			[]farPeer{far(1, 200*ms, map[byte]uint16{5: 10, 6: 20, 7: 30, 8: 40})},
			[]peerOffer{offer(5, ms), offer(6, ms), offer(7, ms), offer(8, ms)},
			"1 by 5, 1 by 6, 1 by 7",
		},
		"one for two peers": {[]farPeer{alone, far(2, 100*ms, nil)}, []peerOffer{offer(5, 10*ms)}, "1 by 5, 2 by 5"},
	} {
		var list []string
		for _, c := range choosePeerRelays(x.peers, x.offers) {
			list = append(list, fmt.Sprintf("%d by %d", c.peer[0], c.relay[0]))
		}
		got := strings.Join(list, ", ")
		if got != x.want {
			t.Errorf("%s: %q, want %q", name, got, x.want)
		}
	}
}

// peerWorld is a linksWorld with a peer that is reached over the server's relay, and
// a node near both that relays.
type peerWorld struct {
	*linksWorld
	bob     linkPeer
	carrier relayInfo
	packets punch.Activity
	mute    bool                // nothing comes from bob
	link    uint16              // of the path to bob
	typ     punch.CandidateType // of the path to bob
	offered bool
	asked   int
}

const carrierName = "carol7"

func newPeerWorld(t *testing.T) *peerWorld {
	w := &peerWorld{typ: punch.Relayed, link: 1, offered: true}
	w.linksWorld = newLinksWorldWith(t, func(c *linksConfig) { c.offers, c.path = w.offers, w.path })
	w.bob = linkPeer{key: punch.Key{1}, online: true, relays: tripsAt(map[byte]uint16{'0': 100})}
	w.carrier = standalone(carrierName)[0]
	w.carrier.peer = true
	w.members(nil, w.bob)
	w.server()
	w.up("server0", 100*ms)
	w.arrive("server0")
	return w
}

func (w *peerWorld) offers() (list []peerOffer) {
	w.note(func() {
		w.asked++
		if w.offered {
			list = []peerOffer{{info: w.carrier}}
		}
	})
	return list
}

func (w *peerWorld) path(k punch.Key) (p punch.Path, packets punch.Activity) {
	w.note(func() {
		p, packets = punch.Path{Addr: handle(w.bob.key, w.link), Type: w.typ}, w.packets
		if k == w.carrier.key {
			p = punch.Path{Addr: relayAddr("direct9"), Type: punch.Host, RTT: 10 * ms}
		}
	})
	return p, packets
}

// talk lets time pass in which packets go to and from bob.
func (w *peerWorld) talk(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(time.Second)
		w.note(func() {
			w.packets.Sent++
			if !w.mute {
				w.packets.Received++
			}
		})
	}
	synctest.Wait()
}

func (w *peerWorld) arrive(name string) {
	w.links.onPeer(w.fake(name).link, w.bob.key, true)
	synctest.Wait()
}

// says has bob publish the trips to relays.
func (w *peerWorld) says(trips map[byte]uint16) {
	w.bob.relays = tripsAt(trips)
	w.members(nil, w.bob)
	time.Sleep(surveyGap)
	synctest.Wait()
}

func (w *peerWorld) linked() bool {
	f := w.fake(carrierName)
	return f != nil && !f.over()
}

func (w *peerWorld) names() bool {
	_, ok := tripTo(w.links.record(), trust.Key(w.carrier.key))
	return ok
}

func TestPeerRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		w.talk(3 * time.Second)
		if w.linked() {
			t.Fatal("a node relays although a direct path may be found yet")
		}
		w.talk(4 * time.Second)
		if !w.linked() {
			t.Fatal("no node is tried")
		}
		w.up(carrierName, 12*ms)
		if !w.names() || w.links.record()[0].Relay != trust.Key(relayKey('0')) {
			t.Fatalf("published %v, want the server's as home and the node", w.links.record())
		}
		if f := w.fake(carrierName); len(f.flows()) > 0 {
			t.Fatalf("asked for %v before anybody says to be there", f.flows())
		}
		server := punch.Relay{Addr: handle(w.bob.key, 1), Here: true, RTT: 200 * ms}
		w.wantRelays(w.bob.key, server)
		w.says(map[byte]uint16{'0': 100, '7': 8})
		w.wantRelays(w.bob.key, server)
		w.arrive(carrierName)
		w.wantRelays(w.bob.key, server, punch.Relay{Addr: handle(w.bob.key, 2), Here: true, RTT: 20 * ms})
		if got := w.links.describe(handle(w.bob.key, 2)); got != "relay carol7 (peer, udp)" {
			t.Errorf("described as %q", got)
		}
		w.talk(5 * time.Minute)
		if !w.linked() || !w.names() {
			t.Fatal("given up in use")
		}
		// A direct path: the other side is told first.
		w.note(func() { w.typ = punch.ServerReflexive })
		w.talk(peerLinger / 2)
		if !w.linked() || w.names() {
			t.Fatalf("linked %v, named %v right after a direct path was found", w.linked(), w.names())
		}
		w.talk(peerLinger)
		if w.linked() {
			t.Fatal("a link that nobody uses stays")
		}
		w.wantRelays(w.bob.key, server)
	})
}

// A relay in use stays: when the server's relay dies it is the only way, and what is
// said of the peer after a start of the server, or of the way over the server, may
// change at any time.
func TestPeerRelayStays(t *testing.T) {
	for name, change := range map[string]func(*peerWorld){
		"without the server's relay": func(w *peerWorld) { w.state("server0", relay.State{}) },
		"bob is offline for a while": func(w *peerWorld) {
			w.members(nil, linkPeer{key: w.bob.key, relays: w.bob.relays})
			w.talk(2 * linkTick)
			w.members(nil, w.bob)
		},
		"the server comes nearer": func(w *peerWorld) { w.up("server0", 15*ms); w.says(map[byte]uint16{'0': 14, '7': 8}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newPeerWorld(t)
				defer w.end()
				w.talk(farAfter + linkTick)
				w.up(carrierName, 12*ms)
				w.says(map[byte]uint16{'0': 100, '7': 8})
				w.arrive(carrierName)
				w.note(func() { w.link = 2 })
				w.talk(time.Minute)
				if !w.linked() || !w.names() {
					t.Fatal("not in use")
				}
				change(w)
				for range 120 {
					if !w.linked() || !w.names() {
						t.Fatalf("linked %v, named %v", w.linked(), w.names())
					}
					w.talk(time.Second)
				}
			})
		})
	}
}

// What is of no use is not even asked for.
func TestPeerRelayNotWanted(t *testing.T) {
	for name, change := range map[string]func(*peerWorld){
		"direct":      func(w *peerWorld) { w.note(func() { w.typ = punch.Host }) },
		"near server": func(w *peerWorld) { w.up("server0", 5*ms); w.says(map[byte]uint16{'0': 5}) },
		"not offered": func(w *peerWorld) { w.note(func() { w.offered = false }) },
		"bob himself": func(w *peerWorld) { w.note(func() { w.carrier.key = w.bob.key }) },
		"without UDP": func(w *peerWorld) { w.state("server0", relay.State{Transport: relay.TLS, RTT: 100 * ms}) },
		"offline":     func(w *peerWorld) { w.note(func() { w.bob.online = false }); w.says(map[byte]uint16{'0': 100}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newPeerWorld(t)
				defer w.end()
				w.note(func() { w.typ = punch.Relayed })
				change(w)
				w.talk(time.Minute)
				if w.fake(carrierName) != nil {
					t.Error("a node was tried")
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) { // a silent pair
		w := newPeerWorld(t)
		defer w.end()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if w.fake(carrierName) != nil || w.asked > 0 {
			t.Error("a node was tried for nobody")
		}
	})
}

// One that does not answer, or to which the peer does not come, is left alone for a
// while, and tried again.
func TestPeerRelayInVain(t *testing.T) {
	for name, up := range map[string]bool{"silent": false, "the peer does not come": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newPeerWorld(t)
				defer w.end()
				w.talk(7 * time.Second)
				if !w.linked() {
					t.Fatal("not tried")
				}
				if up {
					w.up(carrierName, 12*ms)
				}
				w.talk(peerTrial + peerLinger + linkTick)
				if w.linked() || w.names() {
					t.Fatal("tried on and on")
				}
				for start := time.Now(); !w.linked(); w.talk(time.Second) {
					if time.Since(start) > peerRest {
						t.Fatal("not tried again")
					}
				}
			})
		})
	}
}

// When it dies the pair has the server's relay at once.
func TestPeerRelayDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		w.talk(7 * time.Second)
		w.up(carrierName, 12*ms)
		w.says(map[byte]uint16{'0': 100, '7': 8})
		w.arrive(carrierName)
		w.state(carrierName, relay.State{})
		w.wantRelays(w.bob.key, punch.Relay{Addr: handle(w.bob.key, 1), Here: true, RTT: 200 * ms})
		if home := w.links.record()[0].Relay; home != trust.Key(relayKey('0')) {
			t.Errorf("home %v", home)
		}
	})
}

func TestPeerRelayInfo(t *testing.T) {
	mesh := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
	m := member{record: trust.Record{RelayPort: 7777}}
	for _, a := range []string{"192.0.2.1:1", "192.0.2.1:2", "203.0.113.9:3", "127.0.0.1:4", "10.0.0.1:5", "100.64.0.1:6", "[2001:db8::1]:7", "[fe80::1]:8", "198.51.100.1:9", "198.51.100.2:9", "198.51.100.3:9"} {
		m.record.Candidates = append(m.record.Candidates, trust.Endpoint{Addr: netip.MustParseAddrPort(a), Type: 2})
	}
	var want []netip.AddrPort
	for _, a := range []string{"192.0.2.1:7777", "[2001:db8::1]:7777", "198.51.100.1:7777", "198.51.100.2:7777"} {
		want = append(want, netip.MustParseAddrPort(a))
	}
	if got := m.peerRelayInfo(mesh); !slices.Equal(got.addrs, want) || !got.peer {
		t.Errorf("%+v, want addresses %v", got, want)
	}
}
