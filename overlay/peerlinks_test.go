package overlay

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// Where a node says that it sees us is no reason to try all paths anew; where other
// relays do is one.
func TestPeerRelayTellsOfNoMapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		mapped := 0
		w.links.cfg.mapped = func() { mapped++ }
		w.talk(farAfter + linkTick)
		for _, x := range []struct {
			name string
			want int
		}{{carrierName, 0}, {"server0", 1}} {
			for _, at := range []string{"198.51.100.1:7", "198.51.100.1:8"} {
				w.state(x.name, relay.State{Transport: relay.UDP, Addr: relayAddr(x.name), RTT: 9 * ms, Observed: netip.MustParseAddrPort(at)})
			}
			if mapped != x.want {
				t.Errorf("%s: mapped anew %d times, want %d", x.name, mapped, x.want)
			}
		}
	})
}

// A node where two meet is no relay that they share: they go on to look for one.
func TestPeerRelayIsNotShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		w.talk(farAfter + linkTick)
		w.up(carrierName, 12*ms)
		dora := linkPeer{key: punch.Key{2}, online: true, relays: tripsAt(map[byte]uint16{'7': 8})}
		w.members(nil, w.bob, dora)
		w.wantRelays(dora.key, punch.Relay{Addr: handle(dora.key, 1)})
		w.links.mu.Lock()
		defer w.links.mu.Unlock()
		if w.links.shares(dora) {
			t.Error("shared")
		}
	})
}

// meet waits until the node is tried, and has both go over it.
func (w *peerWorld) meet(most time.Duration) {
	w.t.Helper()
	w.awaitLink(most)
	w.up(carrierName, 12*ms)
	w.says(map[byte]uint16{'0': 100, '7': 8})
	w.arrive(carrierName)
	w.note(func() { w.link = 2 })
}

func (w *peerWorld) awaitLink(most time.Duration) {
	w.t.Helper()
	for start := time.Now(); !w.linked(); w.talk(time.Second) {
		if time.Since(start) > most {
			w.t.Fatalf("not tried within %v", most)
		}
	}
}

// A node that passes checks but no packets loses the pair, for longer each time.
func TestPeerRelayMute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		server := punch.Relay{Addr: handle(w.bob.key, 1), Here: true, RTT: 200 * ms}
		carrier := punch.Relay{Addr: handle(w.bob.key, 2), Here: true, RTT: 20 * ms}
		most, left := farAfter+linkTick, time.Now()
		for i, pause := range []time.Duration{peerRest, 2 * peerRest, 4 * peerRest} {
			w.meet(most + linkTick)
			if waited := time.Since(left); i > 0 && waited < most-2*linkTick {
				t.Errorf("tried again after %v, want about %v", waited, most)
			}
			w.talk(time.Minute)
			time.Sleep(time.Minute) // nobody says anything
			w.talk(2 * time.Second)
			w.wantRelays(w.bob.key, server, carrier)
			w.note(func() { w.mute = true })
			w.talk(muteFor - time.Second)
			w.wantRelays(w.bob.key, server, carrier)
			w.talk(2*linkTick + 2*time.Second)
			w.wantRelays(w.bob.key, server)
			left = time.Now()
			if w.names() || len(w.fake(carrierName).flows()) > 0 {
				t.Error("still published or asked for the peer")
			}
			w.note(func() { w.link = 1 })
			w.talk(time.Minute) // one way over the server costs nothing
			w.wantRelays(w.bob.key, server)
			w.note(func() { w.mute = false })
			most = pause
		}
	})
}

// Signals do not depend on a node as long as another relay has the peer.
func TestSignalsAvoidPeerRelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		w.meet(farAfter + linkTick)
		for _, step := range []struct {
			server bool
			link   uint16
		}{{true, 1}, {false, 2}} {
			w.links.onPeer(w.fake("server0").link, w.bob.key, step.server)
			w.links.mu.Lock()
			got, here := w.links.bestHandle(w.bob.key)
			w.links.mu.Unlock()
			if got != handle(w.bob.key, step.link) || !here {
				t.Errorf("at the server %v: %v, %v; want link %d", step.server, got, here, step.link)
			}
		}
	})
}

// What a silent node names may be others' addresses.
func TestSilentPeerRelayIsLeftAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		most := farAfter + linkTick
		for _, pause := range []time.Duration{peerRest, 2 * peerRest, 4 * peerRest} {
			w.awaitLink(most)
			w.talk(giveUpRelay + linkTick)
			if w.linked() {
				t.Fatal("a link to nowhere stays")
			}
			w.talk(pause - 2*linkTick)
			if w.linked() {
				t.Fatalf("tried again within %v", pause)
			}
			most = 3 * linkTick
		}
	})
}

// A member does not have others ask the server's host for a relay of its own.
func TestOffersSpareTheServer(t *testing.T) {
	m := newTestMesh(t)
	bob := m.node("bob", m.signer)
	rec := trust.Record{Device: bob.cert.Device, Serial: 5, RelayPort: 53}
	for _, a := range []string{"192.0.2.1:9", "198.51.100.1:9"} {
		rec.Candidates = append(rec.Candidates, trust.Endpoint{Addr: netip.MustParseAddrPort(a), Type: uint8(punch.Host)})
	}
	bob.node.Record = must[trust.Document](t)(trust.SignRecord(rec, bob.device))
	s := &session{roster: m.roster(m.node("alice", m.signer))}
	s.roster.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, true)
	if list := s.offers(); len(list) != 1 || len(list[0].info.addrs) != 2 {
		t.Fatalf("offers %+v", list)
	}
	s.servers.Store(&map[netip.AddrPort]bool{netip.MustParseAddrPort("192.0.2.1:443"): true})
	if list := s.offers(); len(list) != 1 || len(list[0].info.addrs) != 1 || list[0].info.addrs[0] != netip.MustParseAddrPort("198.51.100.1:53") {
		t.Errorf("offers %+v", list)
	}
}

func TestStatusTellsOfPeerRelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPeerWorld(t)
		defer w.end()
		w.meet(farAfter + linkTick)
		s := &session{links: w.links}
		for link, want := range map[uint16]string{1: "relay-udp", 2: "peer-relay"} {
			if got := s.route(punch.Path{Type: punch.Relayed, Addr: handle(w.bob.key, link)}, false).Via; got != want {
				t.Errorf("via %q, want %q", got, want)
			}
		}
	})
}
