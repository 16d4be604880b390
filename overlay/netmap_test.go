package overlay

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/tun"
)

// testMesh holds every key of a mesh, so that tests can sign the truth and lies.
type testMesh struct {
	t                    *testing.T
	root, signer, server ed25519.PrivateKey
	genesis, state       trust.Document
	hash                 trust.Hash
	ula, prefix4         netip.Prefix
	now                  time.Time
	nextIP               netip.Addr
}

type testNode struct {
	device ed25519.PrivateKey
	w      wgtypes.Key
	node   coord.Node
	cert   trust.NodeCert
}

func newKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newTestMesh(t *testing.T) *testMesh {
	m := &testMesh{
		t: t, root: newKey(t), signer: newKey(t), server: newKey(t),
		ula: netip.MustParsePrefix("fd00:1:2::/48"), prefix4: netip.MustParsePrefix("100.90.0.0/16"),
		now: time.Now().UTC().Truncate(time.Second), nextIP: netip.MustParseAddr("100.90.0.1"),
	}
	spki := must[[]byte](t)(x509.MarshalPKIXPublicKey(m.server.Public()))
	pin := trust.Hash(sha256.Sum256(spki))
	m.genesis = must[trust.Document](t)(trust.SignGenesis(trust.Genesis{
		MeshID: [16]byte{1}, Root: publicOf(m.root), Signer: publicOf(m.signer), ULA: m.ula, Pin: pin,
	}, m.root))
	m.hash = m.genesis.Hash()
	m.state = must[trust.Document](t)(trust.SignState(trust.State{
		Epoch: 1, Name: "home", Prefix4: m.prefix4, Servers: []string{"192.0.2.1:443"},
		Pins: []trust.Pin{{Hash: pin, Status: trust.PinCurrent}}, Signers: []trust.Key{publicOf(m.signer)},
	}, m.root))
	return m
}

// node admits a new device by an invite of its own, signed by signer.
func (m *testMesh) node(name string, signer ed25519.PrivateKey) testNode {
	t := m.t
	inv, device := newKey(t), newKey(t)
	w := must[wgtypes.Key](t)(wgtypes.GeneratePrivateKey())
	invCap := must[trust.Document](t)(trust.SignInviteCap(trust.InviteCap{
		Invite: publicOf(inv), Signer: publicOf(signer),
		NotBefore: m.now.Add(-time.Hour), NotAfter: m.now.Add(time.Hour), Uses: 1,
	}, signer))
	c := trust.NodeCert{
		Invite: publicOf(inv), Device: publicOf(device), WireGuard: trust.Key(w.PublicKey()), Name: name,
		IP4: m.nextIP, IP6: trust.DeriveIP6(m.ula, m.hash, publicOf(device)),
		Role: trust.RoleNode, Serial: 1, IssuedAt: m.now,
	}
	m.nextIP = m.nextIP.Next()
	cert := must[trust.Document](t)(trust.SignNodeCert(c, inv, device))
	signed := must[trust.Document](t)(trust.Countersign(cert, m.now, m.server))
	return testNode{device, w, coord.Node{Device: c.Device, Cap: invCap, Cert: signed, Online: true}, c}
}

func (m *testMesh) membership(n testNode) *membership {
	return &membership{TrustHash: m.hash, Genesis: m.genesis, State: m.state, Cap: n.node.Cap, Cert: n.node.Cert}
}

func (m *testMesh) roster(self testNode) *roster {
	return must[*roster](m.t)(newRoster(m.membership(self), slog.New(slog.DiscardHandler)))
}

func names(r *roster) []string {
	var list []string
	for _, x := range r.members {
		list = append(list, x.cert.Name)
	}
	slices.Sort(list)
	return list
}

func TestRosterTakesVerifiedNodesOnly(t *testing.T) {
	m := newTestMesh(t)
	self, bob := m.node("alice", m.signer), m.node("bob", m.signer)
	mallory := m.node("mallory", newKey(t)) // an invite of nobody's
	swapped := m.node("carol", m.signer)
	swapped.node.Device = bob.node.Device // another device's certificate
	r := m.roster(self)
	_, changed := r.apply(&coord.Netmap{Nodes: []coord.Node{self.node, bob.node, mallory.node, swapped.node}}, true)
	if got := names(r); !slices.Equal(got, []string{"bob"}) {
		t.Fatalf("members %v, want bob only", got)
	}
	if len(changed) != 1 || changed[0].Key != punch.Key(bob.w.PublicKey()) || !changed[0].Online {
		t.Fatalf("changed %+v, want bob online", changed)
	}
}

func TestRosterRefusesStolenAddressAndName(t *testing.T) {
	m := newTestMesh(t)
	self, bob := m.node("alice", m.signer), m.node("bob", m.signer)
	m.nextIP = bob.cert.IP4
	thief := m.node("thief", m.signer) // bob's IPv4
	double := m.node("bob", m.signer)  // bob's name
	r := m.roster(self)
	r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, true)
	r.apply(&coord.Netmap{Nodes: []coord.Node{thief.node, double.node}}, false)
	if got := names(r); !slices.Equal(got, []string{"bob"}) || r.members[bob.cert.Device] == nil {
		t.Fatalf("members %v, want the first bob only", got)
	}
}

// Whom the server no longer names is offline, but stays a member: else the
// server could give bob's name and address to a device of its choice.
func TestServerAloneRemovesNobody(t *testing.T) {
	m := newTestMesh(t)
	self, bob, carol := m.node("alice", m.signer), m.node("bob", m.signer), m.node("carol", m.signer)
	m.nextIP = bob.cert.IP4
	thief := m.node("thief", m.signer) // bob's IPv4
	double := m.node("bob", m.signer)  // bob's name
	m.nextIP = self.cert.IP4
	twin := m.node("alice-2", m.signer) // our own IPv4
	r := m.roster(self)
	r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node, carol.node}}, true)
	for _, step := range []struct {
		says  coord.Netmap
		whole bool
	}{
		{coord.Netmap{Nodes: []coord.Node{carol.node}}, true},
		{coord.Netmap{Removed: []trust.Key{bob.cert.Device, self.cert.Device}}, false},
		{coord.Netmap{Nodes: []coord.Node{thief.node, double.node, twin.node}}, false},
	} {
		if gone, _ := r.apply(&step.says, step.whole); len(gone) != 0 {
			t.Fatalf("gone %v after %+v", gone, step.says)
		}
		if x := r.members[bob.cert.Device]; x == nil || x.node.Online {
			t.Fatalf("bob is %+v after %+v, want offline", x, step.says)
		}
	}
	if got := names(r); !slices.Equal(got, []string{"bob", "carol"}) {
		t.Fatalf("members %v", got)
	}
	if _, changed := r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, false); len(changed) != 1 || !changed[0].Online {
		t.Fatalf("changed %+v, want bob online again", changed)
	}
}

func TestRosterHonoursRevocation(t *testing.T) {
	m := newTestMesh(t)
	self, bob := m.node("alice", m.signer), m.node("bob", m.signer)
	r := m.roster(self)
	r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, true)
	rev := must[trust.Document](t)(trust.SignRevocation(trust.Revocation{
		Target: bob.cert.Device, By: bob.cert.Device, From: m.now,
	}, bob.device))
	gone, _ := r.apply(&coord.Netmap{Revocations: []trust.Document{rev}}, false) // and a server that does not remove it
	if len(gone) != 1 {
		t.Fatalf("gone %v, want bob", gone)
	}
	r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, false) // a server that brings the device back
	if len(r.members) != 0 {
		t.Fatalf("members %v, want none: bob left", names(r))
	}
}

func TestRosterKeepsNewestRecord(t *testing.T) {
	m := newTestMesh(t)
	self, bob := m.node("alice", m.signer), m.node("bob", m.signer)
	r := m.roster(self)
	record := func(serial uint64, by ed25519.PrivateKey) trust.Document {
		return must[trust.Document](t)(trust.SignRecord(trust.Record{
			Device: publicOf(by), Serial: serial, Nonce: [16]byte{byte(serial)},
		}, by))
	}
	for _, step := range []struct {
		doc  trust.Document
		want byte
	}{
		{record(5, bob.device), 5},
		{record(4, bob.device), 5},   // replayed
		{nil, 5},                     // withheld
		{record(9, self.device), 5},  // another device's
		{trust.Document("noise"), 5}, // damaged
		{record(6, bob.device), 6},
	} {
		n := bob.node
		n.Record = step.doc
		r.apply(&coord.Netmap{Nodes: []coord.Node{n}}, false)
		if got := r.members[bob.cert.Device].record.Nonce[0]; got != step.want {
			t.Fatalf("record %d, want %d", got, step.want)
		}
		again := m.roster(self)
		again.apply(&coord.Netmap{Nodes: r.snapshot().Nodes}, true)
		if got := again.members[bob.cert.Device].record.Nonce[0]; got != step.want {
			t.Fatalf("record %d after a restart from the cache, want %d", got, step.want)
		}
	}
}

// What a peer takes is what its latest record says, for the data plane as well.
// Bits of later programs go along and mean nothing there.
func TestCapabilitiesAreThoseOfTheLatestRecord(t *testing.T) {
	m := newTestMesh(t)
	self, bob := m.node("alice", m.signer), m.node("bob", m.signer)
	own := punch.Key(self.w.PublicKey())
	takes := func(r *roster) tun.Capabilities { return r.peers(own)[0].Capabilities }
	r := m.roster(self)
	r.apply(&coord.Netmap{Nodes: []coord.Node{bob.node}}, true)
	if got := takes(r); got != 0 {
		t.Fatalf("capabilities %b before any record", got)
	}
	const later = 1 << 15
	for i, step := range []struct {
		serial    uint64
		say, want tun.Capabilities
	}{
		{5, tun.Large, tun.Large},
		{4, 0, tun.Large}, // replayed
		{6, 0, 0},
		{7, tun.Large | later, tun.Large | later},
		{8, later, later},
	} {
		n := bob.node
		n.Record = must[*coord.Publish](t)(newPublish(bob.device, trust.Record{Serial: step.serial, Capabilities: uint16(step.say)}, nil)).Record
		r.apply(&coord.Netmap{Nodes: []coord.Node{n}}, false)
		if got := takes(r); got != step.want {
			t.Fatalf("step %d: capabilities %b, want %b", i, got, step.want)
		}
		again := m.roster(self)
		again.apply(&coord.Netmap{Nodes: r.snapshot().Nodes}, true)
		if got := takes(again); got != step.want {
			t.Fatalf("step %d: capabilities %b after a restart from the cache, want %b", i, got, step.want)
		}
	}
}

func TestOneSideInitiates(t *testing.T) {
	m := newTestMesh(t)
	a, b := m.node("alice", m.signer), m.node("bob", m.signer)
	ra, rb := m.roster(a), m.roster(b)
	ra.apply(&coord.Netmap{Nodes: []coord.Node{b.node}}, true)
	rb.apply(&coord.Netmap{Nodes: []coord.Node{a.node}}, true)
	pa := ra.peers(punch.Key(a.w.PublicKey()))[0]
	pb := rb.peers(punch.Key(b.w.PublicKey()))[0]
	if pa.Initiate == pb.Initiate {
		t.Fatalf("both sides have Initiate %v", pa.Initiate)
	}
	want := []netip.Prefix{host(b.cert.IP4), host(b.cert.IP6)}
	if !slices.Equal(pa.AllowedIPs, want) {
		t.Fatalf("allowed IPs %v, want exactly %v", pa.AllowedIPs, want)
	}
}

func TestPublishNamesNoPrivateAddress(t *testing.T) {
	device := newKey(t)
	addr := netip.MustParseAddrPort
	p := must[*coord.Publish](t)(newPublish(device, trust.Record{Nonce: punch.Nonce{1}, Serial: 7}, []punch.Candidate{
		{Addr: addr("203.0.113.9:4000"), Type: punch.ServerReflexive, Token: []byte("t")},
		{Addr: addr("203.0.113.9:4001"), Type: punch.ServerReflexive}, // unproven
		{Addr: addr("192.168.1.5:4000"), Type: punch.Host},
		{Addr: addr("198.51.100.7:4000"), Type: punch.Host},
		{Addr: addr("[fd00::1]:4000"), Type: punch.Host},
		{Addr: addr("[2001:db8::1]:4000"), Type: punch.Host},
	}))
	rec := must[trust.Record](t)(trust.OpenRecord(p.Record))
	var got []string
	for _, e := range rec.Candidates {
		got = append(got, e.Addr.String())
	}
	if want := []string{"203.0.113.9:4000", "[2001:db8::1]:4000"}; !slices.Equal(got, want) {
		t.Fatalf("published %v, want %v", got, want)
	}
	if len(p.Tokens) != 1 || rec.Serial != 7 {
		t.Fatalf("tokens %d serial %d, want 1 and 7", len(p.Tokens), rec.Serial)
	}
}
