package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

// fakeRelay is the client of one link. It notes what it is told; the test says
// what its relay does.
type fakeRelay struct {
	link *relayLink
	boot uint64

	mu       sync.Mutex
	addrs    []netip.AddrPort
	peers    []punch.Key
	received []string
	changed  int
	doubts   int
	ended    bool
}

func (f *fakeRelay) Run(ctx context.Context) error {
	<-ctx.Done()
	f.note(func() { f.ended = true })
	return nil
}

func (f *fakeRelay) note(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

// flows are the peers it is to open flows to.
func (f *fakeRelay) flows() (list []punch.Key) {
	f.note(func() { list = f.peers })
	return list
}

func (f *fakeRelay) SetAddrs(l []netip.AddrPort) { f.note(func() { f.addrs = slices.Clone(l) }) }
func (f *fakeRelay) SetPeers(l []punch.Key)      { f.note(func() { f.peers = slices.Clone(l) }) }
func (f *fakeRelay) Receive(b []byte, from netip.AddrPort) bool {
	f.note(func() { f.received = append(f.received, string(b)) })
	return slices.Contains(f.addrs, from)
}
func (f *fakeRelay) Offer([]byte)               {}
func (f *fakeRelay) NetworkChanged()            { f.note(func() { f.changed++ }) }
func (f *fakeRelay) Doubt()                     { f.note(func() { f.doubts++ }) }
func (f *fakeRelay) STUN() (user, token []byte) { return []byte{byte(f.link.id)}, []byte("key") }

// linksWorld is a links with everything around it in memory.
type linksWorld struct {
	t     *testing.T
	links *links
	end   func()
	fakes map[string]*fakeRelay // by name of the relay
	log   bytes.Buffer

	mu        sync.Mutex
	device    map[uint16]string // how each link goes
	known     map[punch.Key]bool
	relays    map[punch.Key][]punch.Relay
	servers   []punch.Server
	published []time.Time
	arrived   []punch.Key
	sent      []string
	broken    string // the relay whose client cannot be made
}

func newLinksWorld(t *testing.T) *linksWorld {
	w := &linksWorld{
		t: t, fakes: map[string]*fakeRelay{}, device: map[uint16]string{},
		known: map[punch.Key]bool{}, relays: map[punch.Key][]punch.Relay{},
	}
	w.links = newLinks(linksConfig{
		own: punch.Key{255}, device: func() linkDevice { return w }, relays: w.setRelays, open: w.open,
		send: func(b []byte, to netip.AddrPort) error {
			w.note(func() { w.sent = append(w.sent, fmt.Sprintf("%x to %s", b, to)) })
			return nil
		},
		servers: func(l []punch.Server) { w.note(func() { w.servers = l }) },
		publish: func() {
			w.note(func() { w.published = append(w.published, time.Now()) })
			go w.links.record()
		},
		arrived: func(k punch.Key) { w.note(func() { w.arrived = append(w.arrived, k) }) },
		changed: func() {},
		log:     slog.New(slog.NewTextHandler(&w.log, nil)),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.links.run(ctx) }()
	w.end = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return w
}

func (w *linksWorld) note(do func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	do()
}

func (w *linksWorld) open(k *relayLink, boot uint64) (relayClient, error) {
	f := &fakeRelay{link: k, boot: boot}
	var err error
	w.note(func() {
		if w.broken == k.info.name {
			err = errors.New("credentials of 999 bytes")
			return
		}
		w.fakes[k.info.name] = f
	})
	return f, err
}

func (w *linksWorld) setRelays(k punch.Key, list []punch.Relay) {
	w.note(func() { w.relays[k] = slices.Clone(list) })
}

func (w *linksWorld) SetLink(id uint16, l tun.Link) {
	w.note(func() {
		w.device[id] = l.Addr.String()
		switch {
		case l.Send != nil && l.Addr.IsValid():
			w.device[id] = "tls, takes " + l.Addr.String()
		case l.Send != nil:
			w.device[id] = "tls"
		case !l.Addr.IsValid():
			delete(w.device, id)
		}
	})
}

func (w *linksWorld) SetWays(k tun.Key, ways []tun.Way) []netip.AddrPort {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := make([]netip.AddrPort, len(ways))
	for i, way := range ways {
		if way.Header != relay.FlowOf(punch.Key{255}, punch.Key(k)) {
			w.t.Errorf("way %x of peer %v", way.Header, k)
		}
		if w.known[punch.Key(k)] {
			list[i] = handle(punch.Key(k), way.Link)
		}
	}
	return list
}

func handle(k punch.Key, link uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 15: k[0]}), 0x8000|link)
}

// members makes standalone relays and peers known, to the device as well.
func (w *linksWorld) members(relays []relayInfo, peers ...linkPeer) {
	w.note(func() {
		for _, p := range peers {
			w.known[p.key] = true
		}
	})
	w.links.setMembers(relays, peers)
	synctest.Wait()
}

func (w *linksWorld) state(name string, st relay.State) {
	w.t.Helper()
	f := w.fakes[name]
	if f == nil {
		w.t.Fatalf("no link to %s", name)
	}
	w.links.onState(f.link, st)
	synctest.Wait()
}

func (w *linksWorld) up(name string, rtt time.Duration) {
	w.t.Helper()
	w.state(name, relay.State{Transport: relay.UDP, Addr: relayAddr(name), RTT: rtt})
}

func relayAddr(name string) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, name[len(name)-1]}), 443)
}

func standalone(names ...string) (list []relayInfo) {
	for _, n := range names {
		list = append(list, relayInfo{key: relayKey(n[len(n)-1]), name: n, addrs: []netip.AddrPort{relayAddr(n)}, online: true})
	}
	return list
}

func (w *linksWorld) server() {
	info := standalone("server0")[0]
	w.links.setOwn(info)
	synctest.Wait()
}

func tripsOf(names ...string) (list []trust.RelayTrip) {
	for _, n := range names {
		list = append(list, trust.RelayTrip{Relay: trust.Key(relayKey(n[len(n)-1])), Trip: 20})
	}
	return list
}

func (w *linksWorld) wantRelays(k punch.Key, want ...punch.Relay) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if got := w.relays[k]; !slices.Equal(got, want) {
		w.t.Fatalf("relays of %d: %+v, want %+v", k[0], got, want)
	}
}

func TestRelayFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := punch.Key{1}
		w.members(nil, linkPeer{key: bob, online: true})
		w.server()
		w.wantRelays(bob)
		if got := w.fakes["server0"].flows(); !slices.Equal(got, []punch.Key{bob}) {
			t.Fatalf("flows to %v wanted, not to bob", got)
		}
		w.up("server0", 10*ms)
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, 1)}) // bob named none yet: may be there
		if w.device[1] != relayAddr("server0").String() {
			t.Fatalf("link 1 of the device: %q", w.device[1])
		}
		w.links.onPeer(w.fakes["server0"].link, bob, true)
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
		ids := map[string]uint16{"berlin1": w.fakes["berlin1"].link.id, "paris2": w.fakes["paris2"].link.id}
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
		if w.fakes["berlin1"].ended {
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
		if f := w.fakes["paris2"]; len(f.flows()) > 0 || len(w.relays[bob.key]) != 1 {
			t.Fatalf("looked for at %v too", f.flows())
		}
		w.state("berlin1", relay.State{})
		if f := w.fakes["paris2"]; !slices.Equal(f.flows(), []punch.Key{bob.key}) {
			t.Fatalf("paris2 is asked for %v", f.flows())
		}
		w.wantRelays(bob.key, punch.Relay{Addr: handle(bob.key, w.fakes["paris2"].link.id)})
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
		f := w.fakes["paris2"]
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
		first := w.fakes["a1"]
		w.members(standalone("b2"))
		if !first.ended {
			t.Fatal("the link to a relay that is gone goes on")
		}
		w.members(standalone("a1", "b2", "c3"))
		again := w.fakes["a1"]
		if again == first || again.link.id != first.link.id || again.boot <= first.boot {
			t.Fatalf("link %d boot %d after link %d boot %d", again.link.id, again.boot, first.link.id, first.boot)
		}
		ids := []uint16{w.fakes["a1"].link.id, w.fakes["b2"].link.id, w.fakes["c3"].link.id}
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
		flows := func() []punch.Key { synctest.Wait(); return w.fakes["server0"].flows() }
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
		if !w.fakes["far9"].ended {
			t.Fatal("four links to standalone relays")
		}
		w.members(all, bob)
		if f := w.fakes["far9"]; f.ended || !slices.Equal(f.flows(), []punch.Key{bob.key}) {
			t.Fatalf("far9: ended %v, peers %v", f.ended, f.flows())
		}
		w.up("far9", 99*ms)
		bob.relays = tripsOf("far9", "a1")
		w.members(all, bob)
		if w.fakes["far9"].ended {
			t.Fatal("left the home of a peer")
		}
		bob.online = false
		w.members(all, bob)
		if w.fakes["far9"].ended {
			t.Fatal("left the home of a peer that may only have lost the server")
		}
		time.Sleep(demandFor + linkTick)
		if !w.fakes["far9"].ended {
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
			if w.fakes[n].ended {
				t.Errorf("the link to %s ended", n)
			}
		}
		if len(before) == 0 {
			t.Fatal("no way to bob at all")
		}
		w.wantRelays(bob.key, before...)
		w.members(nil, bob) // withdrawn
		if !w.fakes["a1"].ended || !w.fakes["far9"].ended {
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
		w.links.onPeer(w.fakes["server0"].link, bob.key, true)
		w.links.demand(bob.key, time.Now())
		w.members(nil)
		w.links.onPeer(w.fakes["server0"].link, bob.key, true) // was on its way
		w.links.mu.Lock()
		defer w.links.mu.Unlock()
		if k := w.fakes["server0"].link; len(k.here) > 0 || len(w.links.demands) > 0 {
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
		if f := w.fakes["b2"]; f == nil || f.link.id != 2 {
			t.Fatal("no link to the other relay")
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if w.fakes["a1"] == nil {
			t.Error("never tried again")
		}
		w.end()
		if n := strings.Count(w.log.String(), `msg="relay not used"`); n != 1 {
			t.Errorf("told %d times:\n%s", n, w.log.String())
		}
	})
}

// Clients tell of trips only when they change.
func TestHomeMovesToAConstantlyNearerRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		w.members(standalone("a1", "b2"))
		time.Sleep(homeSettle)
		w.up("a1", 50*ms)
		w.up("b2", 20*ms)
		home := func() trust.Key { return w.links.record()[0].Relay }
		if home() != trust.Key(relayKey('1')) {
			t.Fatal("the home moved by one measurement")
		}
		time.Sleep(homeSamples * (judgeEvery + linkTick))
		if home() != trust.Key(relayKey('2')) {
			t.Fatal("the home did not move to the nearer relay")
		}
	})
}

func TestRecordsForRelaysAreRare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		count := func() (n int) {
			w.note(func() { n = len(w.published) })
			return n
		}
		w.server()
		w.up("server0", 10*ms)
		if count() != 1 {
			t.Fatalf("published %d times, not at once", count())
		}
		for i := range 100 {
			w.up("server0", time.Duration(10+10*(i%2))*ms)
			time.Sleep(100 * ms)
		}
		if n := count(); n < 2 || n > 15 {
			t.Fatalf("published %d times in 10 s", n)
		}
		n := count()
		w.up("server0", 10*ms)
		time.Sleep(time.Minute)
		w.up("server0", 11*ms)
		time.Sleep(time.Minute)
		if count() > n+1 {
			t.Fatal("published for a change that means nothing")
		}
	})
}

func TestSignalsTakeTheNearestRelayWithThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := linkPeer{key: punch.Key{1}, online: true, relays: tripsOf("a1", "b2")}
		w.members(standalone("a1", "b2"), bob)
		if err := w.links.signal(bob.key, []byte{7}); !errors.Is(err, errNoRelay) || len(w.sent) > 0 {
			t.Fatalf("no link: %v, sent %v", err, w.sent)
		}
		w.up("a1", 5*ms)
		w.up("b2", 9*ms)
		for _, step := range []struct {
			here string
			to   string
			ok   bool
		}{{"", "a1", false}, {"b2", "b2", true}, {"a1", "a1", true}} {
			if step.here != "" {
				w.links.onPeer(w.fakes[step.here].link, bob.key, true)
			}
			w.sent = nil
			err := w.links.signal(bob.key, []byte{7})
			want := []string{"b007 to " + handle(bob.key, w.fakes[step.to].link.id).String()}
			if (err == nil) != step.ok || !slices.Equal(w.sent, want) {
				t.Fatalf("at %q: %v, sent %v, want %v", step.here, err, w.sent, want)
			}
		}
		if k, ok := w.links.peerOf(handle(bob.key, 1)); !ok || k != bob.key {
			t.Fatal("bob's handle is not known")
		}
		if _, ok := w.links.peerOf(handle(bob.key, 9)); ok {
			t.Fatal("a handle of no link is known")
		}
		w.members(standalone("a1", "b2"))
		if _, ok := w.links.peerOf(handle(bob.key, 1)); ok {
			t.Fatal("the handle of a peer that left is known")
		}
	})
}

func TestRelaysTellTheOwnAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		w.server()
		w.members(standalone("a1"))
		w.up("server0", 5*ms) // the server's own STUN has tokens
		w.up("a1", 5*ms)
		want := punch.Server{Addr: relayAddr("a1"), Username: []byte{byte(w.fakes["a1"].link.id)}, Key: []byte("key")}
		if len(w.servers) != 1 || w.servers[0].Addr != want.Addr || !bytes.Equal(w.servers[0].Username, want.Username) || !bytes.Equal(w.servers[0].Key, want.Key) {
			t.Fatalf("servers %+v", w.servers)
		}
		w.state("a1", relay.State{Transport: relay.TLS, RTT: ms})
		if len(w.servers) != 1 {
			t.Fatal("asked anew because UDP is gone")
		}
		w.members(nil)
		if len(w.servers) != 0 {
			t.Fatalf("servers %+v of no relay", w.servers)
		}
	})
}

func TestControlGoesToRelaysOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		w.server()
		w.links.receive([]byte("junk"), netip.MustParseAddrPort("198.51.100.1:443"))
		w.links.receive([]byte("pong"), relayAddr("server0"))
		w.links.networkChanged()
		w.members(nil, linkPeer{key: punch.Key{1}, online: true})
		w.links.doubt(handle(punch.Key{1}, 1))
		w.links.doubt(handle(punch.Key{1}, 2))
		if f := w.fakes["server0"]; !slices.Equal(f.received, []string{"pong"}) || f.changed != 1 || f.doubts != 1 {
			t.Fatalf("received %q, changed %d, doubts %d", f.received, f.changed, f.doubts)
		}
	})
}

// What a relay names may be a node's own mapping: it keeps nobody from being
// probed there until a relay answered.
func TestOnlyWhereARelayAnsweredIsForbidden(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		w.server()
		w.members(standalone("a1"))
		w.links.receive([]byte("pong"), relayAddr("a1"))
		if got := w.fakes["a1"].received; !slices.Equal(got, []string{"pong"}) {
			t.Fatalf("received %q from an address that is tried", got)
		}
		is := func(name string, want bool) {
			t.Helper()
			if w.links.isRelay(relayAddr(name)) != want {
				t.Fatalf("%s is a relay: %v, want %v", name, !want, want)
			}
		}
		is("server0", true)
		is("a1", false)
		w.up("a1", ms)
		is("a1", true)
		w.state("a1", relay.State{Transport: relay.TLS, RTT: ms})
		is("a1", true)
		w.members(nil)
		is("a1", false)
	})
}

func TestMovesOfLinksAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		w.server()
		w.up("server0", 10*ms)
		w.up("server0", 11*ms)
		w.state("server0", relay.State{Transport: relay.TLS, RTT: ms, Err: errors.New("192.0.2.1 does not answer")})
		w.state("server0", relay.State{Err: errors.New("192.0.2.1 does not answer")})
		w.end()
		text := w.log.String()
		for _, want := range []string{"over=udp", "over=tls", `msg="relay lost" relay=server0 was=tls`, `msg="home relay" relay=server0`} {
			if strings.Count(text, want) != 1 {
				t.Errorf("%q is not there once:\n%s", want, text)
			}
		}
		if strings.Contains(text, "192.0.2") {
			t.Errorf("addresses are logged:\n%s", text)
		}
		list := w.links.status(true)
		if len(list) != 1 || list[0].Name != "server0" || list[0].Transport != "" || list[0].RTTms != nil || list[0].Trouble == "" {
			t.Errorf("status %+v", list)
		}
		if others := w.links.status(false)[0]; others.Trouble != "" || others.Name != "server" {
			t.Errorf("others than root see %+v", others)
		}
	})
}
