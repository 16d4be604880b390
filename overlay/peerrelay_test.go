package overlay

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/portmap"
	"overlay/punch/relay"
)

func TestPeerRelayRate(t *testing.T) {
	for setting, want := range map[string]uint64{"": 6_250_000, "on": 6_250_000, "off": 0, "200": 25_000_000} {
		if got, err := peerRelayRate(setting); got != want || err != nil {
			t.Errorf("%q: %d, %v; want %d", setting, got, err, want)
		}
	}
	for _, setting := range []string{"0", "-1", "yes", "1000001", "1.5"} {
		if got, err := peerRelayRate(setting); err == nil || KindOf(err) != Usage {
			t.Errorf("%q: %d, %v", setting, got, err)
		} else if text := err.Error(); !strings.Contains(text, strconv.Quote(setting)+" is neither on, off, nor a number from 1 to 1000000") {
			t.Errorf("%q: %s", setting, text)
		}
	}
}

func TestRelayPlace(t *testing.T) {
	seen := func(addr string) punch.Candidate {
		return punch.Candidate{Addr: netip.MustParseAddrPort(addr), Type: punch.ServerReflexive}
	}
	host6 := punch.Candidate{Addr: netip.MustParseAddrPort("[2001:db8::1]:41000"), Type: punch.Host}
	mapping := func(addr string) []portmap.Mapping {
		return []portmap.Mapping{{External: netip.MustParseAddrPort(addr), Port: 4000}}
	}
	double := mapping("192.0.2.1:5555")
	double[0].DoubleNAT = true
	other := mapping("192.0.2.1:5555")
	other[0].Port = 4001
	for name, x := range map[string]struct {
		published []punch.Candidate
		local     string
		mapped    []portmap.Mapping
		want      uint16
	}{
		"nothing":                 {nil, "192.0.2.1/24", nil, 0},
		"a public address":        {[]punch.Candidate{seen("192.0.2.1:41000")}, "192.0.2.1/24", nil, 4000},
		"behind a NAT":            {[]punch.Candidate{seen("192.0.2.1:41000")}, "192.168.1.2/24", nil, 0},
		"a LAN's server":          {[]punch.Candidate{seen("192.168.1.2:41000")}, "192.168.1.2/24", nil, 0},
		"a carrier's":             {[]punch.Candidate{seen("100.64.1.2:41000")}, "100.64.1.2/24", nil, 0},
		"IPv6 behind a firewall":  {[]punch.Candidate{seen("[2001:db8::1]:41000"), host6}, "2001:db8::1/64", nil, 0},
		"a mapped port":           {[]punch.Candidate{seen("192.0.2.1:41000")}, "192.168.1.2/24", mapping("192.0.2.1:5555"), 5555},
		"mapped elsewhere":        {[]punch.Candidate{seen("192.0.2.1:41000")}, "192.168.1.2/24", mapping("192.0.2.9:5555"), 0},
		"another port mapped":     {[]punch.Candidate{seen("192.0.2.1:41000")}, "192.168.1.2/24", other, 0},
		"mapped behind a carrier": {[]punch.Candidate{seen("192.0.2.1:41000")}, "192.168.1.2/24", double, 0},
		"a hole for IPv6":         {[]punch.Candidate{host6}, "2001:db8::1/64", mapping("[2001:db8::1]:4000"), 4000},
	} {
		if got := relayPlace(x.published, []netip.Prefix{netip.MustParsePrefix(x.local)}, 4000, x.mapped); got != x.want {
			t.Errorf("%s: port %d, want %d", name, got, x.want)
		}
	}
}

// peerHost is a peer relay of a test, on a port of its own.
type peerHost struct {
	*peerRelay
	roster *roster

	mu        sync.Mutex
	pairs     bool
	port      uint16 // at which others reach it; 0: its own
	published []uint16
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	c := must[*net.UDPConn](t)(net.ListenUDP("udp", nil))
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// startPeerRelay runs the relay of a node, at first without pairs to relay for.
func startPeerRelay(t *testing.T, r *roster, key [32]byte) *peerHost {
	t.Helper()
	return startPeerRelayAt(t, r, key, freePort(t))
}

func startPeerRelayAt(t *testing.T, r *roster, key [32]byte, port uint16) *peerHost {
	t.Helper()
	h := &peerHost{roster: r}
	h.peerRelay = &peerRelay{
		doorkeeper: doorkeeper{&h.mu, r.mesh}, port: port, log: slog.New(slog.DiscardHandler), wake: make(chan struct{}, 1),
		useful:   func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.pairs },
		place:    func([]portmap.Mapping) uint16 { h.mu.Lock(); defer h.mu.Unlock(); return cmp.Or(h.port, h.own()) },
		mapPorts: func() {},
	}
	h.publish = func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.published = append(h.published, h.peerRelay.published())
	}
	h.config = relay.ServerConfig{PrivateKey: key, Verify: h.verify, MaxNodes: peerRelayNodes, MaxFlows: peerRelayFlows, TotalRate: 1 << 20}
	untilEnd(t, h.run)
	return h
}

// pair has others come that the relay may serve.
func (h *peerHost) pair() {
	h.mu.Lock()
	h.pairs = true
	h.mu.Unlock()
	h.look()
}

// link connects a node to the relay over UDP.
func (h *peerHost) link(t *testing.T, n testNode, key [32]byte) *relayed {
	t.Helper()
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), h.own())
	return linkBy(t, n, relay.ClientConfig{Relay: key}, at, false)
}

// A node forwards for pairs of its mesh, and for nobody else.
func TestPeerRelayServes(t *testing.T) {
	m, foreign := newTestMesh(t), newTestMesh(t)
	self, alice, bob, eve := m.node("carol", m.signer), m.node("alice", m.signer), m.node("bob", m.signer), m.node("eve", m.signer)
	r := m.roster(self)
	r.apply(&coord.Netmap{Nodes: []coord.Node{alice.node, eve.node}, Revocations: []trust.Document{m.revoke(eve)}}, true)
	h := startPeerRelay(t, r, self.w)
	h.pair()
	eventually(t, "not offered", func() bool { return h.peerRelay.published() == h.own() })
	public := [32]byte(self.w.PublicKey())
	a, b := h.link(t, alice, public), h.link(t, bob, public)
	a.await(t, "on udp", over(relay.UDP))
	b.await(t, "on udp", over(relay.UDP))
	a.client.SetPeers([]punch.Key{b.key()})
	b.client.SetPeers([]punch.Key{a.key()})
	eventually(t, "the peers do not see each other", func() bool { return a.sees(b.key()) && b.sees(a.key()) })
	flow := relay.FlowOf(a.key(), b.key())
	to := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(h.own())}
	if _, err := a.socket.WriteToUDP(append(flow[:], "to bob"...), to); err != nil {
		t.Fatal(err)
	}
	b.hears(t, "to bob")
	eventually(t, "no flow is told", func() bool { st := h.status(); return st.Nodes == 2 && st.Flows == 1 && st.Bytes > 0 })
	refused := func(s relay.State) bool { return s.Transport == relay.None && s.Err != nil }
	h.link(t, eve, public).await(t, "refused", refused)
	h.link(t, foreign.node("mallory", foreign.signer), public).await(t, "refused", refused)
	h.mu.Lock()
	r.apply(&coord.Netmap{Revocations: []trust.Document{m.revoke(alice)}}, false)
	h.mu.Unlock()
	h.retain()
	if st := h.status(); st.Nodes != 1 || st.Flows != 0 {
		t.Errorf("%+v after one was revoked", st)
	}
}

// It runs only when it is of use, and says where others reach it.
func TestPeerRelayComes(t *testing.T) {
	m := newTestMesh(t)
	self := m.node("carol", m.signer)
	h := startPeerRelay(t, m.roster(self), self.w)
	h.look()
	eventually(t, "it does not look", func() bool { return len(h.wake) == 0 })
	if h.status() != nil {
		t.Error("it runs for nobody")
	}
	h.pair()
	eventually(t, "it does not run", func() bool { return h.status() != nil })
	h.mu.Lock()
	h.port = h.own() + 1 // the router maps another one
	h.mu.Unlock()
	h.look()
	eventually(t, "the new port is not published", func() bool { return h.peerRelay.published() == h.port })
	if err := h.listens(); err != nil {
		t.Errorf("its own port is another one, too: %v", err)
	}
}

// listens fails when the relay's own port is free.
func (h *peerHost) listens() error {
	c, err := listenUDP("", h.own())
	if err != nil {
		return nil
	}
	c.close()
	return errNoFamily
}

// Who does not want to relay opens and publishes nothing.
func TestPeerRelayOff(t *testing.T) {
	m := newTestMesh(t)
	self := m.node("carol", m.signer)
	s := &session{settings: &settings{PeerRelay: peerRelayOff}, roster: m.roster(self), keys: &keys{WireGuard: self.w}}
	if err := s.newPeerRelay(); err != nil || s.peerRelay != nil {
		t.Fatalf("made %v, %v", s.peerRelay, err)
	}
	s.peerRelay.look()
	s.peerRelay.setMapped(nil, true)
	s.peerRelay.retain()
	if s.peerRelay.toMap() != 0 || s.peerRelay.published() != 0 || s.peerRelay.status() != nil {
		t.Error("it relays all the same")
	}
}

func TestPublishNamesThePeerRelay(t *testing.T) {
	c := newTestControl(t)
	c.relayPort = func() uint16 { return 7777 }
	p := must[*coord.Publish](t)(c.record())
	if rec := must[trust.Record](t)(trust.OpenRecord(p.Record)); rec.RelayPort != 7777 || rec.Capabilities != uint16(c.takes()) {
		t.Fatalf("port %d, capabilities %b", rec.RelayPort, rec.Capabilities)
	}
}

// A mesh of two has no pair to relay for.
func TestHasPairs(t *testing.T) {
	m := newTestMesh(t)
	self := m.node("carol", m.signer)
	s := &session{roster: m.roster(self)}
	for i, want := range []bool{false, true, true} {
		s.roster.apply(&coord.Netmap{Nodes: []coord.Node{m.node("peer"+string(rune('a'+i)), m.signer).node}}, false)
		if got := s.hasPairs(); got != want {
			t.Errorf("with %d others: %v", i+1, got)
		}
	}
}

// A relay whose port somebody else has takes another one, and tells of that.
func TestPeerRelayPortTaken(t *testing.T) {
	other := must[*net.UDPConn](t)(net.ListenUDP("udp", nil))
	defer other.Close()
	m := newTestMesh(t)
	self := m.node("carol", m.signer)
	taken := other.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	h := startPeerRelayAt(t, m.roster(self), self.w, taken)
	h.pair()
	h.setMapped(nil, true)
	eventually(t, "it does not run", func() bool { return h.peerRelay.published() != 0 })
	at := h.peerRelay.published()
	if at == taken || at != h.own() {
		t.Errorf("published %d although %d is taken and it is at %d", at, taken, h.own())
	}
	eventually(t, "another one is to be mapped", func() bool { return h.toMap() == at })
}

// lineCount is a log that counts what is written.
type lineCount struct{ atomic.Int32 }

func (c *lineCount) Write(b []byte) (int, error) {
	c.Add(1)
	return len(b), nil
}

// What cannot be started is not tried at every change of the mesh.
func TestPeerRelayRests(t *testing.T) {
	port := freePort(t)
	synctest.Test(t, func(t *testing.T) {
		var warned lineCount
		r := &peerRelay{
			port: port, log: slog.New(slog.NewTextHandler(&warned, &slog.HandlerOptions{Level: slog.LevelWarn})), wake: make(chan struct{}, 1),
			useful: func() bool { return true }, place: func([]portmap.Mapping) uint16 { return port },
			mapPorts: func() {}, publish: func() {},
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = r.run(ctx) }() // fails: it has no one to verify credentials
		time.Sleep(time.Second)
		for minutes := range 3 {
			synctest.Wait()
			if n := warned.Load(); int(n) != minutes+1 {
				t.Errorf("%d warnings after %d minutes", n, minutes)
			}
			for range 10 {
				r.look()
				time.Sleep(peerRelayAgain / 10)
			}
		}
		cancel()
		<-done
	})
}

// Routers that map ports are to map that of the relay, while there may be a pair.
func TestPeerRelayAsksRouters(t *testing.T) {
	var useful bool
	var asked []uint16
	r := &peerRelay{
		port: 4000, wake: make(chan struct{}, 1), useful: func() bool { return useful },
		place: func(list []portmap.Mapping) uint16 { return uint16(len(list)) },
	}
	r.mapPorts = func() { asked = append(asked, r.toMap()) }
	one := []portmap.Mapping{{Port: 4000}}
	for _, c := range []struct {
		useful, maps bool
		mapped       []portmap.Mapping
		port, asks   uint16
	}{
		{true, false, nil, 0, 0},
		{false, true, nil, 0, 0},
		{true, true, nil, 0, 4000},
		{true, true, one, 1, 4000},
		{false, true, one, 0, 0},
		{true, false, nil, 0, 0},
	} {
		useful, asked = c.useful, nil
		r.setMapped(c.mapped, c.maps)
		if port := r.reached(); port != c.port || !slices.Equal(asked, []uint16{c.asks}) {
			t.Errorf("%+v: reached at %d, asked for %v", c, port, asked)
		}
	}
}

// A moment without an address, or without others, does not end the flows.
func TestPeerRelayGrace(t *testing.T) {
	type state struct {
		port  uint16
		pairs bool
	}
	fine := state{4000, true}
	for _, lost := range []state{{0, true}, {4000, false}} {
		synctest.Test(t, func(t *testing.T) {
			var now atomic.Pointer[state]
			r := &peerRelay{
				useful: func() bool { return now.Load().pairs }, place: func([]portmap.Mapping) uint16 { return now.Load().port },
				mapPorts: func() {}, publish: func() {}, wake: make(chan struct{}, 1), open: fine.port,
			}
			done := make(chan struct{})
			go func() { r.watch(t.Context(), &relay.Server{}); close(done) }()
			set := func(s state, d time.Duration) (over bool) {
				now.Store(&s)
				r.look()
				time.Sleep(d)
				synctest.Wait()
				select {
				case <-done:
					return true
				default:
					return false
				}
			}
			if set(lost, peerRelayGrace-time.Second) || set(fine, 3*peerRelayGrace) {
				t.Fatalf("%+v for a moment ended it", lost)
			}
			if !set(lost, peerRelayGrace+time.Second) {
				t.Fatalf("goes on although %+v", lost)
			}
		})
	}
}
