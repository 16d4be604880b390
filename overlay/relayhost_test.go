package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/stun/v2"
	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// relay admits a new device with the role of a relay.
func (m *testMesh) relay(name string) testNode {
	t := m.t
	inv, device := newKey(t), newKey(t)
	w := must[wgtypes.Key](t)(wgtypes.GeneratePrivateKey())
	invCap := must[trust.Document](t)(trust.SignInviteCap(trust.InviteCap{
		Invite: publicOf(inv), Signer: publicOf(m.signer), Tags: []string{trust.RelayTag},
		NotBefore: m.now.Add(-time.Hour), NotAfter: m.now.Add(time.Hour), Uses: 1,
	}, m.signer))
	c := trust.NodeCert{
		Invite: publicOf(inv), Device: publicOf(device), WireGuard: trust.Key(w.PublicKey()), Name: name,
		IP4: m.nextIP, IP6: trust.DeriveIP6(m.ula, m.hash, publicOf(device)), Tags: []string{trust.RelayTag},
		Role: trust.RoleRelay, Serial: 1, IssuedAt: m.now,
	}
	m.nextIP = m.nextIP.Next()
	cert := must[trust.Document](t)(trust.SignNodeCert(c, inv, device))
	signed := must[trust.Document](t)(trust.Countersign(cert, m.now, m.server))
	return testNode{device, w, coord.Node{Device: c.Device, Cap: invCap, Cert: signed, Online: true}, c}
}

// relayDir is the state directory of a relay that joined and then lost its
// server, with what it knew of the mesh.
func relayDir(t *testing.T, m *testMesh, r testNode, known *coord.Netmap) string {
	t.Helper()
	st := store{t.TempDir()}
	ros := m.roster(r)
	ros.apply(known, true)
	for name, v := range map[string]any{
		keysFile: &keys{Device: r.device, WireGuard: r.w}, meshFile: m.membership(r), netmapFile: ros.snapshot(),
	} {
		if err := st.save(name, v); err != nil {
			t.Fatal(err)
		}
	}
	return st.dir
}

// untilEnd has something run until the test ends.
func untilEnd(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// startRelayHost runs a relay on loopback without a server.
func startRelayHost(t *testing.T, m *testMesh, r testNode, known *coord.Netmap) *relayHost {
	t.Helper()
	sockets, err := listenRelay("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := RelayConfig{StateDir: relayDir(t, m, r, known), Server: "127.0.0.1:1"}
	c.setDefaults()
	h, err := newRelayHost(c, m.membership(r), sockets)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sockets.close)
	untilEnd(t, h.run)
	return h
}

// relayed is a node with a link to a relay and nothing else.
type relayed struct {
	testNode
	client *relay.Client
	socket *net.UDPConn
	states chan relay.State
	got    chan string // payloads of flows

	mu   sync.Mutex
	here map[punch.Key]bool
}

func (r *relayed) key() punch.Key { return punch.Key(r.w.PublicKey()) }

func (r *relayed) sees(k punch.Key) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.here[k]
}

// linkTo connects a node to a relay: over UDP, or over TLS alone.
func linkTo(t *testing.T, n testNode, h *relayHost, overTLS bool) *relayed {
	t.Helper()
	addr := h.sockets.tcp.Addr().(*net.TCPAddr).AddrPort()
	return linkBy(t, n, relay.ClientConfig{
		Relay: h.server.PublicKey(),
		Dial: func(ctx context.Context) (net.Conn, [16]byte, error) {
			return dialRelayTLS(ctx, addr.String(), n, pinOfKey(t, h.keys.Device))
		},
	}, addr, overTLS)
}

// linkBy connects a node to the relay of a configuration at an address.
func linkBy(t *testing.T, n testNode, c relay.ClientConfig, addr netip.AddrPort, overTLS bool) *relayed {
	t.Helper()
	r := &relayed{
		testNode: n, states: make(chan relay.State, 64), got: make(chan string, 64), here: map[punch.Key]bool{},
		socket: must[*net.UDPConn](t)(net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})),
	}
	var err error
	r.client, err = relay.NewClient(relay.ClientConfig{
		Relay: c.Relay, Dial: c.Dial, PrivateKey: n.w, Device: n.device, Boot: uint64(time.Now().UnixNano()),
		Credentials: trust.Credentials(n.node.Cap, n.node.Cert),
		Send: func(b []byte, to netip.AddrPort) error {
			if overTLS {
				return errors.New("udp is blocked")
			}
			_, err := r.socket.WriteToUDPAddrPort(b, to)
			return err
		},
		Deliver: func(run []byte) {
			for len(run) > 2 {
				size := 2 + int(binary.BigEndian.Uint16(run))
				r.got <- string(run[2+8 : size])
				run = run[size:]
			}
		},
		OnState: func(s relay.State) { r.states <- s },
		OnPeer: func(k punch.Key, here bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.here[k] = here
		},
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.client.SetAddrs([]netip.AddrPort{addr})
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return r.client.Run(ctx) })
	g.Go(func() error { r.read(); return nil })
	t.Cleanup(func() {
		cancel()
		_ = r.socket.Close()
		_ = g.Wait()
	})
	return r
}

func dialRelayTLS(ctx context.Context, addr string, n testNode, pin trust.Hash) (net.Conn, [16]byte, error) {
	d := coord.Dialer{Servers: []string{addr}, Device: n.device, Verify: func(got trust.Hash) error {
		if got != pin {
			return errors.New("another relay")
		}
		return nil
	}}
	c, err := d.Dial(ctx)
	if err != nil {
		return nil, [16]byte{}, err
	}
	exported, err := c.Export(coord.ExporterRelay)
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, c.Close())
	}
	up, err := c.Upgrade(ctx, coord.RelayPath, coord.RelayProtocol)
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, c.Close())
	}
	return up, [16]byte(exported), nil
}

func (r *relayed) read() {
	b := make([]byte, 2048)
	for {
		n, from, err := r.socket.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		switch {
		case b[0] == relay.ControlByte:
			r.client.Receive(b[:n], from)
		case b[0] == relay.FlowByte:
			r.got <- string(b[8:n])
		default:
			r.got <- "stun " + string(b[:n])
		}
	}
}

// await waits for a state that suits.
func (r *relayed) await(t *testing.T, what string, suits func(relay.State) bool) {
	t.Helper()
	timeout := time.After(5 * time.Second)
	var last relay.State
	for {
		select {
		case last = <-r.states:
			if suits(last) {
				return
			}
		case <-timeout:
			t.Fatalf("not %s; last state %+v", what, last)
		}
	}
}

func over(tr relay.Transport) func(relay.State) bool {
	return func(s relay.State) bool { return s.Transport == tr }
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// say sends a payload in the flow between two nodes.
func (r *relayed) say(h *relayHost, to *relayed, text string, overTLS bool) {
	flow := relay.FlowOf(r.key(), to.key())
	frame := append(flow[:], text...)
	if overTLS {
		r.client.Offer(append(binary.BigEndian.AppendUint16(nil, uint16(len(frame))), frame...))
		return
	}
	_, _ = r.socket.WriteToUDPAddrPort(frame, h.sockets.tcp.Addr().(*net.TCPAddr).AddrPort())
}

func (r *relayed) hears(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-r.got:
		if got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	case <-time.After(5 * time.Second):
		t.Fatalf("%q did not come", want)
	}
}

// With its server down a restarted relay forwards between nodes of its mesh, one
// that it never heard of among them, over UDP and TLS.
func TestRelayHostServesWithoutItsServer(t *testing.T) {
	m := newTestMesh(t)
	host, alice, bob := m.relay("fra"), m.node("alice", m.signer), m.node("bob", m.signer)
	h := startRelayHost(t, m, host, &coord.Netmap{Nodes: []coord.Node{alice.node}})
	a, b := linkTo(t, alice, h, false), linkTo(t, bob, h, true)
	a.await(t, "on udp", over(relay.UDP))
	b.await(t, "on tls", over(relay.TLS))
	a.client.SetPeers([]punch.Key{b.key()})
	b.client.SetPeers([]punch.Key{a.key()})
	eventually(t, "the peers do not see each other", func() bool { return a.sees(b.key()) && b.sees(a.key()) })
	a.say(h, b, "to bob", false)
	b.hears(t, "to bob")
	b.say(h, a, "to alice", true)
	a.hears(t, "to alice")
	eventually(t, "not two nodes, one of them over tls, and two datagrams", func() bool { // counted after they left
		st := h.server.Stats()
		return st.Nodes == 2 && st.Streams == 1 && st.Datagrams == 2
	})
}

// Only nodes that the mesh holds are served: no foreign ones, no other relay,
// nobody that was withdrawn, now or before the restart.
func TestRelayHostKeepsOthersOut(t *testing.T) {
	m, foreign := newTestMesh(t), newTestMesh(t)
	host, other, alice, bob := m.relay("fra"), m.relay("nyc"), m.node("alice", m.signer), m.node("bob", m.signer)
	h := startRelayHost(t, m, host, &coord.Netmap{
		Nodes: []coord.Node{alice.node, bob.node}, Revocations: []trust.Document{m.revoke(bob)},
	})
	for name, n := range map[string]testNode{"foreign": foreign.node("alice", foreign.signer), "relay": other, "revoked": bob} {
		id, err := h.verify(trust.Credentials(n.node.Cap, n.node.Cert))
		if err == nil {
			t.Errorf("%s: verified as %+v", name, id)
		}
	}
	if _, err := h.verify(nil); err == nil {
		t.Error("nothing was verified")
	}
	linkTo(t, bob, h, false).await(t, "refused", func(s relay.State) bool {
		return s.Transport == relay.None && s.Err != nil
	})
	a := linkTo(t, alice, h, false)
	a.await(t, "on udp", over(relay.UDP))
	h.event(coord.Event{Delta: &coord.Netmap{Revocations: []trust.Document{m.revoke(alice)}}})
	if st := h.server.Stats(); st.Nodes != 0 {
		t.Errorf("stats after the revocation %+v", st)
	}
	// It holds after a restart, too.
	h.saveCache()
	again := &relayHost{store: h.store, control: h.control, roster: m.roster(host), log: h.log}
	again.doorkeeper = doorkeeper{&again.mu, again.roster.mesh}
	again.loadCache()
	if _, err := again.verify(trust.Credentials(alice.node.Cap, alice.node.Cert)); !errors.Is(err, trust.ErrRevoked) {
		t.Errorf("alice after a restart: %v", err)
	}
}

func (m *testMesh) revoke(n testNode) trust.Document {
	return must[trust.Document](m.t)(trust.SignRevocation(trust.Revocation{
		Target: n.cert.Device, By: publicOf(m.signer), From: m.now,
	}, m.signer))
}

// STUN is answered to who has a session, and to nobody else.
func TestRelayHostTellsNodesTheirAddress(t *testing.T) {
	m := newTestMesh(t)
	host, alice := m.relay("fra"), m.node("alice", m.signer)
	h := startRelayHost(t, m, host, &coord.Netmap{})
	a := linkTo(t, alice, h, false)
	a.await(t, "on udp", over(relay.UDP))
	to := h.sockets.tcp.Addr().(*net.TCPAddr).AddrPort()
	user, key := a.client.STUN()
	ask := func(setters ...stun.Setter) {
		msg := stun.MustBuild(append([]stun.Setter{stun.TransactionID, stun.BindingRequest}, setters...)...)
		_, _ = a.socket.WriteToUDPAddrPort(msg.Raw, to)
	}
	padding := stun.RawAttribute{Type: punch.AttrPadding, Value: make([]byte, 80)}
	ask()
	ask(padding)
	ask(stun.Username(user), padding, stun.MessageIntegrity("wrong key"))
	ask(stun.Username("somebody"), padding, stun.MessageIntegrity(key))
	ask(stun.Username(user), padding, stun.MessageIntegrity(key))
	select {
	case got := <-a.got:
		raw, ok := strings.CutPrefix(got, "stun ")
		answer := &stun.Message{Raw: []byte(raw)}
		if err := answer.Decode(); !ok || err != nil || stun.MessageIntegrity(key).Check(answer) != nil {
			t.Fatalf("got %q, %v", got, err)
		}
		var seen stun.XORMappedAddress
		if err := seen.GetFrom(answer); err != nil || seen.Port != a.socket.LocalAddr().(*net.UDPAddr).Port {
			t.Errorf("seen at %v, %v", seen, err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("no answer")
	}
	select {
	case got := <-a.got:
		t.Errorf("one answer more: %q", got)
	case <-time.After(50 * time.Millisecond):
	}
}

func TestRelayPublishesItsPublicAddressFirst(t *testing.T) {
	m := newTestMesh(t)
	host := m.relay("fra")
	sockets := must[*relaySockets](t)(listenRelay("127.0.0.1:0"))
	defer sockets.close()
	c := RelayConfig{StateDir: relayDir(t, m, host, &coord.Netmap{}), Public: "192.0.2.7:8443"}
	c.setDefaults()
	h := must[*relayHost](t)(newRelayHost(c, m.membership(host), sockets))
	h.lookupPublic(t.Context())
	p := must[*coord.Publish](t)(h.control.record())
	rec := must[trust.Record](t)(trust.OpenRecord(p.Record))
	want := trust.Endpoint{Addr: netip.MustParseAddrPort("192.0.2.7:8443"), Type: uint8(punch.PortMapped)}
	if len(rec.Candidates) != 1 || rec.Candidates[0] != want {
		t.Errorf("published %v, want %v", rec.Candidates, want)
	}
}

func TestServeRelayRefusesWhatIsNoRelay(t *testing.T) {
	m := newTestMesh(t)
	node := m.node("alice", m.signer)
	dir := relayDir(t, m, node, &coord.Netmap{})
	serve := func(c RelayConfig, invite string) *Error {
		c.Listen = "127.0.0.1:0"
		e, _ := errors.AsType[*Error](ServeRelay(t.Context(), c, invite, func(string) { t.Error("it serves") }))
		return e
	}
	if e := serve(RelayConfig{StateDir: dir}, ""); e == nil || e.Kind != Refused || !strings.Contains(e.Message, `the node "alice"`) {
		t.Errorf("the directory of a node: %+v", e)
	}
	if e := serve(RelayConfig{StateDir: t.TempDir()}, ""); e == nil || e.Kind != Refused || !strings.Contains(e.Hint, "overlay invite --tag relay") {
		t.Errorf("not joined: %+v", e)
	}
	dir = relayDir(t, m, m.relay("fra"), &coord.Netmap{})
	unlock, err := (store{dir}).lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if e := serve(RelayConfig{StateDir: dir}, ""); e == nil || !strings.Contains(e.Hint, "another --state DIR") {
		t.Errorf("a second relay: %+v", e)
	}
	unlock()
	if e := serve(RelayConfig{StateDir: dir, Name: "nyc"}, ""); e == nil || e.Kind != Usage || strings.Contains(e.Hint, "overlay leave") {
		t.Errorf("another name: %+v", e)
	}
	foreign := coord.Invite{Kind: coord.InviteMember, Hash: [32]byte{1}, Server: "192.0.2.1:443"}
	if e := serve(RelayConfig{StateDir: dir}, foreign.String()); e == nil || e.Kind != Refused || strings.Contains(e.Hint, "overlay leave") {
		t.Errorf("an invite of another mesh: %+v", e)
	}
}
