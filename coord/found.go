package coord

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"overlay/coord/trust"
)

// The dates of the owner's own invite capability: always. The owner's clock
// may be wrong, and its one use is spent in the transaction that founds the
// mesh.
const (
	ownerCapFrom  = 0
	ownerCapUntil = 253402300799 // the end of the year 9999
)

// defaultMesh is the name of a mesh that the server's operator gave none.
const defaultMesh = "home"

// own founds the mesh: signs everything and hands it in at once. All of it
// follows from what is saved and from the Plan, which the State repeats once
// the mesh exists, so a repeat after a lost answer hands in the same bytes.
func (j *joiner) own(ctx context.Context, conn *Conn, hello Hello) (Membership, error) {
	j.progress("server", conn.where())
	plan, err := planOf(hello)
	if err != nil {
		return Membership{}, err
	}
	m, mesh, err := j.found(conn.Pin(), plan)
	if err != nil {
		return Membership{}, err
	}
	cert, signed, err := j.foundCert(mesh, hello, m.TrustHash)
	if err != nil {
		return Membership{}, err
	}
	proofs, err := conn.Prove(hello, j.Invite.Key(), j.Device, j.WireGuard)
	if err != nil {
		return Membership{}, err
	}
	reply, err := conn.Own(ctx, OwnRequest{
		Genesis: m.Genesis, State: m.State, Cap: m.Cap, Cert: signed, Proofs: proofs,
	})
	if err != nil {
		return Membership{}, err
	}
	m.Cert = reply.Cert
	return j.finish(m, mesh, cert)
}

// planOf is what the server fixed, or what the existing mesh shows of it.
func planOf(hello Hello) (Plan, error) {
	if hello.Plan != nil {
		return *hello.Plan, nil
	}
	mesh, err := trust.NewMesh(hello.Genesis.Hash(), hello.Genesis, hello.State)
	if err != nil {
		return Plan{}, fmt.Errorf("%w: %w", ErrMesh, err)
	}
	s := mesh.State()
	return Plan{Name: s.Name, Prefix4: s.Prefix4, Servers: s.Servers}, nil
}

// found signs the mesh's first documents. The root stands in for the invite in
// the owner's capability: the server made the owner invite, so a capability for
// that key would let the server admit devices.
func (j *joiner) found(pin trust.Hash, plan Plan) (Membership, *trust.Mesh, error) {
	genesis, err := trust.SignGenesis(trust.Genesis{
		MeshID: j.MeshID, Root: publicKey(j.Root), Signer: publicKey(j.Signer), ULA: j.ULA, Pin: pin,
	}, j.Root)
	if err != nil {
		return Membership{}, nil, err
	}
	if !plan.Prefix4.IsValid() {
		plan.Prefix4 = j.Prefix4
	}
	if plan.Name == "" {
		plan.Name = defaultMesh
	}
	if len(plan.Servers) == 0 {
		plan.Servers = []string{j.server}
	}
	state, err := trust.SignState(trust.State{
		Epoch: 1, Name: plan.Name, Prefix4: plan.Prefix4, Servers: plan.Servers,
		Pins:    []trust.Pin{{Hash: pin, Status: trust.PinCurrent}},
		Signers: []trust.Key{publicKey(j.Signer)},
	}, j.Root)
	if err != nil {
		return Membership{}, nil, err
	}
	granted, err := trust.SignInviteCap(trust.InviteCap{
		Invite: publicKey(j.Root), Signer: publicKey(j.Signer), Uses: 1,
		NotBefore: time.Unix(ownerCapFrom, 0).UTC(), NotAfter: time.Unix(ownerCapUntil, 0).UTC(),
	}, j.Signer)
	if err != nil {
		return Membership{}, nil, err
	}
	m := Membership{TrustHash: genesis.Hash(), Genesis: genesis, State: state, Cap: granted}
	mesh, err := trust.NewMesh(m.TrustHash, genesis, state)
	return m, mesh, err
}

// foundCert is the owner's certificate: the first address of the mesh.
func (j *joiner) foundCert(mesh *trust.Mesh, hello Hello, hash trust.Hash) (trust.NodeCert, trust.Document, error) {
	cert := j.certificate(hello)
	cert.Invite, cert.Name = mesh.Genesis().Root, j.Name
	cert.IP4 = mesh.State().Prefix4.Addr().Next()
	cert.IP6 = trust.DeriveIP6(mesh.Genesis().ULA, hash, cert.Device)
	signed, err := trust.SignNodeCert(cert, j.Root, j.Device)
	return cert, signed, err
}

// meshes4 is the number of /16 in 100.64.0.0/10 (RFC 6598).
const meshes4 = 64

// DrawPrefixes draws a mesh's prefixes: a /48 of fd00::/8 (RFC 4193) and a /16
// of 100.64.0.0/10. Both keep clear of avoid, the networks this machine is in;
// only when those cover all of 100.64.0.0/10 the second does not. random must
// not fail, as crypto/rand.Reader never does.
func DrawPrefixes(random io.Reader, avoid []netip.Prefix) (ula, prefix4 netip.Prefix) {
	overlaps := func(p netip.Prefix) bool { return slices.ContainsFunc(avoid, p.Overlaps) }
	const tries = 100 // no list of local networks covers much of fd00::/8
	for range tries {
		b := [16]byte{0: 0xfd}
		draw(random, b[1:6])
		if ula = netip.PrefixFrom(netip.AddrFrom16(b), 48); !overlaps(ula) {
			break
		}
	}
	start := make([]byte, 1)
	draw(random, start)
	for i := range meshes4 {
		second := 64 + (int(start[0])+i)%meshes4
		prefix4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(second)}), 16)
		if second != crowded && !overlaps(prefix4) {
			break
		}
	}
	return ula, prefix4
}

// crowded is the second byte of 100.100.0.0/16, where clouds and other
// overlays keep services of every machine.
const crowded = 100

func draw(random io.Reader, b []byte) {
	if _, err := io.ReadFull(random, b); err != nil {
		panic(fmt.Sprintf("draw %d random bytes: %v", len(b), err))
	}
}
