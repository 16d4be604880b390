package server

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"overlay/coord"
	"overlay/coord/store"
	"overlay/coord/trust"
)

const (
	reservationTime = 10 * time.Minute // between /v1/join and /v1/cert
	quarantine      = 24 * time.Hour   // before a name and an address are given again
	maxSuffix       = 9999             // of a name that was taken: laptop-2, laptop-3, …
	maxNameLen      = 63
)

// registry is who is in the mesh. It keeps nothing but the store's address:
// every decision is one transaction over what it read, so any number of them,
// also of several servers, may run at once.
type registry struct {
	store  store.Store
	key    ed25519.PrivateKey // countersigns
	pin    trust.Hash
	prefix netip.Prefix // fixed by the operator; invalid: the owner chooses
	now    func() time.Time
	online func(trust.Key) bool
}

// applicant is a device that asks to become a member, its proofs verified.
type applicant struct {
	device    trust.Key
	invite    trust.Key // that it proved to hold
	wireguard trust.Key
	name      string
	exact     bool
	relay     bool // it wants to be one
}

// ownerInvite gives the owner invite, open or used, that founders must hold.
func (r *registry) ownerInvite(ctx context.Context) (trust.Key, error) {
	t := &txn{ctx: ctx, store: r.store}
	if mesh, founded := get[meshRecord](t, keyMesh); founded || t.err != nil {
		return mesh.Invite, t.err
	}
	owner, _ := get[ownerRecord](t, keyOwner)
	return owner.Invite, t.err
}

// found commits the mesh as its owner signed it, together with the use of the
// owner invite.
func (r *registry) found(ctx context.Context, a applicant, q coord.OwnRequest) (trust.Document, error) {
	f, err := r.checkFounding(a, q)
	if err != nil {
		return nil, err
	}
	var cert trust.Document
	err = update(ctx, r.store, func(t *txn) error {
		if mesh, found := get[meshRecord](t, keyMesh); found {
			cert, err = r.foundAgain(t, a, mesh, q)
			return err
		}
		if owner, found := get[ownerRecord](t, keyOwner); t.err == nil && (!found || owner.Invite != a.invite) {
			return voidOwnerInvite()
		}
		r.putMesh(t, a, q, f)
		cert = f.countersigned
		return nil
	})
	return cert, err
}

func (r *registry) putMesh(t *txn, a applicant, q coord.OwnRequest, f founding) {
	now := r.now().UTC()
	n := nodeRecord{
		Device: a.device, WireGuard: a.wireguard, Invite: f.cert.Invite, InvitedBy: "the owner invite",
		Name: f.cert.Name, IP4: f.cert.IP4, IP6: f.cert.IP6, Tags: f.cert.Tags, Role: f.cert.Role,
		Cap: q.Cap, Cert: f.countersigned, Reserved: now, Joined: now,
	}
	t.put(keyMesh, meshRecord{
		Genesis: q.Genesis, State: q.State, Prefix4: f.state.Prefix4, Owner: a.device, Invite: a.invite,
	})
	t.del(keyOwner)
	t.put(keyInvite+text(n.Invite), inviteRecord{Cap: q.Cap, CreatedBy: "the server", Created: now, Used: 1})
	t.put(useKey(n.Invite, a.device), useRecord{Name: n.Name, At: now})
	t.put(keyNode+text(a.device), n)
	t.put(keyCursor, f.state.Prefix4.Addr().Next())
	putClaims(t, n)
}

// foundAgain answers a founder whose answer was lost, and nobody else.
func (r *registry) foundAgain(t *txn, a applicant, mesh meshRecord, q coord.OwnRequest) (trust.Document, error) {
	n, _ := peek[nodeRecord](t, keyNode+text(mesh.Owner))
	if mesh.Owner == a.device && mesh.Genesis.Hash() == q.Genesis.Hash() {
		return n.Cert, nil
	}
	return nil, usedInvite(n.Name, n.Joined)
}

// founding is an OwnRequest that holds together.
type founding struct {
	state         trust.State
	cert          trust.NodeCert
	countersigned trust.Document
}

func (r *registry) checkFounding(a applicant, q coord.OwnRequest) (founding, error) {
	bad := func(err error) error {
		return refuse(coord.CodeBadRequest, "the mesh description is not acceptable: %v", err)
	}
	mesh, err := trust.NewMesh(q.Genesis.Hash(), q.Genesis, q.State)
	if err != nil {
		return founding{}, bad(err)
	}
	granted, err := trust.OpenInviteCap(q.Cap)
	if err != nil {
		return founding{}, bad(err)
	}
	state := mesh.State()
	switch {
	case mesh.Genesis().Pin != r.pin || !mesh.PinOK(r.pin):
		err = errors.New("it does not name this server's key")
	case state.Epoch != 1:
		err = fmt.Errorf("its state has epoch %d", state.Epoch)
	case r.prefix.IsValid() && state.Prefix4 != r.prefix:
		err = fmt.Errorf("its prefix is %v, the server's operator fixed %v", state.Prefix4, r.prefix)
	case granted.Uses != 1:
		err = errors.New("its first invite is for more than the owner")
	}
	if err != nil {
		return founding{}, bad(err)
	}
	countersigned, err := trust.Countersign(q.Cert, r.now(), r.key)
	if err != nil {
		return founding{}, bad(err)
	}
	cert, err := mesh.Admit(q.Cap, countersigned)
	if err != nil {
		return founding{}, bad(err)
	}
	if cert.Device != a.device || cert.WireGuard != a.wireguard {
		return founding{}, bad(errors.New("its certificate is another device's"))
	}
	if cert.Role != trust.RoleNode {
		return founding{}, bad(errors.New("its first device is no node"))
	}
	return founding{state: state, cert: cert, countersigned: countersigned}, nil
}

func putClaims(t *txn, n nodeRecord) {
	t.put(keyName+n.Name, claim{n.Device})
	t.put(keyIP4+n.IP4.String(), claim{n.Device})
	t.put(keyWireGuard+text(n.WireGuard), claim{n.Device})
}

// reserve gives an applicant a name and an address and spends the invite, all
// or nothing. The same device gets the same answer again.
func (r *registry) reserve(ctx context.Context, a applicant) (coord.JoinReply, error) {
	if err := r.sweep(ctx); err != nil {
		return coord.JoinReply{}, err
	}
	if err := update(ctx, r.store, func(t *txn) error { return startOver(t, a) }); err != nil {
		return coord.JoinReply{}, err
	}
	var n nodeRecord
	err := update(ctx, r.store, func(t *txn) error {
		mesh, founded := peek[meshRecord](t, keyMesh)
		if t.err == nil && founded.Revision == 0 {
			return hinted(refuse(coord.CodeInviteUnknown, "this coordinator has no mesh yet"),
				"the owner joins first, with the invite that overlay coord prints")
		}
		var found bool
		if n, found = get[nodeRecord](t, keyNode+text(a.device)); found {
			_, err := answers(n, a)
			return err
		}
		var err error
		n, err = r.reserveNew(t, a, mesh)
		return err
	})
	return coord.JoinReply{Cap: n.Cap, Name: n.Name, IP4: n.IP4}, err
}

// startOver frees what the device reserved with another invite, key or name and
// never finished.
func startOver(t *txn, a applicant) error {
	old, found := get[nodeRecord](t, keyNode+text(a.device))
	if !found {
		return nil
	}
	same, err := answers(old, a)
	if err == nil && !same {
		free(t, old)
	}
	return err
}

// answers says whether what the device has already answers the applicant, and
// refuses one that cannot get anything else.
func answers(old nodeRecord, a applicant) (bool, error) {
	same := old.Invite == a.invite && old.WireGuard == a.wireguard
	other := a.exact && a.name != old.Name
	switch {
	case !old.Left.IsZero():
		return false, hinted(refuse(coord.CodeRevoked, "this device left the mesh on %s", old.Left.Format(timeLayout)),
			"to join again, first on this machine: overlay leave")
	case old.member() && !same:
		return false, refuse(coord.CodeBadRequest, "this device is already a member as %q (%v)", old.Name, old.IP4)
	case old.member() && other:
		return false, hinted(refuse(coord.CodeBadRequest, "this device is already a member as %q (%v)", old.Name, old.IP4),
			"leave out --name, or use --name %s", old.Name)
	}
	return same && !other, nil
}

// reserveNew makes the reservation of a device that has none.
func (r *registry) reserveNew(t *txn, a applicant, mesh meshRecord) (nodeRecord, error) {
	now := r.now().UTC()
	invite, granted, err := r.openInvite(t, a, now)
	if err != nil {
		return nodeRecord{}, err
	}
	if a.relay && !slices.Contains(granted.Tags, trust.RelayTag) {
		return nodeRecord{}, hinted(refuse(coord.CodeNotRelay, "this invite does not admit a relay"),
			"make one with: overlay invite --tag %s", trust.RelayTag)
	}
	if !a.relay && slices.Contains(granted.Tags, trust.RelayTag) {
		return nodeRecord{}, hinted(refuse(coord.CodeNotRelay, "this invite is for a relay"),
			"on the relay's machine: overlay relay ovl1_... For another machine make one with: overlay invite")
	}
	if _, taken := get[claim](t, keyWireGuard+text(a.wireguard)); taken {
		return nodeRecord{}, refuse(coord.CodeBadKey, "this WireGuard key belongs to another device")
	}
	name, err := r.pickName(t, a, granted)
	if err != nil {
		return nodeRecord{}, err
	}
	ip4, err := pickAddress(t, mesh.Prefix4)
	if err != nil {
		return nodeRecord{}, err
	}
	n := nodeRecord{
		Device: a.device, WireGuard: a.wireguard, Invite: a.invite, InvitedBy: invite.CreatedBy,
		Name: name, IP4: ip4, Cap: invite.Cap, Reserved: now,
	}
	invite.Used++
	t.put(keyInvite+text(a.invite), invite)
	t.put(useKey(a.invite, a.device), useRecord{Name: name, At: now})
	t.put(keyNode+text(a.device), n)
	t.put(expireKey(now.Add(reservationTime), a.device), claim{a.device})
	putClaims(t, n)
	return n, nil
}

// openInvite gives the invite of an applicant if one more device may use it.
func (r *registry) openInvite(t *txn, a applicant, now time.Time) (inviteRecord, trust.InviteCap, error) {
	invite, found := get[inviteRecord](t, keyInvite+text(a.invite))
	if t.err != nil {
		return invite, trust.InviteCap{}, t.err
	}
	if !found {
		return invite, trust.InviteCap{}, hinted(refuse(coord.CodeInviteUnknown, "this coordinator does not know the invite"), "ask for a new one")
	}
	granted, err := trust.OpenInviteCap(invite.Cap)
	switch {
	case err != nil:
		return invite, granted, err
	case !invite.Withdrawn.IsZero():
		return invite, granted, hinted(refuse(coord.CodeInviteWithdrawn, "invite was withdrawn by %s", invite.WithdrawnBy),
			"ask for a new one")
	case invite.Used >= int(granted.Uses):
		_, uses := list[useRecord](t, keyUse+text(a.invite)+"/")
		last := useRecord{Name: "another device", At: invite.Created}
		for _, u := range uses {
			if !u.At.Before(last.At) {
				last = u
			}
		}
		return invite, granted, usedInvite(last.Name, last.At)
	case !now.Before(granted.NotAfter):
		return invite, granted, expiredInvite(granted.NotAfter, now, invite.CreatedBy)
	case now.Before(granted.NotBefore):
		return invite, granted, refuse(coord.CodeInviteExpired,
			"invite is valid only from %s; the coordinator's clock says %s", granted.NotBefore.Format(timeLayout), now.Format(timeLayout))
	}
	return invite, granted, nil
}

func voidOwnerInvite() error {
	return hinted(refuse(coord.CodeInviteUnknown, "this owner invite is no longer valid: every start of the coordinator makes a new one"),
		"use the one that overlay coord printed last")
}

func expiredInvite(notAfter, now time.Time, by string) error {
	return hinted(refuse(coord.CodeInviteExpired, "invite expired %s (%s)", ago(now.Sub(notAfter)), notAfter.UTC().Format(timeLayout)),
		"ask %s for a new one", by)
}

func usedInvite(name string, at time.Time) error {
	return hinted(refuse(coord.CodeInviteUsed, "invite was already used by %q on %s", name, at.UTC().Format(timeLayout)),
		"if that was not you, tell the owner of the mesh; otherwise ask for a new one")
}
