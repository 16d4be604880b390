package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

// pickName gives the name a device gets: the invite's if it forces one, the
// wished one if it is free, else the wished one with a number.
func (r *registry) pickName(t *txn, a applicant, granted trust.InviteCap) (string, error) {
	if granted.Name != "" && a.exact && a.name != granted.Name {
		return "", hinted(refuse(coord.CodeBadRequest, "this invite is for the name %q, not for %.80q", granted.Name, a.name),
			"leave out --name, or ask for another invite")
	}
	wish, exact := cmp.Or(granted.Name, a.name), a.exact || granted.Name != ""
	if err := trust.ValidName(wish); err != nil {
		return "", hinted(refuse(coord.CodeBadRequest, "%v", err), "Suggested: %s", trust.NormalizeName(wish))
	}
	for n := 1; n <= maxSuffix; n++ {
		name := wish
		if n > 1 {
			suffix := "-" + strconv.Itoa(n)
			name = wish[:min(len(wish), maxNameLen-len(suffix))] + suffix
		}
		holder, e := peek[claim](t, keyName+name)
		if t.err != nil {
			return "", t.err
		}
		if e.Revision == 0 {
			t.depend(e)
			return name, nil
		}
		if !exact {
			continue
		}
		taken := r.nameTaken(t, name, holder.Device)
		if e, ok := errors.AsType[*coord.Error](taken); ok && granted.Name != "" {
			return "", hinted(e, "this invite is for that name alone: ask for another invite")
		}
		return "", taken
	}
	return "", refuse(coord.CodeNameTaken, "%d devices are called %q already", maxSuffix, wish)
}

// nameFree refuses a name that an invite cannot give its device; empty is none.
func (r *registry) nameFree(t *txn, name string) error {
	if name == "" {
		return nil
	}
	holder, taken := get[claim](t, keyName+name)
	if !taken {
		return t.err
	}
	return r.nameTaken(t, name, holder.Device)
}

func (r *registry) nameTaken(t *txn, name string, holder trust.Key) error {
	n, _ := peek[nodeRecord](t, keyNode+text(holder))
	if t.err != nil {
		return t.err
	}
	state := "offline"
	switch {
	case !n.Left.IsZero():
		state = "left; free again on " + n.Left.Add(quarantine).UTC().Format(timeLayout)
	case !n.member():
		state = "joining"
	case r.online(holder):
		state = "online"
	}
	return hinted(refuse(coord.CodeNameTaken, "name %q is taken by %v (%s)", name, n.IP4, state), "use --name with another one")
}

// pickAddress gives the lowest free address of the mesh. The cursor, below
// which nothing is free, makes that one look-up most of the time.
func pickAddress(t *txn, prefix netip.Prefix) (netip.Addr, error) {
	cursor, found := get[netip.Addr](t, keyCursor)
	if !found {
		cursor = prefix.Addr().Next()
	}
	last := broadcast(prefix)
	for addr := cursor; addr.Less(last); addr = addr.Next() {
		_, e := peek[claim](t, keyIP4+addr.String())
		if t.err != nil {
			return netip.Addr{}, t.err
		}
		if e.Revision == 0 {
			t.depend(e)
			t.put(keyCursor, addr.Next())
			return addr, nil
		}
	}
	return netip.Addr{}, hinted(refuse(coord.CodeNoAddress, "no address is free in %v", prefix),
		"an address is free again a day after its machine left (overlay leave); for more machines found a mesh with a larger --prefix")
}

// broadcast is the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(a)
}

// free gives back what a device held. Of a reservation nothing stays; of a
// member that left its record stays, because its key never comes back.
func free(t *txn, n nodeRecord) {
	for _, key := range []string{keyName + n.Name, keyIP4 + n.IP4.String(), keyWireGuard + text(n.WireGuard)} {
		if holder, found := get[claim](t, key); found && holder.Device == n.Device {
			t.del(key)
		}
	}
	if cursor, found := get[netip.Addr](t, keyCursor); found && n.IP4.Less(cursor) {
		t.put(keyCursor, n.IP4)
	}
	if !n.Left.IsZero() {
		t.del(expireKey(n.Left.Add(quarantine), n.Device))
		return
	}
	t.del(expireKey(n.Reserved.Add(reservationTime), n.Device))
	t.del(keyNode + text(n.Device))
	t.del(useKey(n.Invite, n.Device))
	if invite, found := get[inviteRecord](t, keyInvite+text(n.Invite)); found {
		invite.Used--
		t.put(keyInvite+text(n.Invite), invite)
	}
}

// sweep gives back what nobody finished to reserve, and what members that left
// a day ago held.
func (r *registry) sweep(ctx context.Context) error {
	look := &txn{ctx: ctx, store: r.store}
	keys, holders := list[claim](look, keyExpire)
	if look.err != nil {
		return look.err
	}
	now := r.now()
	for i, key := range keys {
		if at, err := expireTime(key); err != nil || now.Before(at) {
			return err
		}
		if err := update(ctx, r.store, func(t *txn) error { return expire(t, key, holders[i].Device) }); err != nil {
			return fmt.Errorf("free what %s held: %w", key, err)
		}
	}
	return nil
}

// expire frees what a device holds, unless somebody else did.
func expire(t *txn, key string, device trust.Key) error {
	if _, found := get[claim](t, key); !found {
		return t.err
	}
	n, found := get[nodeRecord](t, keyNode+text(device))
	if !found || n.member() {
		t.del(key)
		return t.err
	}
	free(t, n)
	return t.err
}

func expireTime(key string) (time.Time, error) {
	s := key[len(keyExpire):]
	seconds, err := strconv.ParseInt(s[:min(len(s), 12)], 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("read time of %s: %w", key, err)
	}
	return time.Unix(seconds, 0), nil
}
