package server

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"overlay/coord/store"
	"overlay/coord/trust"
)

// The keys of the store. A name, an IPv4 address and a WireGuard key are
// claimed by a key of their own, so that compare-and-swap keeps them unique.
//
//	mesh                    meshRecord
//	owner-invite            ownerRecord, while there is no mesh
//	cursor                  netip.Addr: no address below it is free
//	invite/<I>              inviteRecord
//	use/<I>/<D>             useRecord
//	node/<D>                nodeRecord
//	name/<name>             claim
//	ip4/<address>           claim
//	wg/<W>                  claim
//	expire/<unix time>/<D>  claim: when to give back what D holds
//	revocation/<hash>       trust.Document
const (
	keyMesh       = "mesh"
	keyOwner      = "owner-invite"
	keyCursor     = "cursor"
	keyInvite     = "invite/"
	keyUse        = "use/"
	keyNode       = "node/"
	keyName       = "name/"
	keyIP4        = "ip4/"
	keyWireGuard  = "wg/"
	keyExpire     = "expire/"
	keyRevocation = "revocation/"
)

func text(k [32]byte) string { return hex.EncodeToString(k[:]) }

func useKey(invite, device trust.Key) string { return keyUse + text(invite) + "/" + text(device) }

// expireKey sorts by time.
func expireKey(at time.Time, device trust.Key) string {
	return fmt.Sprintf("%s%012d/%s", keyExpire, at.Unix(), text(device))
}

// meshRecord is the mesh as its owner founded it.
type meshRecord struct {
	Genesis trust.Document `json:"genesis"`
	State   trust.Document `json:"state"`
	Prefix4 netip.Prefix   `json:"prefix4"`
	Owner   trust.Key      `json:"owner"`  // the device that holds the first signer's key
	Invite  trust.Key      `json:"invite"` // the owner invite that was used
}

// ownerRecord is the open owner invite. The server keeps no more of it than
// what verifies it.
type ownerRecord struct {
	Invite trust.Key `json:"invite"`
}

// inviteRecord is an invite and what became of it.
type inviteRecord struct {
	Cap         trust.Document `json:"cap"`
	CreatedBy   string         `json:"createdBy"`
	Created     time.Time      `json:"created"`
	Used        int            `json:"used"`
	Withdrawn   time.Time      `json:"withdrawn,omitzero"`
	WithdrawnBy string         `json:"withdrawnBy,omitempty"`
}

// useRecord says which device used an invite.
type useRecord struct {
	Name string    `json:"name"`
	At   time.Time `json:"at"`
}

// nodeRecord is a device: reserved while Cert is empty, a member until Left.
type nodeRecord struct {
	Device    trust.Key      `json:"device"`
	WireGuard trust.Key      `json:"wireguard"`
	Invite    trust.Key      `json:"invite"`
	InvitedBy string         `json:"invitedBy"`
	Name      string         `json:"name"`
	IP4       netip.Addr     `json:"ip4"`
	IP6       netip.Addr     `json:"ip6,omitzero"` // of a member
	Tags      []string       `json:"tags,omitempty"`
	Role      trust.Role     `json:"role,omitempty"` // of a member; 0: from before there were relays
	Cap       trust.Document `json:"cap"`
	Cert      trust.Document `json:"cert,omitempty"` // countersigned
	Reserved  time.Time      `json:"reserved"`
	Joined    time.Time      `json:"joined,omitzero"`
	Left      time.Time      `json:"left,omitzero"`
}

func (n nodeRecord) member() bool { return len(n.Cert) > 0 && n.Left.IsZero() }

// role is what a member does in the mesh.
func (n nodeRecord) role() trust.Role { return cmp.Or(n.Role, trust.RoleNode) }

// claim says who holds something.
type claim struct {
	Device trust.Key `json:"device"`
}

// txn collects what one transaction read and writes. The first error stays.
type txn struct {
	ctx     context.Context
	store   store.Store
	compare []store.Compare
	ops     []store.Op
	err     error
}

// get reads a key and makes the transaction depend on it.
func get[T any](t *txn, key string) (value T, found bool) {
	value, e := peek[T](t, key)
	t.depend(e)
	return value, e.Revision != 0
}

// depend makes the transaction fail if the entry has changed since.
func (t *txn) depend(e store.Entry) {
	t.compare = append(t.compare, store.Compare{Key: e.Key, Revision: e.Revision})
}

// peek reads a key without depending on it.
func peek[T any](t *txn, key string) (value T, e store.Entry) {
	if t.err != nil {
		return value, e
	}
	if e, t.err = t.store.Get(t.ctx, key); t.err == nil && e.Revision != 0 {
		value, t.err = decodeValue[T](e)
	}
	return value, e
}

func decodeValue[T any](e store.Entry) (value T, err error) {
	if err := json.Unmarshal(e.Value, &value); err != nil {
		return value, fmt.Errorf("read %s from the store: %w", e.Key, err)
	}
	return value, nil
}

// list reads all keys with a prefix without depending on them.
func list[T any](t *txn, prefix string) (keys []string, values []T) {
	if t.err != nil {
		return nil, nil
	}
	entries, _, err := t.store.List(t.ctx, prefix)
	t.err = err
	for _, e := range entries {
		v, err := decodeValue[T](e)
		if err != nil {
			t.err = err
			return nil, nil
		}
		keys, values = append(keys, e.Key), append(values, v)
	}
	return keys, values
}

func (t *txn) put(key string, value any) {
	b, err := json.Marshal(value)
	if err != nil {
		t.err = errors.Join(t.err, fmt.Errorf("encode %s: %w", key, err))
	}
	t.ops = append(t.ops, store.Op{Key: key, Value: b})
}

func (t *txn) del(key string) { t.ops = append(t.ops, store.Op{Key: key, Delete: true}) }

// maxRetries bounds how often a transaction is repeated because others were
// faster. Every round somebody commits, so it takes that many rivals to fail.
const maxRetries = 1000

var errBusy = errors.New("too many changes at once")

// update runs f until what it read is still true when it commits. When f fails
// nothing is changed.
func update(ctx context.Context, s store.Store, f func(*txn) error) error {
	for range maxRetries {
		t := &txn{ctx: ctx, store: s}
		if err := f(t); t.err != nil || err != nil {
			return cmp.Or(t.err, err)
		}
		if len(t.ops) == 0 {
			return nil
		}
		if _, err := s.Txn(ctx, t.compare, t.ops); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return errBusy
}
