package coord

import (
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"overlay/coord/trust"
)

// ErrMesh says that the server's description of the mesh is not the one the
// invite names, or does not hold together.
var ErrMesh = errors.New("the coordinator sent a mesh description that does not match the invite; refusing")

// JoinConfig is what a device needs to join a mesh. The caller has saved the
// keys and all that was drawn before Join, so that a repeat asks for the same
// and gets the same answer.
type JoinConfig struct {
	Invite    Invite
	Device    ed25519.PrivateKey
	WireGuard [32]byte // private
	Name      string   // see trust.ValidName
	Exact     bool     // no other name will do
	Server    string   // host:port instead of the invite's, or empty
	Proxy     *url.URL // see Dialer.Proxy
	// Role is what the device becomes; zero: a node. A relay needs an invite
	// with the tag trust.RelayTag.
	Role trust.Role
	// Date is the date of what this device signs; zero: the server's.
	Date time.Time

	// The rest but Log is for an owner invite: the keys R and S of the new
	// mesh and what is drawn for it.
	Root    ed25519.PrivateKey
	Signer  ed25519.PrivateKey
	MeshID  [16]byte
	ULA     netip.Prefix // see DrawPrefixes
	Prefix4 netip.Prefix // where the server's operator fixed none

	// Log gets failed attempts at Debug; nil drops them.
	Log *slog.Logger
}

// Membership is what a member keeps: everything verified.
type Membership struct {
	TrustHash trust.Hash
	Genesis   trust.Document
	State     trust.Document
	Cap       trust.Document
	Cert      trust.Document // countersigned
	Servers   []string       // the one that was used first
}

// Join redeems an invite. It tells progress each step done, a word and a
// detail for people; nil hears nothing. Besides the Dialer's errors and Error
// it fails with ErrMesh. While the server limits the rate it waits and says so,
// until ctx ends. Nothing secret leaves before the server's key is verified.
func Join(ctx context.Context, c JoinConfig, progress func(step, detail string)) (Membership, error) {
	if progress == nil {
		progress = func(string, string) {}
	}
	j, err := newJoiner(c, progress)
	if err != nil {
		return Membership{}, err
	}
	for {
		m, err := j.once(ctx)
		busy, ok := errors.AsType[*Error](err)
		if !ok || busy.Code != CodeRateLimited || busy.RetryAfter == 0 {
			return m, err
		}
		progress("wait", fmt.Sprintf("%s; next try in %s", busy.Message, busy.RetryAfter))
		select {
		case <-ctx.Done():
			return Membership{}, fmt.Errorf("%w (%w)", ctx.Err(), busy)
		case <-time.After(busy.RetryAfter):
		}
	}
}

// joiner is one device while it joins.
type joiner struct {
	JoinConfig
	progress func(step, detail string)
	server   string
	w        trust.Key
}

func newJoiner(c JoinConfig, progress func(step, detail string)) (*joiner, error) {
	if err := trust.ValidName(c.Name); err != nil {
		return nil, err
	}
	if c.Role == 0 {
		c.Role = trust.RoleNode
	}
	if c.Role == trust.RoleRelay && c.Invite.Kind == InviteOwner {
		return nil, notForRelay()
	}
	j := &joiner{JoinConfig: c, progress: progress, server: c.Invite.Server}
	if c.Server != "" {
		j.server = c.Server
	}
	if err := trust.ValidServer(j.server); err != nil {
		return nil, err
	}
	signing := []ed25519.PrivateKey{c.Device}
	if c.Invite.Kind == InviteOwner {
		signing = append(signing, c.Root, c.Signer)
	}
	for _, k := range signing {
		if len(k) != ed25519.PrivateKeySize {
			return nil, fmt.Errorf("signing key of %d bytes, want %d", len(k), ed25519.PrivateKeySize)
		}
	}
	private, err := ecdh.X25519().NewPrivateKey(c.WireGuard[:])
	if err != nil {
		return nil, errors.New("the WireGuard key is not usable")
	}
	j.w = trust.Key(private.PublicKey().Bytes())
	return j, nil
}

// once connects and goes through the whole exchange, which is safe to repeat.
func (j *joiner) once(ctx context.Context) (Membership, error) {
	d := Dialer{Servers: []string{j.server}, Device: j.Device, Proxy: j.Proxy, Log: j.Log}
	if j.Invite.Kind == InviteOwner {
		d.Verify = j.verifyOwner
	}
	conn, err := d.Dial(ctx)
	if err != nil {
		return Membership{}, err
	}
	defer func() { _ = conn.Close() }()
	hello, err := conn.Hello(ctx)
	if err != nil {
		return Membership{}, err
	}
	redeem := j.redeem
	if j.Invite.Kind == InviteOwner {
		redeem = j.own
	}
	return redeem(ctx, conn, hello)
}

func (j *joiner) verifyOwner(pin trust.Hash) error {
	if pin != j.Invite.Hash {
		return &PinError{Want: j.Invite.Hash, Got: pin}
	}
	return nil
}

// redeem joins a mesh that has an owner.
func (j *joiner) redeem(ctx context.Context, conn *Conn, hello Hello) (Membership, error) {
	mesh, err := j.verifyMesh(conn, hello)
	if err != nil {
		return Membership{}, err
	}
	j.progress("server", conn.where())
	proofs, err := conn.Prove(hello, j.Invite.Key(), j.Device, j.WireGuard)
	if err != nil {
		return Membership{}, err
	}
	wish := JoinRequest{
		Invite: publicKey(j.Invite.Key()), WireGuard: j.w, Name: j.Name, Exact: j.Exact, Proofs: proofs,
	}
	if j.Role != trust.RoleNode {
		wish.Role = j.Role.String()
	}
	reply, err := conn.Join(ctx, wish)
	if err != nil {
		return Membership{}, err
	}
	granted, err := j.verifyReply(reply)
	if err != nil {
		return Membership{}, err
	}
	cert := j.certificate(hello)
	cert.Name, cert.IP4, cert.Tags = reply.Name, reply.IP4, granted.Tags
	cert.IP6 = trust.DeriveIP6(mesh.Genesis().ULA, j.Invite.Hash, cert.Device)
	signed, err := trust.SignNodeCert(cert, j.Invite.Key(), j.Device)
	if err != nil {
		return Membership{}, err
	}
	countersigned, err := conn.Cert(ctx, CertRequest{Cert: signed})
	if err != nil {
		return Membership{}, err
	}
	m := Membership{
		TrustHash: j.Invite.Hash, Genesis: hello.Genesis, State: hello.State,
		Cap: reply.Cap, Cert: countersigned.Cert,
	}
	return j.finish(m, mesh, cert)
}

// verifyMesh makes sure that this is the invite's mesh and one of its servers.
func (j *joiner) verifyMesh(conn *Conn, hello Hello) (*trust.Mesh, error) {
	if len(hello.Genesis) == 0 {
		return nil, &Error{
			Code:    CodeInviteUnknown,
			Message: fmt.Sprintf("the coordinator %s has no mesh yet, so it knows no such invite", j.server),
			Hint:    "join its first device with the invite that overlay coord printed",
		}
	}
	mesh, err := trust.NewMesh(j.Invite.Hash, hello.Genesis, hello.State)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMesh, err)
	}
	if !mesh.PinOK(conn.Pin()) {
		return nil, &PinError{Server: j.server, Want: mesh.Genesis().Pin, Got: conn.Pin()}
	}
	return mesh, nil
}

// verifyReply looks at what the server reserved before it is signed.
func (j *joiner) verifyReply(reply JoinReply) (trust.InviteCap, error) {
	granted, err := trust.OpenInviteCap(reply.Cap)
	if err != nil {
		return trust.InviteCap{}, fmt.Errorf("%w: %w", ErrMesh, err)
	}
	if granted.Invite != publicKey(j.Invite.Key()) {
		return trust.InviteCap{}, fmt.Errorf("%w: it answers for another invite", ErrMesh)
	}
	if j.Exact && reply.Name != j.Name {
		return trust.InviteCap{}, fmt.Errorf("%w: it gives the name %q for %q", ErrMesh, reply.Name, j.Name)
	}
	if j.Role == trust.RoleRelay && !slices.Contains(granted.Tags, trust.RelayTag) {
		return trust.InviteCap{}, notForRelay()
	}
	return granted, nil
}

func notForRelay() error {
	return &Error{Code: CodeNotRelay, Message: "this invite does not admit a relay", Hint: "make one with: overlay invite --tag " + trust.RelayTag}
}

// certificate is what every first certificate of this device says.
func (j *joiner) certificate(hello Hello) trust.NodeCert {
	date := j.Date
	if date.IsZero() {
		date = hello.Time
	}
	return trust.NodeCert{
		Invite: publicKey(j.Invite.Key()), Device: publicKey(j.Device), WireGuard: j.w,
		Role: j.Role, Serial: 1, IssuedAt: date.UTC().Truncate(time.Second),
	}
}

// finish verifies the countersigned certificate as every peer will, and that it
// is ours: D has signed it. The server may have kept one of an earlier attempt,
// with another date or name.
func (j *joiner) finish(m Membership, mesh *trust.Mesh, ours trust.NodeCert) (Membership, error) {
	cert, err := mesh.Admit(m.Cap, m.Cert)
	if err != nil {
		return Membership{}, fmt.Errorf("%w: %w", ErrMesh, err)
	}
	if cert.Device != ours.Device || cert.WireGuard != ours.WireGuard {
		return Membership{}, fmt.Errorf("%w: it answers with the certificate of another device", ErrMesh)
	}
	if cert.Role != ours.Role {
		return Membership{}, &Error{
			Code: CodeBadRequest, Message: fmt.Sprintf("this device is already a member as a %s", cert.Role),
			Hint: "to be both, use another --state DIR",
		}
	}
	m.Servers = append([]string{j.server}, mesh.State().Servers...)
	m.Servers = slices.DeleteFunc(m.Servers, func(s string) bool { return s == j.server })
	m.Servers = slices.Insert(m.Servers, 0, j.server)
	j.progress("joined", fmt.Sprintf("%s %s %s", cert.Name, cert.IP4, cert.IP6))
	return m, nil
}
