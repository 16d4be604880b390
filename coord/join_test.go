package coord

import (
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlay/coord/trust"
)

// meshServer is a coordination server that knows one mesh and keeps nothing:
// it verifies what it is sent and answers by the protocol. Its fields make it
// lie.
type meshServer struct {
	t         *testing.T
	key       ed25519.PrivateKey
	challenge [32]byte
	plan      Plan

	mu       sync.Mutex
	genesis  trust.Document
	state    trust.Document
	owned    [][]byte       // bodies of /v1/own
	lose     int            // answers to /v1/own and /v1/cert to lose
	busy     int            // requests to /v1/join to put off
	kept     trust.Document // the owner's certificate
	role     string         // asked for
	granted  trust.Document
	name     string // given instead of the one asked for
	countKey ed25519.PrivateKey
	recut    func(trust.NodeCert) trust.NodeCert // and signed by other keys
	reached  bool                                // by anything but hello
}

func newMeshServer(t *testing.T) *meshServer {
	key := testKey("server")
	return &meshServer{t: t, key: key, countKey: key, challenge: testWireGuard("server"), plan: Plan{Name: "lab"}}
}

func (s *meshServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path == "/v1/hello" {
		reply(w, http.StatusOK, s.hello())
		return
	}
	s.reached = true
	d := trust.Key(r.TLS.PeerCertificates[0].PublicKey.(ed25519.PublicKey))
	x, err := r.TLS.ExportKeyingMaterial(ExporterJoin, nil, exporterSize)
	if err != nil {
		s.t.Error(err)
	}
	switch r.URL.Path {
	case "/v1/own":
		s.own(w, r, x)
	case "/v1/join":
		s.join(w, r, x, d)
	case "/v1/cert":
		s.cert(w, r, d)
	}
}

func (s *meshServer) hello() Hello {
	h := Hello{Genesis: s.genesis, State: s.state, Time: someDate(), Challenge: x25519(s.t, s.challenge).PublicKey().Bytes()}
	if len(s.genesis) == 0 {
		h.Plan = &s.plan
	}
	return h
}

func (s *meshServer) own(w http.ResponseWriter, r *http.Request, x []byte) {
	var q OwnRequest
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		s.t.Error(err)
	}
	cert, err := trust.OpenNodeCert(q.Cert)
	if err != nil {
		s.t.Error(err)
	}
	if err := s.proven(q.Proofs, publicKey(ownerInvite(s.t, "x:1").Key()), x, cert.Device, cert.WireGuard); err != nil {
		s.t.Error(err)
	}
	signed := slices.Concat(q.Genesis, q.State, q.Cap, q.Cert)
	s.genesis, s.state, s.owned = q.Genesis, q.State, append(s.owned, signed)
	if s.kept == nil {
		s.kept = q.Cert
	}
	s.answerCert(w, s.kept)
}

func (s *meshServer) join(w http.ResponseWriter, r *http.Request, x []byte, d trust.Key) {
	var q JoinRequest
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		s.t.Error(err)
	}
	if err := s.proven(q.Proofs, q.Invite, x, d, q.WireGuard); err != nil {
		s.t.Error(err)
	}
	s.role = q.Role
	if s.busy > 0 {
		s.busy--
		w.Header().Set("Retry-After", "1")
		reply(w, http.StatusTooManyRequests, Error{Code: CodeRateLimited, Message: "too many joins"})
		return
	}
	name := q.Name
	if s.name != "" {
		name = s.name
	}
	reply(w, http.StatusOK, JoinReply{Cap: s.granted, Name: name, IP4: netip.MustParseAddr("100.70.0.9")})
}

func (s *meshServer) cert(w http.ResponseWriter, r *http.Request, d trust.Key) {
	var q CertRequest
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		s.t.Error(err)
	}
	cert, err := trust.OpenNodeCert(q.Cert)
	if err != nil || cert.Device != d {
		s.t.Error("certificate of another device", err)
	}
	if s.recut != nil {
		cert = s.recut(cert)
		if q.Cert, err = trust.SignNodeCert(cert, memberInvite(s.t, "x:1").Key(), testKey("mallory")); err != nil {
			s.t.Error(err)
		}
	}
	s.answerCert(w, q.Cert)
}

func (s *meshServer) answerCert(w http.ResponseWriter, cert trust.Document) {
	if s.lose > 0 {
		s.lose--
		panic(http.ErrAbortHandler)
	}
	doc, err := trust.Countersign(cert, someDate(), s.countKey)
	if err != nil {
		s.t.Error(err)
	}
	reply(w, http.StatusOK, CertReply{Cert: doc})
}

func (s *meshServer) proven(p Proofs, invite trust.Key, x []byte, d, w trust.Key) error {
	if !ed25519.Verify(invite[:], InviteProofMessage(x, d, w), p.Invite) {
		return errors.New("the invite is not proven")
	}
	e := x25519(s.t, s.challenge)
	remote, err := e.Curve().NewPublicKey(w[:])
	if err != nil {
		return err
	}
	shared, err := e.ECDH(remote)
	if err != nil {
		return err
	}
	if !hmac.Equal(WireGuardProof(shared, x, [32]byte(e.PublicKey().Bytes()), d, w), p.WireGuard) {
		return errors.New("the WireGuard key is not proven")
	}
	return nil
}

func ownerInvite(t *testing.T, server string) Invite {
	return Invite{Kind: InviteOwner, Seed: [16]byte{1}, Hash: testPin(t, testKey("server")), Server: server}
}

// memberInvite is an invite without its trust hash.
func memberInvite(_ *testing.T, server string) Invite {
	return Invite{Kind: InviteMember, Seed: [16]byte{2}, Server: server}
}

func ownerConfig(t *testing.T, server string) JoinConfig {
	return JoinConfig{
		Invite: ownerInvite(t, server), Device: testKey("anna"), WireGuard: testWireGuard("anna"), Name: "anna-laptop",
		Root: testKey("root"), Signer: testKey("signer"), MeshID: [16]byte{7},
		ULA: netip.MustParsePrefix("fd00:1:2::/48"), Prefix4: netip.MustParsePrefix("100.70.0.0/16"),
		Date: someDate().Add(time.Hour),
	}
}

// founded is a server whose mesh the owner has founded and which holds the
// capability of memberInvite, and the configuration of a second device.
func founded(t *testing.T) (*meshServer, JoinConfig) {
	t.Helper()
	s := newMeshServer(t)
	addr := serve(t, s.key, s)
	owner, err := Join(t.Context(), ownerConfig(t, addr), nil)
	if err != nil {
		t.Fatal(err)
	}
	invite := memberInvite(t, addr)
	invite.Hash = owner.TrustHash
	s.grant(invite, "laptop")
	s.reached = false
	return s, JoinConfig{Invite: invite, Device: testKey("bob"), WireGuard: testWireGuard("bob"), Name: "bob"}
}

// grant makes the capability of an invite.
func (s *meshServer) grant(invite Invite, tags ...string) {
	s.t.Helper()
	var err error
	s.granted, err = trust.SignInviteCap(trust.InviteCap{
		Invite: publicKey(invite.Key()), Signer: publicKey(testKey("signer")), Uses: 1, Tags: tags,
		NotBefore: someDate().Add(-time.Hour), NotAfter: someDate().Add(time.Hour),
	}, testKey("signer"))
	if err != nil {
		s.t.Fatal(err)
	}
}

// A relay is admitted by an invite that says so, and by no other: the device
// signs nothing then.
func TestJoinAsRelay(t *testing.T) {
	s, c := founded(t)
	c.Role = trust.RoleRelay
	_, err := Join(t.Context(), c, nil)
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Code != CodeNotRelay || e.Message != "this invite does not admit a relay" || e.Hint != "make one with: overlay invite --tag relay" {
		t.Errorf("without the tag: %v", err)
	}
	s.grant(c.Invite, "laptop", trust.RelayTag)
	m, err := Join(t.Context(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if cert := certOf(t, m); cert.Role != trust.RoleRelay || s.role != "relay" {
		t.Errorf("asked for %q, role %v", s.role, cert.Role)
	}
	c.Role = 0
	if m, err = Join(t.Context(), c, nil); err != nil || certOf(t, m).Role != trust.RoleNode || s.role != "" {
		t.Errorf("a node by that invite: asked for %q, %v", s.role, err)
	}
	owner := ownerConfig(t, c.Invite.Server)
	owner.Role = trust.RoleRelay
	if _, err = Join(t.Context(), owner, nil); err == nil {
		t.Error("a relay owns the mesh")
	}
}

// Through a proxy a device joins a server whose name only the proxy knows.
func TestJoinThroughProxy(t *testing.T) {
	_, c := founded(t)
	p := &proxy{t: t, login: "bob:secret", names: map[string]string{"vpn.invalid:443": c.Invite.Server}}
	c.Server, c.Proxy = "vpn.invalid:443", p.start()
	c.Proxy.User = url.UserPassword("bob", "secret")
	var said []string
	if _, err := Join(t.Context(), c, func(step, detail string) { said = append(said, step+" "+detail) }); err != nil {
		t.Fatal(err)
	}
	if want := "server vpn.invalid:443 (through the proxy " + c.Proxy.Host + ")"; !slices.Contains(said, want) {
		t.Errorf("%q, want %q", said, want)
	}
}

// certOf verifies a membership as a peer does.
func certOf(t *testing.T, m Membership) trust.NodeCert {
	t.Helper()
	mesh, err := trust.NewMesh(m.TrustHash, m.Genesis, m.State)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := mesh.Admit(m.Cap, m.Cert)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestOwn(t *testing.T) {
	for _, tt := range []struct {
		name    string
		plan    Plan
		mesh    string
		prefix  string
		ip      string
		servers []string // "" is the one that was used
	}{
		{"nothing planned", Plan{}, "home", "100.70.0.0/16", "100.70.0.1", []string{""}},
		{
			"all planned",
			Plan{Name: "lab", Prefix4: netip.MustParsePrefix("100.99.0.0/16"), Servers: []string{"vpn.example.org:443"}},
			"lab", "100.99.0.0/16", "100.99.0.1",
			[]string{"", "vpn.example.org:443"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newMeshServer(t)
			s.plan = tt.plan
			addr := serve(t, s.key, s)
			m, err := Join(t.Context(), ownerConfig(t, addr), nil)
			if err != nil {
				t.Fatal(err)
			}
			mesh, err := trust.NewMesh(m.TrustHash, m.Genesis, m.State)
			if err != nil {
				t.Fatal(err)
			}
			if got := mesh.State(); got.Name != tt.mesh || got.Prefix4.String() != tt.prefix || !mesh.PinOK(testPin(t, s.key)) {
				t.Errorf("state %+v", got)
			}
			if c := certOf(t, m); c.Name != "anna-laptop" || c.IP4.String() != tt.ip || c.IssuedAt != ownerConfig(t, addr).Date {
				t.Errorf("certificate %+v", c)
			}
			tt.servers[0] = addr
			if diff := cmp.Diff(tt.servers, m.Servers); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// The server made the owner invite, so nothing it can sign with may be in the
// owner's capability.
func TestServerCannotUseTheOwnersCapability(t *testing.T) {
	s := newMeshServer(t)
	m, err := Join(t.Context(), ownerConfig(t, serve(t, s.key, s)), nil)
	if err != nil {
		t.Fatal(err)
	}
	granted, err := trust.OpenInviteCap(m.Cap)
	if err != nil {
		t.Fatal(err)
	}
	if granted.Invite == publicKey(ownerInvite(t, "x:1").Key()) || granted.Uses != 1 {
		t.Errorf("capability %+v", granted)
	}
}

func TestOwnAgainAfterALostAnswer(t *testing.T) {
	s := newMeshServer(t)
	s.lose = 1
	c := ownerConfig(t, serve(t, s.key, s))
	if _, err := Join(t.Context(), c, nil); err == nil {
		t.Fatal("joined without an answer")
	}
	m, err := Join(t.Context(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.owned) != 2 || !slices.Equal(s.owned[0], s.owned[1]) {
		t.Error("the repeat handed in other documents")
	}
	certOf(t, m)
	c.Name, c.Date = "anna-desktop", time.Time{}
	if m, err = Join(t.Context(), c, nil); err != nil {
		t.Fatal(err)
	}
	if got := certOf(t, m); got.Name != "anna-laptop" {
		t.Errorf("a repeat with other wishes renamed the device to %q", got.Name)
	}
}

func TestOwnRefusesAnotherServer(t *testing.T) {
	s := newMeshServer(t)
	c := ownerConfig(t, serve(t, testKey("mallory"), s))
	_, err := Join(t.Context(), c, nil)
	if got, ok := errors.AsType[*PinError](err); !ok || got.Want != c.Invite.Hash || got.Got != testPin(t, testKey("mallory")) {
		t.Errorf("error %v", err)
	}
	if s.reached {
		t.Error("the other server got a request")
	}
}

func TestJoin(t *testing.T) {
	s, c := founded(t)
	s.name = "bob-2"
	var steps []string
	m, err := Join(t.Context(), c, func(step, detail string) { steps = append(steps, step+": "+detail) })
	if err != nil {
		t.Fatal(err)
	}
	cert := certOf(t, m)
	if cert.Name != "bob-2" || cert.Device != publicKey(c.Device) || cert.Tags[0] != "laptop" || cert.IssuedAt != someDate() {
		t.Errorf("certificate %+v", cert)
	}
	want := []string{
		fmt.Sprintf("server: %s (127.0.0.1)", c.Invite.Server),
		fmt.Sprintf("joined: bob-2 100.70.0.9 %s", cert.IP6),
	}
	if diff := cmp.Diff(want, steps); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{c.Invite.Server}, m.Servers); diff != "" {
		t.Error(diff)
	}
}

func TestJoinThroughAnotherAddress(t *testing.T) {
	s, c := founded(t)
	listed := c.Invite.Server
	c.Invite.Server, c.Server = "192.0.2.1:443", serve(t, s.key, s)
	m, err := Join(t.Context(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{c.Server, listed}, m.Servers); diff != "" {
		t.Error(diff)
	}
}

func TestJoinRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		lie    func(*meshServer, *JoinConfig)
		want   error // ErrMesh, or the type of the error
		before bool  // anything but hello was asked
	}{
		{"another mesh", func(_ *meshServer, c *JoinConfig) { c.Invite.Hash[0] ^= 1 }, ErrMesh, true},
		{"forged state", func(s *meshServer, _ *JoinConfig) { s.state = slices.Clone(s.state); s.state[40] ^= 1 }, ErrMesh, true},
		{"no mesh", func(s *meshServer, _ *JoinConfig) { s.genesis = nil }, &Error{}, true},
		{"server of another key", func(s *meshServer, c *JoinConfig) { c.Server = serve(s.t, testKey("mallory"), s) }, &PinError{}, true},
		{"capability of another invite", func(_ *meshServer, c *JoinConfig) { c.Invite.Seed[0]++ }, ErrMesh, false},
		{"no capability", func(s *meshServer, _ *JoinConfig) { s.granted = nil }, ErrMesh, false},
		{"countersigned by another key", func(s *meshServer, _ *JoinConfig) { s.countKey = testKey("mallory") }, ErrMesh, false},
		{"another name for an exact one", func(s *meshServer, c *JoinConfig) { s.name, c.Exact = "mallory", true }, ErrMesh, false},
		{"certificate of another WireGuard key", func(s *meshServer, c *JoinConfig) {
			c.Device = testKey("mallory") // who can sign
			s.recut = func(c trust.NodeCert) trust.NodeCert {
				c.WireGuard = trust.Key(x25519(s.t, testWireGuard("mallory")).PublicKey().Bytes())
				return c
			}
		}, ErrMesh, false},
		{"certificate of another device", func(s *meshServer, _ *JoinConfig) {
			s.recut = func(c trust.NodeCert) trust.NodeCert {
				mesh, err := trust.OpenGenesis(s.genesis)
				if err != nil {
					s.t.Error(err)
				}
				c.Device = publicKey(testKey("mallory"))
				c.IP6 = trust.DeriveIP6(mesh.ULA, s.genesis.Hash(), c.Device)
				return c
			}
		}, ErrMesh, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c := founded(t)
			tt.lie(s, &c)
			m, err := Join(t.Context(), c, nil)
			if err == nil {
				t.Fatalf("joined %+v", certOf(t, m))
			}
			if !errors.Is(err, tt.want) && fmt.Sprintf("%T", err) != fmt.Sprintf("%T", tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if s.reached == tt.before {
				t.Errorf("more than hello was asked: %t", s.reached)
			}
		})
	}
}

func TestJoinWaitsForTheRate(t *testing.T) {
	s, c := founded(t)
	s.busy = 1
	var waited string
	_, err := Join(t.Context(), c, func(step, detail string) {
		if step == "wait" {
			waited = detail
		}
	})
	if err != nil || waited != "too many joins; next try in 1s" {
		t.Errorf("error %v, told %q", err, waited)
	}
	s.busy = 1
	ctx, cancel := context.WithCancel(t.Context())
	_, err = Join(ctx, c, func(step, _ string) {
		if step == "wait" {
			cancel()
		}
	})
	if refused, ok := errors.AsType[*Error](err); !errors.Is(err, context.Canceled) || !ok || refused.Code != CodeRateLimited {
		t.Errorf("error %v", err)
	}
}

func TestJoinConfigIsChecked(t *testing.T) {
	for name, change := range map[string]func(*JoinConfig){
		"name":   func(c *JoinConfig) { c.Name = "Büro PC" },
		"server": func(c *JoinConfig) { c.Server = "vpn.example.org" },
		"device": func(c *JoinConfig) { c.Device = nil },
		"root":   func(c *JoinConfig) { c.Root = nil },
		"signer": func(c *JoinConfig) { c.Signer = c.Signer[:32] },
	} {
		c := ownerConfig(t, "127.0.0.1:1")
		change(&c)
		_, err := Join(t.Context(), c, nil)
		if _, reached := errors.AsType[*ReachError](err); err == nil || reached {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// Neither keys nor the invite's seed may show up in what Join says.
func TestJoinKeepsSecrets(t *testing.T) {
	_, c := founded(t)
	c.Invite.Hash[0] ^= 1
	var said strings.Builder
	_, err := Join(t.Context(), c, func(step, detail string) { said.WriteString(step + detail) })
	said.WriteString(err.Error())
	if strings.Contains(said.String(), c.Invite.String()[5:20]) {
		t.Errorf("the invite is in %q", said.String())
	}
}
