package server

import (
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"pgregory.net/rapid"

	"overlay/coord"
	"overlay/coord/store"
	"overlay/coord/trust"
)

// bareRegistry is a registry with a mesh in a store and no server around it.
func bareRegistry(t testing.TB, prefix netip.Prefix, clock *time.Time) (*registry, *owner) {
	t.Helper()
	db, err := store.OpenBolt(filepath.Join(t.TempDir(), storeFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	invite, err := coord.NewInvite(coord.InviteOwner, [32]byte{}, "127.0.0.1:443")
	if err != nil {
		t.Fatal(err)
	}
	o := newOwner(t, invite)
	r := &registry{store: db, now: func() time.Time { return *clock }, online: func(trust.Key) bool { return false }}
	err = update(t.Context(), db, func(tx *txn) error {
		tx.put(keyMesh, meshRecord{Prefix4: prefix, Owner: public(o.device)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return r, o
}

// addInvite puts an invite in without asking who signed it.
func (r *registry) addInvite(t testing.TB, o *owner, change func(*trust.InviteCap)) coord.Invite {
	t.Helper()
	i, doc := o.capability(t, o.signer, change)
	err := update(t.Context(), r.store, func(tx *txn) error {
		tx.put(keyInvite+text(public(i.Key())), inviteRecord{Cap: doc, CreatedBy: "anna", Created: r.now()})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// TestAddresses runs joins, departures and the passing of time at random: every
// device gets the lowest free address and name, nobody's, and never the
// network's or broadcast address.
func TestAddresses(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		prefix := netip.MustParsePrefix("100.70.3.16/29") // six addresses for nodes
		clock := time.Now()
		r, o := bareRegistry(t, prefix, &clock)
		invite := r.addInvite(t, o, func(c *trust.InviteCap) { c.Uses, c.NotAfter = trust.MaxUses, clock.Add(1000*time.Hour) })
		free := map[netip.Addr]time.Time{} // when held addresses are free; zero: not yet
		holder := map[netip.Addr]applicant{}
		isFree := func(a netip.Addr) bool {
			at, held := free[a]
			return !held || !at.IsZero() && !clock.Before(at)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"join": func(rt *rapid.T) {
				var want netip.Addr
				for a := prefix.Addr().Next(); a != broadcast(prefix); a = a.Next() {
					if isFree(a) {
						want = a
						break
					}
				}
				a := applicantOf(newNode(t), invite, "laptop")
				reply, err := r.reserve(t.Context(), a)
				if !want.IsValid() {
					if codeOf(err) != coord.CodeNoAddress {
						rt.Fatalf("all is taken, but: %v, %v", reply.IP4, err)
					}
					return
				}
				if err != nil || reply.IP4 != want {
					rt.Fatalf("got %v, %v; want %v", reply.IP4, err, want)
				}
				again, err := r.reserve(t.Context(), a)
				if err != nil || again.IP4 != reply.IP4 || again.Name != reply.Name {
					rt.Fatalf("repeat: %+v, %v", again, err)
				}
				free[want], holder[want] = clock.Add(reservationTime), a
			},
			"leave": func(rt *rapid.T) {
				for a, who := range holder {
					if isFree(a) {
						continue
					}
					err := update(t.Context(), r.store, func(tx *txn) error { r.withdraw(tx, who.device, "anna"); return nil })
					if err != nil {
						rt.Fatal(err)
					}
					free[a] = time.Unix(clock.Unix(), 0).Add(quarantine)
					delete(holder, a)
					return
				}
			},
			"wait": func(rt *rapid.T) {
				clock = clock.Add(time.Duration(rapid.IntRange(1, 30).Draw(rt, "hours")) * time.Hour)
			},
		})
	})
}

// The cursor makes the next address one look-up, however many are taken.
func TestAddressLookUps(t *testing.T) {
	clock := time.Now()
	r, o := bareRegistry(t, netip.MustParsePrefix("100.70.0.0/16"), &clock)
	counted := &countingStore{Store: r.store}
	r.store = counted
	i := r.addInvite(t, o, uses(100))
	for range 30 {
		counted.addresses = 0
		if _, err := r.reserve(t.Context(), applicantOf(newNode(t), i, "n"+text(public(newKey(t)))[:8])); err != nil {
			t.Fatal(err)
		}
		if counted.addresses != 1 {
			t.Fatalf("%d look-ups", counted.addresses)
		}
	}
}
