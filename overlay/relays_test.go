package overlay

import (
	"errors"
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

func TestRelayFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := punch.Key{1}
		w.members(nil, linkPeer{key: bob, online: true})
		w.server()
		w.wantRelays(bob)
		if got := w.fake("server0").flows(); !slices.Equal(got, []punch.Key{bob}) {
			t.Fatalf("flows to %v wanted, not to bob", got)
		}
		w.up("server0", 10*ms)
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, 1)}) // bob named none yet: may be there
		if w.device[1] != relayAddr("server0").String() {
			t.Fatalf("link 1 of the device: %q", w.device[1])
		}
		w.links.onPeer(w.fake("server0").link, bob, true)
		synctest.Wait()
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, 1), Here: true})
		if !slices.Equal(w.arrived, []punch.Key{bob}) {
			t.Fatalf("arrived %v", w.arrived)
		}
		w.members(nil, linkPeer{key: bob, online: true, relays: tripsOf("server0")})
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, 1), Here: true, RTT: 30 * ms})
		w.state("server0", relay.State{Transport: relay.TLS, RTT: 12 * ms, Err: errors.New("no answer")})
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, 1), Here: true, RTT: 32 * ms})
		if w.device[1] != "tls, takes "+relayAddr("server0").String() || !w.links.reach().noUDP() {
			t.Fatalf("link 1 of the device: %q", w.device[1])
		}
		if got := w.links.describe(handle(bob, 1)); got != "relay server0 (tls)" {
			t.Fatalf("described as %q", got)
		}
		w.state("server0", relay.State{})
		w.wantRelays(bob)
		if w.device[1] != "" || !w.links.reach().none() {
			t.Fatalf("link 1 of the device: %q", w.device[1])
		}
	})
}

// A peer that the device does not know yet gets its ways as soon as it does.
func TestWaysWaitForTheDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := punch.Key{1}
		w.server()
		w.up("server0", 10*ms)
		w.links.setMembers(nil, []linkPeer{{key: bob, online: true}})
		synctest.Wait()
		w.wantRelays(bob)
		w.note(func() { w.known[bob] = true })
		time.Sleep(linkTick)
		synctest.Wait()
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, 1)})
	})
}

func TestAnotherRelayTakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true, relays: tripsOf("berlin1", "paris2")}
		w.members(standalone("berlin1", "paris2"), bob)
		w.up("berlin1", 5*ms)
		w.up("paris2", 9*ms)
		ids := map[string]uint16{"berlin1": w.fake("berlin1").link.id, "paris2": w.fake("paris2").link.id}
		both := []punch.Relay{{Addr: handle(bob.key, ids["berlin1"]), RTT: 25 * ms}, {Addr: handle(bob.key, ids["paris2"]), RTT: 29 * ms}}
		slices.SortFunc(both, func(a, b punch.Relay) int { return int(a.Addr.Port()) - int(b.Addr.Port()) })
		w.wantRelays(bob.key, both...)
		if got := w.links.record()[0].Relay; got != trust.Key(relayKey('1')) {
			t.Fatalf("home %v, want berlin1", got)
		}
		w.state("berlin1", relay.State{Err: errors.New("no answer")})
		w.wantRelays(bob.key, punch.Relay{Addr: handle(bob.key, ids["paris2"]), RTT: 29 * ms})
		if got := w.links.record(); len(got) != 1 || got[0].Relay != trust.Key(relayKey('2')) {
			t.Fatalf("published %v, want paris2 only", got)
		}
		time.Sleep(2 * giveUpRelay)
		synctest.Wait()
		if w.fake("berlin1").over() {
			t.Fatal("a silent relay is given up although there are too few")
		}
		w.up("berlin1", 5*ms)
		w.wantRelays(bob.key, both...)
	})
}

// A record that is too old to name the relay where a peer is must not keep the
// peer from being found there.
func TestPeerIsLookedForElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true, relays: tripsOf("berlin1")}
		peers := []linkPeer{bob}
		for i := range byte(askEverywhere) {
			peers = append(peers, linkPeer{key: punch.Key{2, i}})
		}
		w.members(standalone("berlin1", "paris2"), peers...)
		w.up("berlin1", 5*ms)
		w.up("paris2", 9*ms)
		if f := w.fake("paris2"); len(f.flows()) > 0 || len(w.relays[bob.key]) != 1 {
			t.Fatalf("looked for at %v too", f.flows())
		}
		w.state("berlin1", relay.State{})
		if f := w.fake("paris2"); !slices.Equal(f.flows(), []punch.Key{bob.key}) {
			t.Fatalf("paris2 is asked for %v", f.flows())
		}
		w.wantRelays(bob.key, punch.Relay{Addr: handle(bob.key, w.fake("paris2").link.id)})
	})
}

// In a small mesh it is known beforehand at which other relays a peer is.
func TestFewPeersAreLookedForEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true, relays: tripsOf("berlin1")}
		w.members(standalone("berlin1", "paris2"), bob)
		w.up("berlin1", 5*ms)
		w.up("paris2", 9*ms)
		f := w.fake("paris2")
		if !slices.Equal(f.flows(), []punch.Key{bob.key}) || len(w.relays[bob.key]) != 1 {
			t.Fatalf("looked for %v, relays %v", f.flows(), w.relays[bob.key])
		}
		w.links.onPeer(f.link, bob.key, true)
		synctest.Wait()
		if len(w.relays[bob.key]) != 2 {
			t.Fatal("a relay where the peer is cannot be used")
		}
	})
}

// A relay that is used no more and used again keeps its number, and its client
// counts on: relays take old sequences for replays.
func TestLinkNumbersAndBoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		w.members(standalone("a1", "b2"))
		first := w.fake("a1")
		w.members(standalone("b2"))
		if !first.over() {
			t.Fatal("the link to a relay that is gone goes on")
		}
		w.members(standalone("a1", "b2", "c3"))
		again := w.fake("a1")
		if again == first || again.link.id != first.link.id || again.boot <= first.boot {
			t.Fatalf("link %d boot %d after link %d boot %d", again.link.id, again.boot, first.link.id, first.boot)
		}
		ids := []uint16{w.fake("a1").link.id, w.fake("b2").link.id, w.fake("c3").link.id}
		slices.Sort(ids)
		if !slices.Equal(ids, []uint16{1, 2, 3}) {
			t.Fatalf("numbers %v", ids)
		}
	})
}

// Whom neither the server calls online nor anybody wants has no flow.
func TestFlowsOfDemandedPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob, carol := punch.Key{1}, punch.Key{2}
		w.server()
		w.members(nil, linkPeer{key: bob, online: true}, linkPeer{key: carol})
		flows := func() []punch.Key { synctest.Wait(); return w.fake("server0").flows() }
		if got := flows(); !slices.Equal(got, []punch.Key{bob}) {
			t.Fatalf("flows to %v", got)
		}
		w.links.demand(carol, time.Now())
		if got := flows(); !slices.Equal(got, []punch.Key{bob, carol}) {
			t.Fatalf("flows to %v after carol was demanded", got)
		}
		time.Sleep(demandFor + linkTick)
		if got := flows(); !slices.Equal(got, []punch.Key{bob}) {
			t.Fatalf("flows to %v long after", got)
		}
		w.members(nil, linkPeer{key: bob}, linkPeer{key: carol})
		if got := flows(); !slices.Equal(got, []punch.Key{bob}) {
			t.Fatalf("flows to %v, bob lost only the server", got)
		}
		time.Sleep(demandFor + linkTick)
		if got := flows(); len(got) > 0 {
			t.Fatalf("flows to %v who are gone", got)
		}
	})
}

// With no relay in common each goes to the home of the other, and stays there
// although they have two in common then.
func TestHomeOfAPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true, relays: tripsOf("far9")}
		all := standalone("a1", "b2", "c3", "far9")
		w.members(all)
		for _, n := range []string{"a1", "b2", "c3"} {
			w.up(n, 5*ms)
		}
		w.up("far9", 99*ms)
		if !w.fake("far9").over() {
			t.Fatal("four links to standalone relays")
		}
		w.members(all, bob)
		if f := w.fake("far9"); f.over() || !slices.Equal(f.flows(), []punch.Key{bob.key}) {
			t.Fatalf("far9: ended %v, peers %v", f.over(), f.flows())
		}
		w.up("far9", 99*ms)
		bob.relays = tripsOf("far9", "a1")
		w.members(all, bob)
		if w.fake("far9").over() {
			t.Fatal("left the home of a peer")
		}
		bob.online = false
		w.members(all, bob)
		if w.fake("far9").over() {
			t.Fatal("left the home of a peer that may only have lost the server")
		}
		time.Sleep(demandFor + linkTick)
		if !w.fake("far9").over() {
			t.Fatal("stays at the home of a peer that is gone")
		}
	})
}

// A server that restarted names nobody until they come back.
func TestServerThatForgotEverybodyEndsNoLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		all := standalone("a1", "b2", "c3", "far9")
		bob := linkPeer{key: punch.Key{1}, online: true, relays: tripsOf("far9")}
		w.server()
		w.members(all, bob)
		for _, n := range []string{"a1", "b2", "c3", "far9"} {
			w.up(n, 5*ms)
		}
		w.up("far9", 99*ms)
		before := slices.Clone(w.relays[bob.key])
		for i := range all {
			all[i].online, all[i].addrs = false, nil
		}
		bob.online = false
		w.members(all, bob)
		time.Sleep(demandFor + linkTick)
		synctest.Wait()
		for _, n := range []string{"a1", "b2", "c3", "far9"} {
			if w.fake(n).over() {
				t.Errorf("the link to %s ended", n)
			}
		}
		if len(before) == 0 {
			t.Fatal("no way to bob at all")
		}
		w.wantRelays(bob.key, before...)
		w.members(nil, bob) // withdrawn
		if !w.fake("a1").over() || !w.fake("far9").over() {
			t.Error("links to relays that were withdrawn go on")
		}
	})
}

// What the relay sent over UDP before it heard that TLS is used now still counts.
func TestLinkOverTLSTakesWhatComesOverUDP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		at := netip.MustParseAddrPort("198.51.100.9:443")
		w.members([]relayInfo{{key: relayKey('1'), name: "a1", online: true, servers: []string{"a:1"}, addrs: []netip.AddrPort{relayAddr("a1"), at}}})
		w.state("a1", relay.State{Transport: relay.TLS, RTT: ms})
		if got := w.device[1]; got != "tls, takes "+relayAddr("a1").String() {
			t.Fatalf("link %q, not of the first address", got)
		}
		w.state("a1", relay.State{Transport: relay.UDP, Addr: at, RTT: ms})
		w.state("a1", relay.State{Transport: relay.TLS, RTT: ms})
		if got := w.device[1]; got != "tls, takes "+at.String() {
			t.Fatalf("link %q, not where UDP worked", got)
		}
		w.server()
		w.links.setOwn(relayInfo{key: relayKey('0'), name: "server0"})
		w.state("server0", relay.State{Transport: relay.TLS, RTT: ms})
		if got := w.device[2]; got != "tls" {
			t.Fatalf("link %q without an address of UDP", got)
		}
	})
}

// Others than root learn the names of members, but not where the server is.
func TestServersHostIsForRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true}
		w.server()
		w.members(standalone("a1"), bob)
		for full, want := range map[bool]string{true: "server0", false: "server"} {
			list := w.links.status(full)
			if len(list) != 2 || list[0].Name != want || list[1].Name != "a1" {
				t.Errorf("root %v: %+v", full, list)
			}
			if name, _ := w.links.relayed(handle(bob.key, 1), full); name != want {
				t.Errorf("root %v: path over %q", full, name)
			}
			if name, _ := w.links.relayed(handle(bob.key, 2), full); name != "a1" {
				t.Errorf("root %v: path over %q", full, name)
			}
		}
	})
}

// Relays tell of peers that left, too.
func TestPeersThatLeftAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true}
		w.server()
		w.members(nil, bob)
		w.links.onPeer(w.fake("server0").link, bob.key, true)
		w.links.demand(bob.key, time.Now())
		w.members(nil)
		w.links.onPeer(w.fake("server0").link, bob.key, true) // was on its way
		w.links.mu.Lock()
		defer w.links.mu.Unlock()
		if k := w.fake("server0").link; len(k.here) > 0 || len(w.links.demands) > 0 {
			t.Fatalf("here %v, demands %v", k.here, w.links.demands)
		}
	})
}

// A relay whose client cannot be made gives its place to another, and is told of
// once.
func TestRelayWithoutAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		w.note(func() { w.broken = "a1" })
		w.members(standalone("a1", "b2"))
		for range 5 {
			time.Sleep(linkTick)
			w.links.poke()
			synctest.Wait()
		}
		w.note(func() { w.broken = "" })
		if f := w.fake("b2"); f == nil || f.link.id != 2 {
			t.Fatal("no link to the other relay")
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if w.fake("a1") == nil {
			t.Error("never tried again")
		}
		w.end()
		if n := strings.Count(w.log.String(), `msg="relay not used"`); n != 1 {
			t.Errorf("told %d times:\n%s", n, w.log.String())
		}
	})
}
