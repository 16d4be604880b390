package server

import (
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"overlay/coord"
	"overlay/coord/trust"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		runChild(dir)
	}
	goleak.VerifyTestMain(m)
}

// running is a server on loopback.
type running struct {
	*Server
	dir  string
	stop func()
}

func start(t testing.TB, dir string) *running {
	t.Helper()
	s, err := Open(Config{Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, s)
	r.dir = dir
	return r
}

// run serves until the test ends or stop is called.
func run(t testing.TB, s *Server) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error("run:", err)
		}
	})
	stop := sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return &running{Server: s, stop: stop}
}

// node is a device with its keys.
type node struct {
	device    ed25519.PrivateKey
	wireguard [32]byte
	member    coord.Membership
}

func newNode(t testing.TB) *node {
	t.Helper()
	w, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &node{device: newKey(t), wireguard: [32]byte(w.Bytes())}
}

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func public(k ed25519.PrivateKey) trust.Key { return trust.Key(k[ed25519.SeedSize:]) }

func (n *node) cert(t testing.TB) trust.NodeCert {
	t.Helper()
	doc, _, _, err := trust.OpenCountersigned(n.member.Cert)
	if err != nil {
		t.Fatal(err)
	}
	c, err := trust.OpenNodeCert(doc)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// owner is the first device, with the keys of the mesh.
type owner struct {
	*node
	root, signer ed25519.PrivateKey
	config       coord.JoinConfig
	server       string
}

// found makes the first device own the server's mesh.
func found(t testing.TB, s *running) *owner {
	t.Helper()
	invite, ok := s.OwnerInvite()
	if !ok {
		t.Fatal("no owner invite")
	}
	o := newOwner(t, invite)
	var err error
	if o.member, err = coord.Join(t.Context(), o.config, nil); err != nil {
		t.Fatal("found:", err)
	}
	return o
}

func newOwner(t testing.TB, invite coord.Invite) *owner {
	t.Helper()
	o := &owner{node: newNode(t), root: newKey(t), signer: newKey(t), server: invite.Server}
	ula, prefix := coord.DrawPrefixes(rand.Reader, nil)
	o.config = coord.JoinConfig{
		Invite: invite, Device: o.device, WireGuard: o.wireguard, Name: "anna",
		Root: o.root, Signer: o.signer, MeshID: [16]byte{1}, ULA: ula, Prefix4: prefix,
	}
	return o
}

func (n *node) dial(t testing.TB, server string) *coord.Conn {
	t.Helper()
	d := coord.Dialer{Servers: []string{server}, Device: n.device}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// invite makes an invite of which change may change the capability.
func (o *owner) invite(t testing.TB, change func(*trust.InviteCap)) coord.Invite {
	t.Helper()
	i, doc := o.capability(t, o.signer, change)
	if err := o.dial(t, o.server).Invite(t.Context(), coord.InviteRequest{Cap: doc}); err != nil {
		t.Fatal("invite:", err)
	}
	return i
}

func (o *owner) capability(t testing.TB, signer ed25519.PrivateKey, change func(*trust.InviteCap)) (coord.Invite, trust.Document) {
	t.Helper()
	i, err := coord.NewInvite(coord.InviteMember, o.member.TrustHash, o.server)
	if err != nil {
		t.Fatal(err)
	}
	c := trust.InviteCap{
		Invite: public(i.Key()), Signer: public(signer), Uses: 1,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(&c)
	}
	doc, err := trust.SignInviteCap(c, signer)
	if err != nil {
		t.Fatal(err)
	}
	return i, doc
}

func uses(n uint16) func(*trust.InviteCap) { return func(c *trust.InviteCap) { c.Uses = n } }

func (n *node) join(t testing.TB, i coord.Invite, name string) error {
	t.Helper()
	var err error
	n.member, err = coord.Join(t.Context(), coord.JoinConfig{
		Invite: i, Device: n.device, WireGuard: n.wireguard, Name: name,
	}, nil)
	return err
}

// joined is a new member.
func (o *owner) joined(t testing.TB, name string) *node {
	t.Helper()
	n := newNode(t)
	if err := n.join(t, o.invite(t, nil), name); err != nil {
		t.Fatal("join:", err)
	}
	return n
}

func (n *node) stream(t testing.TB, server, resume string) *coord.Stream {
	t.Helper()
	s, err := n.dial(t, server).Stream(t.Context(), resume)
	if err != nil {
		t.Fatal("stream:", err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (n *node) revocation(t testing.TB, target trust.Key, by ed25519.PrivateKey) coord.RevokeRequest {
	t.Helper()
	doc, err := trust.SignRevocation(trust.Revocation{Target: target, By: public(by), From: time.Now()}, by)
	if err != nil {
		t.Fatal(err)
	}
	return coord.RevokeRequest{Revocation: doc}
}

func codeOf(err error) coord.Code {
	var e *coord.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func wantCode(t testing.TB, err error, want coord.Code) {
	t.Helper()
	if codeOf(err) != want {
		t.Errorf("got %v (%s), want %s", err, codeOf(err), want)
	}
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
