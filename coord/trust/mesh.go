package trust

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// maxRevocations bounds the revocations by R and S, and apart from them those
// by which devices withdraw themselves.
const maxRevocations = 1 << 16

// Mesh is the verified view that one node, or the server, has of a mesh: who is
// in it and why. It is made by NewMesh and not safe for concurrent use.
//
// Revocations count in whatever order they arrive. Among certificates the first
// seen wins, so a caller that restarts admits them in the order in which it had
// accepted them.
type Mesh struct {
	trustHash Hash
	genesis   Genesis
	state     State
	stateHash Hash

	members map[Key]member           // live devices by D
	claims  map[any]Key              // names, addresses and WireGuard keys of live devices
	used    map[Key]map[Key]struct{} // every D that an invite I has admitted

	withdrawn map[Key]withdrawal // by R or S: devices, invites, signers
	departed  map[Key]withdrawal // devices, by themselves
}

// member is an admitted device with all that its admission rests on.
type member struct {
	invite InviteCap
	cert   NodeCert
	hash   Hash      // of the NodeCert document
	at     time.Time // when the server saw it
	pin    Hash      // of the server that saw it
}

// withdrawal is the strongest revocation known of a target.
type withdrawal struct {
	from time.Time
	doc  Document
}

// NewMesh begins with a mesh's Genesis, which must have the trust hash, and a
// State signed by its root.
func NewMesh(trustHash Hash, genesis, state Document) (*Mesh, error) {
	if genesis.Hash() != trustHash {
		return nil, errors.New("open mesh: the genesis does not match the trust hash")
	}
	g, err := OpenGenesis(genesis)
	if err != nil {
		return nil, fmt.Errorf("open mesh: %w", err)
	}
	s, err := OpenState(state, g.Root)
	if err != nil {
		return nil, fmt.Errorf("open mesh: %w", err)
	}
	return &Mesh{
		trustHash: trustHash,
		genesis:   g,
		state:     s,
		stateHash: state.Hash(),
		members:   map[Key]member{},
		claims:    map[any]Key{},
		used:      map[Key]map[Key]struct{}{},
		withdrawn: map[Key]withdrawal{},
		departed:  map[Key]withdrawal{},
	}, nil
}

// Genesis returns how the mesh began.
func (m *Mesh) Genesis() Genesis { return m.genesis }

// State returns the mesh's current shape. Its lists are not to be changed.
func (m *Mesh) State() State { return m.state }

// UpdateState moves on to the next State, which must name the hash of the
// current one; the current one again changes nothing. Devices whose admission
// the new State no longer covers are not live afterwards.
func (m *Mesh) UpdateState(d Document) error {
	s, err := OpenState(d, m.genesis.Root)
	if err != nil {
		return fmt.Errorf("update state: %w", err)
	}
	hash := d.Hash()
	switch {
	case hash == m.stateHash:
		return nil
	case s.Epoch <= m.state.Epoch:
		return fmt.Errorf("update state: another state with epoch %d, but epoch %d is known", s.Epoch, m.state.Epoch)
	case s.Epoch != m.state.Epoch+1 || s.Prev != m.stateHash:
		return fmt.Errorf("update state: epoch %d does not follow the known epoch %d", s.Epoch, m.state.Epoch)
	}
	m.state, m.stateHash = s, hash
	m.drop()
	return nil
}

// PinOK says whether a server with this SHA-256 of the SubjectPublicKeyInfo may
// serve the mesh: its pin is current or next.
func (m *Mesh) PinOK(pin Hash) bool {
	return slices.ContainsFunc(m.state.Pins, func(p Pin) bool {
		return p.Hash == pin && (p.Status == PinCurrent || p.Status == PinNext)
	})
}

// AddRevocation takes in a revocation by the root, by a listed signer, or by
// which a device withdraws itself; what it withdraws is not live afterwards.
// Only the strongest revocation of a target is kept, so the order in which they
// arrive does not matter. Anybody can make a key and withdraw it: a server takes
// a self-revocation only from a member.
func (m *Mesh) AddRevocation(d Document) error {
	r, err := OpenRevocation(d)
	if err != nil {
		return fmt.Errorf("add revocation: %w", err)
	}
	set := m.withdrawn
	switch {
	case r.Target == m.genesis.Root:
		return errors.New("add revocation: the root cannot be withdrawn")
	case r.By == m.genesis.Root || m.isSigner(r.By):
	case r.By == r.Target:
		set = m.departed
	default:
		return fmt.Errorf("add revocation: %s is neither the root nor a signer nor the target", short(r.By))
	}
	old, known := set[r.Target]
	if known && (old.from.Before(r.From) || old.from.Equal(r.From) && bytes.Compare(old.doc, d) <= 0) {
		return nil
	}
	if !known && len(set) >= maxRevocations {
		return fmt.Errorf("add revocation: %d are known, the most there may be", len(set))
	}
	set[r.Target] = withdrawal{from: r.From, doc: bytes.Clone(d)}
	m.drop()
	return nil
}

// Revocations returns the revocations that count, in a fixed order.
func (m *Mesh) Revocations() []Document {
	docs := make([]Document, 0, len(m.withdrawn)+len(m.departed))
	for _, set := range []map[Key]withdrawal{m.withdrawn, m.departed} {
		for _, w := range set {
			docs = append(docs, w.doc)
		}
	}
	slices.SortFunc(docs, func(a, b Document) int { return bytes.Compare(a, b) })
	return docs
}

// Admit makes a device live when the whole chain holds: a signer of the mesh
// gave the invite, the invite was valid when a server of the mesh saw the
// certificate, the certificate keeps to the invite and to the mesh's prefixes,
// nothing is withdrawn, and nothing in it belongs to another live device. A
// certificate of a live device with a higher serial replaces the former; the
// same one again changes nothing.
func (m *Mesh) Admit(invite, countersigned Document) (NodeCert, error) {
	n, err := openMember(invite, countersigned)
	if err != nil {
		return NodeCert{}, fmt.Errorf("admit device: %w", err)
	}
	for _, step := range []func(member) error{keepsToInvite, m.keepsToMesh, m.notWithdrawn, m.place} {
		if err := step(n); err != nil {
			return NodeCert{}, fmt.Errorf("admit %q: %w", n.cert.Name, err)
		}
	}
	return n.cert, nil
}

// Remove ends that a device is live, so that its name and addresses are free.
// The use of its invite stays spent. It does nothing for an unknown device.
func (m *Mesh) Remove(device Key) {
	for _, c := range claimsOf(m.members[device].cert) {
		if m.claims[c] == device {
			delete(m.claims, c)
		}
	}
	delete(m.members, device)
}

// Device returns the certificate of a live device.
func (m *Mesh) Device(device Key) (NodeCert, bool) {
	n, ok := m.members[device]
	return n.cert, ok
}

// Live returns the certificates of the live devices, ordered by name.
func (m *Mesh) Live() []NodeCert {
	certs := make([]NodeCert, 0, len(m.members))
	for _, n := range m.members {
		certs = append(certs, n.cert)
	}
	slices.SortFunc(certs, func(a, b NodeCert) int { return strings.Compare(a.Name, b.Name) })
	return certs
}

// drop removes the members whose admission no longer holds.
func (m *Mesh) drop() {
	for device, n := range maps.Clone(m.members) {
		if m.keepsToMesh(n) != nil || m.notWithdrawn(n) != nil {
			m.Remove(device)
		}
	}
}

func openMember(invite, countersigned Document) (member, error) {
	granted, err := OpenInviteCap(invite)
	if err != nil {
		return member{}, err
	}
	doc, at, pin, err := OpenCountersigned(countersigned)
	if err != nil {
		return member{}, err
	}
	cert, err := OpenNodeCert(doc)
	if err != nil {
		return member{}, err
	}
	return member{invite: granted, cert: cert, hash: doc.Hash(), at: at, pin: pin}, nil
}

// keepsToInvite says whether the certificate is what the invite allows.
func keepsToInvite(n member) error {
	switch c := n.invite; {
	case n.cert.Invite != c.Invite:
		return errors.New("the certificate is by another invite")
	case n.at.Before(c.NotBefore):
		return fmt.Errorf("the invite is not valid before %s", c.NotBefore.Format(time.RFC3339))
	case !n.at.Before(c.NotAfter):
		return fmt.Errorf("%w on %s", ErrExpired, c.NotAfter.Format(time.RFC3339))
	case c.Name != "" && n.cert.Name != c.Name:
		return fmt.Errorf("the invite is for the name %q", c.Name)
	case n.cert.Role == RoleRelay && !slices.Contains(c.Tags, RelayTag):
		return fmt.Errorf("the invite has no tag %q, so it admits no relay", RelayTag)
	}
	for _, tag := range n.cert.Tags {
		if !slices.Contains(n.invite.Tags, tag) {
			return fmt.Errorf("the invite does not give the tag %q", tag)
		}
	}
	return nil
}

// keepsToMesh says whether Genesis and State cover the member.
func (m *Mesh) keepsToMesh(n member) error {
	prefix := m.state.Prefix4
	switch ip4 := n.cert.IP4; {
	case !m.isSigner(n.invite.Signer):
		return fmt.Errorf("%s, who gave the invite, is no signer", short(n.invite.Signer))
	case !m.isServer(n.pin):
		return errors.New("countersigned by a key that is no server's")
	case !prefix.Contains(ip4) || ip4 == prefix.Addr() || ip4 == lastAddr(prefix):
		return fmt.Errorf("%v is no address for a node in %v", ip4, prefix)
	case n.cert.IP6 != DeriveIP6(m.genesis.ULA, m.trustHash, n.cert.Device):
		return fmt.Errorf("%v is not derived from the device's key", n.cert.IP6)
	}
	return nil
}

// isSigner says whether S may sign. The first signer need not be listed in the
// first State.
func (m *Mesh) isSigner(k Key) bool {
	return slices.Contains(m.state.Signers, k) || m.state.Epoch == 1 && k == m.genesis.Signer
}

// isServer says whether pin is or was that of a server of the mesh.
func (m *Mesh) isServer(pin Hash) bool {
	return pin == m.genesis.Pin || slices.ContainsFunc(m.state.Pins, func(p Pin) bool { return p.Hash == pin })
}

// notWithdrawn says whether the member's chain is free of revocations. A device
// is out whenever its revocation is known; what an invite or a signer did before
// its revocation begins stays good.
func (m *Mesh) notWithdrawn(n member) error {
	if _, ok := m.withdrawn[n.cert.Device]; ok {
		return fmt.Errorf("%w: the device was withdrawn", ErrRevoked)
	}
	if _, ok := m.departed[n.cert.Device]; ok {
		return fmt.Errorf("%w: the device has left", ErrRevoked)
	}
	if w, ok := m.withdrawn[n.invite.Invite]; ok && !n.at.Before(w.from) {
		return fmt.Errorf("%w: the invite was withdrawn from %s", ErrRevoked, w.from.Format(time.RFC3339))
	}
	if w, ok := m.withdrawn[n.invite.Signer]; ok && !n.at.Before(w.from) {
		return fmt.Errorf("%w: the signer of the invite was withdrawn from %s", ErrRevoked, w.from.Format(time.RFC3339))
	}
	return nil
}

// place makes n live unless that collides with what is live already.
func (m *Mesh) place(n member) error {
	device := n.cert.Device
	if old, ok := m.members[device]; ok {
		if old.hash == n.hash {
			return nil
		}
		if n.cert.Serial <= old.cert.Serial {
			return fmt.Errorf("%w: serial %d, but %d is known", ErrConflict, n.cert.Serial, old.cert.Serial)
		}
	}
	for _, c := range claimsOf(n.cert) {
		if other, taken := m.claims[c]; taken && other != device {
			return fmt.Errorf("%w: %s belongs to %q", ErrConflict, describe(c), m.members[other].cert.Name)
		}
	}
	devices := m.used[n.invite.Invite]
	if _, again := devices[device]; !again && len(devices) >= int(n.invite.Uses) {
		return fmt.Errorf("%w: it has admitted %d", ErrUsed, len(devices))
	}
	m.put(n)
	return nil
}

func (m *Mesh) put(n member) {
	device, invite := n.cert.Device, n.invite.Invite
	m.Remove(device)
	m.members[device] = n
	for _, c := range claimsOf(n.cert) {
		m.claims[c] = device
	}
	if m.used[invite] == nil {
		m.used[invite] = map[Key]struct{}{}
	}
	m.used[invite][device] = struct{}{}
}

// claimsOf returns what only one live device may have.
func claimsOf(c NodeCert) []any {
	return []any{c.WireGuard, c.Name, c.IP4, c.IP6}
}

func describe(claim any) string {
	switch c := claim.(type) {
	case Key:
		return "WireGuard key " + short(c)
	case string:
		return fmt.Sprintf("name %q", c)
	default:
		return fmt.Sprintf("address %v", c)
	}
}

// short names a public key in messages.
func short(k Key) string { return k.String()[:8] + "…" }
