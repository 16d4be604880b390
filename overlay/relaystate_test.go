package overlay

import (
	"bytes"
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
				w.links.onPeer(w.fake(step.here).link, bob.key, true)
			}
			w.sent = nil
			err := w.links.signal(bob.key, []byte{7})
			want := []string{"b007 to " + handle(bob.key, w.fake(step.to).link.id).String()}
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
		w.up("server0", 5*ms)
		w.up("a1", 5*ms)
		if len(w.servers) != 2 {
			t.Fatalf("servers %+v", w.servers)
		}
		for i, name := range []string{"server0", "a1"} {
			id := byte(w.fake(name).link.id)
			if s := w.servers[i]; s.Addr != relayAddr(name) || !bytes.Equal(s.Username, []byte{id}) || string(s.Key) != "key" {
				t.Fatalf("server %+v is not %s", s, name)
			}
		}
		w.state("a1", relay.State{Transport: relay.TLS, RTT: ms})
		if len(w.servers) != 2 {
			t.Fatal("asked anew because UDP is gone")
		}
		w.members(nil)
		if len(w.servers) != 1 || w.servers[0].Addr != relayAddr("server0") {
			t.Fatalf("servers %+v without a1", w.servers)
		}
	})
}

// The server's relay answers STUN until there is a connection to the server.
func TestServerTakesThePlaceOfItsRelay(t *testing.T) {
	server, far := relayAddr("server0"), relayAddr("a1")
	relays := []punch.Server{{Addr: server, Username: []byte{1}}, {Addr: far, Username: []byte{2}}}
	if got := stunServers(nil, relays); len(got) != 2 || got[0].Addr != server || got[1].Addr != far {
		t.Errorf("without the server %+v", got)
	}
	got := stunServers([]punch.Server{{Addr: server, Username: []byte("stream")}}, relays)
	if len(got) != 2 || string(got[0].Username) != "stream" || got[1].Addr != far {
		t.Errorf("with the server %+v", got)
	}
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
		if f := w.fake("server0"); !slices.Equal(f.received, []string{"pong"}) || f.changed != 1 || f.doubts != 1 {
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
		if got := w.fake("a1").received; !slices.Equal(got, []string{"pong"}) {
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
