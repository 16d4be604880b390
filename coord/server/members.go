package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

// commit takes the certificate of a reservation, countersigns it, and makes the
// device a member.
func (r *registry) commit(ctx context.Context, device trust.Key, doc trust.Document) (trust.Document, error) {
	cert, err := trust.OpenNodeCert(doc)
	if err != nil {
		return nil, refuse(coord.CodeBadRequest, "the certificate is not acceptable: %v", err)
	}
	var out trust.Document
	err = update(ctx, r.store, func(t *txn) error {
		n, found := get[nodeRecord](t, keyNode+text(device))
		if t.err != nil {
			return t.err
		}
		if !found {
			return hinted(refuse(coord.CodeNotMember, "nothing is reserved for this device"), "Join again: a reservation lasts %v.", reservationTime)
		}
		if n.member() {
			out = n.Cert
			return nil
		}
		if err := matches(n, cert); err != nil {
			return refuse(coord.CodeBadRequest, "the certificate is not what was reserved: %v", err)
		}
		if invite, _ := get[inviteRecord](t, keyInvite+text(n.Invite)); !invite.Withdrawn.IsZero() {
			return refuse(coord.CodeInviteWithdrawn, "invite was withdrawn by %s", invite.WithdrawnBy)
		}
		now := r.now().UTC()
		if out, err = r.countersign(t, n, doc, now); err != nil {
			return err
		}
		n.Cert, n.Joined, n.IP6 = out, now, cert.IP6
		n.Tags, n.Role = cert.Tags, cert.Role
		t.put(keyNode+text(device), n)
		t.del(expireKey(n.Reserved.Add(reservationTime), device))
		return nil
	})
	return out, err
}

func matches(n nodeRecord, c trust.NodeCert) error {
	switch {
	case !n.Left.IsZero():
		return errors.New("the device has left")
	case c.Device != n.Device:
		return errors.New("it names another device")
	case c.Invite != n.Invite:
		return errors.New("it names another invite")
	case c.WireGuard != n.WireGuard:
		return errors.New("it names another WireGuard key")
	case c.Name != n.Name:
		return fmt.Errorf("its name is %q, reserved is %q", c.Name, n.Name)
	case c.IP4 != n.IP4:
		return fmt.Errorf("its address is %v, reserved is %v", c.IP4, n.IP4)
	}
	return nil
}

// countersign puts the server's name under a certificate that every peer will
// accept, judged as they do.
func (r *registry) countersign(t *txn, n nodeRecord, doc trust.Document, now time.Time) (trust.Document, error) {
	mesh, err := openMesh(t)
	if err != nil {
		return nil, err
	}
	out, err := trust.Countersign(doc, now, r.key)
	if err != nil {
		return nil, refuse(coord.CodeBadRequest, "the certificate is not acceptable: %v", err)
	}
	_, err = mesh.Admit(n.Cap, out)
	switch {
	case errors.Is(err, trust.ErrExpired):
		return nil, hinted(refuse(coord.CodeInviteExpired, "invite expired before the join was finished"), "ask %s for a new one", n.InvitedBy)
	case errors.Is(err, trust.ErrRevoked):
		return nil, refuse(coord.CodeRevoked, "%v", err)
	case err != nil:
		return nil, refuse(coord.CodeBadRequest, "the certificate is not acceptable: %v", err)
	}
	return out, nil
}

// openMesh is the mesh with its revocations and without members.
func openMesh(t *txn) (*trust.Mesh, error) {
	record, found := get[meshRecord](t, keyMesh)
	_, revocations := list[trust.Document](t, keyRevocation)
	if t.err != nil {
		return nil, t.err
	}
	if !found {
		return nil, refuse(coord.CodeNotMember, "this coordinator has no mesh yet")
	}
	mesh, err := trust.NewMesh(record.Genesis.Hash(), record.Genesis, record.State)
	if err != nil {
		return nil, err
	}
	for _, d := range revocations {
		if err := mesh.AddRevocation(d); err != nil {
			return nil, err
		}
	}
	return mesh, nil
}

// revoke takes a revocation by R, a signer, or the device itself. The device
// leaves at once; its name and address rest for a day.
func (r *registry) revoke(ctx context.Context, device trust.Key, doc trust.Document) error {
	rev, err := trust.OpenRevocation(doc)
	if err != nil {
		return refuse(coord.CodeBadRequest, "the revocation is not acceptable: %v", err)
	}
	return update(ctx, r.store, func(t *txn) error {
		by, err := memberOf(t, device)
		if err != nil {
			// Who is out already may say so again.
			if by.Device == rev.Target && rev.Target == rev.By && !by.Left.IsZero() {
				return nil
			}
			return err
		}
		mesh, err := openMesh(t)
		if err != nil {
			return err
		}
		if rev.By == rev.Target && rev.By != device && !isSigner(mesh, rev.By) {
			return refuse(coord.CodeNotSigner, "a device can withdraw only itself")
		}
		if err := mesh.AddRevocation(doc); err != nil {
			return refuse(coord.CodeNotSigner, "the revocation is not acceptable: %v", err)
		}
		hash := doc.Hash()
		t.put(keyRevocation+text(hash), doc)
		r.withdraw(t, rev.Target, by.Name)
		return nil
	})
}

// withdraw marks what a revocation is about, if the server knows it.
func (r *registry) withdraw(t *txn, target trust.Key, by string) {
	now := r.now().UTC()
	if n, found := get[nodeRecord](t, keyNode+text(target)); found && n.Left.IsZero() {
		t.del(expireKey(n.Reserved.Add(reservationTime), target))
		n.Left = now
		t.put(keyNode+text(target), n)
		t.put(expireKey(now.Add(quarantine), target), claim{target})
	}
	if invite, found := get[inviteRecord](t, keyInvite+text(target)); found && invite.Withdrawn.IsZero() {
		invite.Withdrawn, invite.WithdrawnBy = now, by
		t.put(keyInvite+text(target), invite)
	}
}

// memberOf gives the member behind a device key.
func memberOf(t *txn, device trust.Key) (nodeRecord, error) {
	n, _ := get[nodeRecord](t, keyNode+text(device))
	switch {
	case t.err != nil:
		return n, t.err
	case !n.Left.IsZero():
		return n, refuse(coord.CodeRevoked, "this device left the mesh on %s", n.Left.Format(timeLayout))
	case !n.member():
		return n, hinted(refuse(coord.CodeNotMember, "this device is not a member of the mesh"), "join with an invite: overlay up ovl1_...")
	}
	return n, nil
}

// member says at which revision a device became the member that it is.
func (r *registry) member(ctx context.Context, device trust.Key) (uint64, error) {
	t := &txn{ctx: ctx, store: r.store}
	if _, err := memberOf(t, device); err != nil {
		return 0, err
	}
	return t.compare[0].Revision, nil
}

// invite takes an invite capability by a signer.
func (r *registry) invite(ctx context.Context, device trust.Key, doc trust.Document) error {
	granted, err := trust.OpenInviteCap(doc)
	if err != nil {
		return refuse(coord.CodeBadRequest, "the invite is not acceptable: %v", err)
	}
	if err := r.sweep(ctx); err != nil { // a name may be free by now
		return err
	}
	return update(ctx, r.store, func(t *txn) error {
		by, err := memberOf(t, device)
		if err != nil {
			return err
		}
		mesh, err := openMesh(t)
		if err != nil {
			return err
		}
		if !isSigner(mesh, granted.Signer) || withdrawn(mesh, granted.Signer) {
			return r.notSigner(t, "invite", "invite")
		}
		now := r.now().UTC()
		if !now.Before(granted.NotAfter) || now.Before(granted.NotBefore) {
			return hinted(refuse(coord.CodeBadRequest, "invite is valid from %s to %s, but the coordinator's clock says %s",
				granted.NotBefore.Format(timeLayout), granted.NotAfter.Format(timeLayout), now.Format(timeLayout)),
				"set the clock of this machine or of the coordinator, then repeat")
		}
		key := keyInvite + text(granted.Invite)
		if old, found := get[inviteRecord](t, key); found {
			if old.Cap.Hash() == doc.Hash() {
				return nil
			}
			return refuse(coord.CodeBadRequest, "another invite has this key already")
		}
		if err := r.nameFree(t, granted.Name); err != nil {
			return err
		}
		t.put(key, inviteRecord{Cap: doc, CreatedBy: by.Name, Created: now})
		return nil
	})
}

func isSigner(m *trust.Mesh, k trust.Key) bool {
	return slices.Contains(m.State().Signers, k) || m.State().Epoch == 1 && k == m.Genesis().Signer
}

func withdrawn(m *trust.Mesh, k trust.Key) bool {
	return slices.ContainsFunc(m.Revocations(), func(d trust.Document) bool {
		rev, err := trust.OpenRevocation(d)
		return err == nil && rev.Target == k
	})
}

// notSigner says who may do instead what this machine may not.
func (r *registry) notSigner(t *txn, what, command string) error {
	mesh, _ := peek[meshRecord](t, keyMesh)
	owner, _ := peek[nodeRecord](t, keyNode+text(mesh.Owner))
	if t.err != nil {
		return t.err
	}
	state := "offline"
	if r.online(mesh.Owner) {
		state = "online"
	}
	return hinted(refuse(coord.CodeNotSigner, "this machine may not %s. Signers: %s (%s)", what, owner.Name, state),
		"On %s run: overlay %s", owner.Name, command)
}

// invites lists every invite for the device that holds the signer's key.
func (r *registry) invites(ctx context.Context, device trust.Key) ([]coord.InviteInfo, error) {
	t := &txn{ctx: ctx, store: r.store}
	if _, err := memberOf(t, device); err != nil {
		return nil, err
	}
	if mesh, _ := peek[meshRecord](t, keyMesh); t.err == nil && mesh.Owner != device {
		return nil, r.notSigner(t, "list the invites", "invites")
	}
	_, records := list[inviteRecord](t, keyInvite)
	useKeys, uses := list[useRecord](t, keyUse)
	if t.err != nil {
		return nil, t.err
	}
	used := map[string][]string{}
	for i, key := range useKeys {
		invite, _, _ := strings.Cut(strings.TrimPrefix(key, keyUse), "/")
		used[invite] = append(used[invite], uses[i].Name)
	}
	infos := make([]coord.InviteInfo, 0, len(records))
	for _, record := range records {
		info, err := r.inviteInfo(record)
		if err != nil {
			return nil, err
		}
		info.Used = used[text(info.Invite)]
		infos = append(infos, info)
	}
	slices.SortFunc(infos, func(a, b coord.InviteInfo) int { return b.Created.Compare(a.Created) })
	return infos, nil
}

func (r *registry) inviteInfo(record inviteRecord) (coord.InviteInfo, error) {
	granted, err := trust.OpenInviteCap(record.Cap)
	state := "open"
	switch {
	case !record.Withdrawn.IsZero():
		state = "withdrawn"
	case record.Used >= int(granted.Uses):
		state = "used"
	case !r.now().Before(granted.NotAfter):
		state = "expired"
	}
	return coord.InviteInfo{
		Invite: granted.Invite, CreatedBy: record.CreatedBy, Created: record.Created, Expires: granted.NotAfter,
		Uses: int(granted.Uses), Name: granted.Name, Tags: granted.Tags, State: state,
	}, err
}

// nodes lists every member, by name, without presence.
func (r *registry) nodes(ctx context.Context, device trust.Key) ([]coord.NodeInfo, error) {
	t := &txn{ctx: ctx, store: r.store}
	if _, err := memberOf(t, device); err != nil {
		return nil, err
	}
	_, records := list[nodeRecord](t, keyNode)
	if t.err != nil {
		return nil, t.err
	}
	infos := make([]coord.NodeInfo, 0, len(records))
	for _, n := range records {
		if !n.member() {
			continue
		}
		infos = append(infos, coord.NodeInfo{
			Name: n.Name, IP4: n.IP4, IP6: n.IP6, WireGuard: n.WireGuard, Device: n.Device,
			Tags: n.Tags, Role: n.role().String(), Joined: n.Joined, InvitedBy: n.InvitedBy,
		})
	}
	slices.SortFunc(infos, func(a, b coord.NodeInfo) int { return strings.Compare(a.Name, b.Name) })
	return infos, nil
}
