package overlay

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// A relay is a member, but neither a WireGuard peer nor one to punch to.
func TestRelaysAreNoPeers(t *testing.T) {
	m := newTestMesh(t)
	self, bob, fra := m.node("alice", m.signer), m.node("bob", m.signer), m.relay("fra")
	at := netip.MustParseAddrPort("203.0.113.7:443")
	record := func(serial uint64, list ...trust.Endpoint) coord.Node {
		n := fra.node
		n.Record = must[trust.Document](t)(trust.SignRecord(trust.Record{Device: fra.cert.Device, Serial: serial, Candidates: list}, fra.device))
		return n
	}
	r := m.roster(self)
	_, changed := r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node, record(5, trust.Endpoint{Addr: at, Type: uint8(punch.PortMapped)})}}, true)
	if len(changed) != 1 || changed[0].Key != punch.Key(bob.w.PublicKey()) {
		t.Fatalf("changed %+v, want bob only", changed)
	}
	own := punch.Key(self.w.PublicKey())
	if len(r.peers(own)) != 1 || len(r.linkPeers()) != 1 {
		t.Fatal("the relay is a peer")
	}
	if _, changed := r.apply(&coord.Netmap{}, true); len(changed) != 1 {
		t.Fatalf("changed %+v, want bob only", changed)
	}
	r.apply(&coord.Netmap{Nodes: []coord.Node{record(6)}}, false) // it looks for its address again
	for _, r := range []*roster{r, m.again(self, r)} {
		list := r.relays()
		if len(list) != 1 || list[0].key != punch.Key(fra.cert.WireGuard) || list[0].name != "fra" ||
			!slices.Equal(list[0].addrs, []netip.AddrPort{at}) || !slices.Equal(list[0].servers, []string{at.String()}) {
			t.Fatalf("relays %+v", list)
		}
		pinOf := func(n testNode) trust.Hash {
			return sha256.Sum256(must[[]byte](t)(x509.MarshalPKIXPublicKey(n.device.Public())))
		}
		if list[0].verify(pinOf(fra)) != nil || list[0].verify(pinOf(bob)) == nil {
			t.Fatal("its TLS is not pinned to its device key")
		}
	}
	s := &session{roster: r}
	if _, err := s.find("fra"); KindOf(err) != Usage || !strings.Contains(err.Error(), "is a relay") {
		t.Fatalf("looking for the relay as a peer: %v", err)
	}
}

// again is a roster as it is after a restart from the cache.
func (m *testMesh) again(self testNode, r *roster) *roster {
	again := m.roster(self)
	again.apply(&coord.Netmap{Nodes: r.snapshot().Nodes}, true)
	return again
}

func TestPublishNamesRelays(t *testing.T) {
	c := newTestControl(t)
	c.relays = func() []trust.RelayTrip { return tripsOf("a1", "b2") }
	p := must[*coord.Publish](t)(c.record())
	if got := must[trust.Record](t)(trust.OpenRecord(p.Record)).Relays; !slices.Equal(got, tripsOf("a1", "b2")) {
		t.Fatalf("relays %v", got)
	}
}

func TestCachedRelay(t *testing.T) {
	st := store{t.TempDir()}
	addrs := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:3478"), netip.MustParseAddrPort("[2001:db8::1]:443")}
	key := relayKey(7)
	if err := st.save(netmapFile, cache{Relay: &cachedRelay{Server: "vpn.example.org:443", Key: key[:], Addrs: addrs}}); err != nil {
		t.Fatal(err)
	}
	var c cache
	if _, err := st.load(netmapFile, &c); err != nil || !c.Relay.usable() {
		t.Fatalf("%+v: %v", c.Relay, err)
	}
	if r := c.Relay.info(nil); r.key != key || r.name != "vpn.example.org" || !slices.Equal(r.addrs, addrs) || !slices.Equal(r.servers, []string{"vpn.example.org:443"}) {
		t.Fatalf("relay %+v", r)
	}
	for _, bad := range []*cachedRelay{nil, {Server: "a:1", Key: key[1:]}, {Server: "a", Key: key[:]}} {
		if bad.usable() {
			t.Errorf("%+v is usable", bad)
		}
	}
}

// The relay inside a peer has no TLS, and few tries.
func TestLinkConfig(t *testing.T) {
	s := &session{settings: &settings{}, keys: &keys{}, log: slog.New(slog.DiscardHandler)}
	if c := s.linkConfig(&relayLink{info: relayInfo{peer: true}}, 0); c.Dial != nil || c.Tries != peerHellos {
		t.Errorf("a peer: TLS %v, %d tries", c.Dial != nil, c.Tries)
	}
	if c := s.linkConfig(&relayLink{}, 0); c.Dial == nil || c.Tries != 0 {
		t.Errorf("a relay: TLS %v, %d tries", c.Dial != nil, c.Tries)
	}
}

// With the server out of reach a call comes out of a flow, and its answer goes
// into one.
func TestSignalsThroughRelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestMesh(t)
		alice, bob := m.node("alice", m.signer), m.node("bob", m.signer)
		w := newLinksWorld(t)
		defer w.end()
		s := &session{roster: m.roster(alice), control: newTestControl(t), links: w.links, log: slog.New(slog.DiscardHandler)}
		s.roster.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, true)
		calls := make(chan []byte, 1) // the first, which is said again later
		agent := func(n testNode, signal func(punch.Key, []byte) error) *punch.Agent {
			a := must[*punch.Agent](t)(punch.New(punch.Config{
				PrivateKey: n.w, Mesh: m.hash, Signal: signal,
				Send: func([]byte, netip.AddrPort, netip.AddrPort, int) error { return nil },
			}))
			go func() { _ = a.Run(t.Context()) }()
			return a
		}
		s.agent = agent(alice, s.sendSignal)
		b := agent(bob, func(_ punch.Key, sealed []byte) error {
			select {
			case calls <- sealed:
			default:
			}
			return nil
		})
		bobKey := punch.Key(bob.w.PublicKey())
		b.SetPeer(punch.Peer{Key: punch.Key(alice.w.PublicKey()), Online: true})
		s.agent.SetPeer(punch.Peer{Key: bobKey})
		synctest.Wait()
		if len(calls) == 0 {
			t.Fatal("bob did not call")
		}
		if err := s.sendSignal(bobKey, []byte{1}); !errors.Is(err, errNoServer) || !errors.Is(err, errNoRelay) {
			t.Fatalf("no way at all: %v", err)
		}
		w.members(nil, linkPeer{key: bobKey, online: true})
		w.server()
		w.up("server0", 10*ms)
		w.links.onPeer(w.fake("server0").link, bobKey, true)
		synctest.Wait()
		call := append([]byte{relay.SignalByte}, <-calls...)
		s.receive(call, netip.MustParseAddrPort("198.51.100.9:5"), netip.AddrPort{}) // not out of a flow
		s.receive(nil, handle(bobKey, 1), netip.AddrPort{})
		time.Sleep(time.Second)
		if len(w.sent) > 0 {
			t.Fatalf("sent %v", w.sent)
		}
		s.receive(call, handle(bobKey, 1), netip.AddrPort{})
		synctest.Wait()
		if len(w.sent) != 1 || !strings.HasPrefix(w.sent[0], "b0") || !strings.HasSuffix(w.sent[0], " to "+handle(bobKey, 1).String()) {
			t.Fatalf("answered by %v", w.sent)
		}
		s.receive([]byte{relay.ControlByte, 3}, relayAddr("server0"), netip.AddrPort{})
		if got := w.fake("server0").received; len(got) != 1 {
			t.Fatalf("control datagrams %q", got)
		}
	})
}

// Nothing is sent to addresses that lead to this machine, to its link, or into
// the mesh, whatever a relay names.
func TestRelaysNameNoAddressesInside(t *testing.T) {
	m := newTestMesh(t)
	self, fra := m.node("alice", m.signer), m.relay("fra")
	fine := []netip.AddrPort{netip.MustParseAddrPort("203.0.113.7:443"), netip.MustParseAddrPort("192.168.1.2:443")}
	list := []trust.Endpoint{{Addr: fine[0], Type: uint8(punch.PortMapped)}, {Addr: fine[1], Type: uint8(punch.PortMapped)}}
	for _, a := range []string{"127.0.0.1:1", "[::1]:1", "0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[ff02::1]:1", "169.254.1.1:1", "[fe80::1]:1", "255.255.255.255:1", "100.90.0.9:1", "[fd00:1:2::9]:1"} {
		r := m.roster(self)
		n := fra.node
		doc, err := trust.SignRecord(trust.Record{
			Device: fra.cert.Device, Serial: 1,
			Candidates: append([]trust.Endpoint{{Addr: netip.MustParseAddrPort(a), Type: uint8(punch.PortMapped)}}, list...),
		}, fra.device)
		if err != nil {
			continue // cannot be in a record
		}
		n.Record = doc
		r.apply(&coord.Netmap{Nodes: []coord.Node{n}}, true)
		got := r.relays()
		if len(got) != 1 || !slices.Equal(got[0].addrs, fine) || !slices.Equal(got[0].servers, []string{fine[0].String(), fine[1].String()}) {
			t.Errorf("%s: relays %+v", a, got)
		}
	}
}
