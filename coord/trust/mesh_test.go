package trust

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// world is a mesh to change documents of.
type world struct {
	t     testing.TB
	hash  Hash
	base  Document // the Genesis
	first Document // the State of epoch 1
	*Mesh
}

func newWorld(t testing.TB) *world {
	w := &world{t: t}
	w.base = must(SignGenesis(testGenesis(t), privateKey(rootSeed)))(t)
	w.hash = w.base.Hash()
	w.first = must(SignState(testState(t), privateKey(rootSeed)))(t)
	w.Mesh = must(NewMesh(w.hash, w.base, w.first))(t)
	return w
}

// join is what an admission rests on, to be changed before it is signed.
type join struct {
	cap            InviteCap
	cert           NodeCert
	seen           time.Time
	signer, server byte
	invite, device byte
}

// newJoin returns the join of the device with that seed. Its name, WireGuard
// key and addresses are its own.
func (w *world) newJoin(device byte) join {
	cert := testNodeCert(w.t)
	cert.Device = key(device)
	cert.WireGuard = Key{0: device, 1: 1}
	cert.Name = "node-" + string(rune('a'+device%26))
	cert.IP4 = netip.AddrFrom4([4]byte{100, 64, 1, device})
	cert.IP6 = DeriveIP6(w.Genesis().ULA, w.hash, cert.Device)
	return join{
		cap: testInviteCap(), cert: cert, seen: at(time.Hour),
		signer: signerSeed, server: serverSeed, invite: inviteSeed, device: device,
	}
}

// admit signs a join and admits it.
func (w *world) admit(j join) error {
	w.t.Helper()
	invite := must(SignInviteCap(j.cap, privateKey(j.signer)))(w.t)
	cert := must(SignNodeCert(j.cert, privateKey(j.invite), privateKey(j.device)))(w.t)
	seen := must(Countersign(cert, j.seen, privateKey(j.server)))(w.t)
	got, err := w.Admit(invite, seen)
	if err == nil && got.Device != key(j.device) {
		w.t.Errorf("admitted %v for %v", got.Device, key(j.device))
	}
	return err
}

func (w *world) mustAdmit(j join) {
	w.t.Helper()
	if err := w.admit(j); err != nil {
		w.t.Fatal(err)
	}
}

// revoke signs and adds a revocation, by the key with the seed.
func (w *world) revoke(target Key, by byte, from time.Time) error {
	w.t.Helper()
	return w.AddRevocation(must(SignRevocation(Revocation{target, key(by), from}, privateKey(by)))(w.t))
}

// next signs the state that follows the current one, changed.
func (w *world) next(change func(*State)) Document {
	w.t.Helper()
	s := w.State()
	s.Epoch, s.Prev = s.Epoch+1, w.stateHash
	change(&s)
	return must(SignState(s, privateKey(rootSeed)))(w.t)
}

func (w *world) wantLive(names ...string) {
	w.t.Helper()
	var live []string
	for _, c := range w.Live() {
		live = append(live, c.Name)
	}
	if !slices.Equal(live, names) {
		w.t.Errorf("live are %q, want %q", live, names)
	}
}

func TestNewMesh(t *testing.T) {
	w := newWorld(t)
	foreign := testGenesis(t)
	foreign.Root = key(otherSeed)
	foreignGenesis := must(SignGenesis(foreign, privateKey(otherSeed)))(t)
	foreignState := must(SignState(testState(t), privateKey(otherSeed)))(t)
	trailer := append(Document{}, append(w.base, 0)...)
	for name, try := range map[string]struct {
		hash           Hash
		genesis, state Document
	}{
		"another genesis":      {w.hash, foreignGenesis, foreignState},
		"another trust hash":   {foreignGenesis.Hash(), w.base, w.first},
		"state by another":     {w.hash, w.base, foreignState},
		"state for genesis":    {w.first.Hash(), w.first, w.first},
		"genesis for state":    {w.hash, w.base, w.base},
		"nothing":              {Document(nil).Hash(), nil, nil},
		"no state":             {w.hash, w.base, nil},
		"genesis with trailer": {trailer.Hash(), trailer, w.first},
	} {
		if _, err := NewMesh(try.hash, try.genesis, try.state); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if w.Genesis() != testGenesis(t) || w.State().Name != "home" {
		t.Errorf("opened as %+v, %+v", w.Genesis(), w.State())
	}
}

func TestPinOK(t *testing.T) {
	w := newWorld(t)
	for pin, want := range map[Hash]bool{pinOf(t, serverSeed): true, {1}: true, {2}: false, {3}: false, {}: false} {
		if got := w.PinOK(pin); got != want {
			t.Errorf("%x is ok: %v", pin, got)
		}
	}
}

func TestAdmitRefuses(t *testing.T) {
	for name, try := range map[string]struct {
		change func(*join)
		want   error  // a sentinel, or
		text   string // a part of the message
	}{
		"signer not listed": {change: func(j *join) { j.signer, j.cap.Signer = otherSeed, key(otherSeed) }, text: "no signer"},
		"root as signer":    {change: func(j *join) { j.signer, j.cap.Signer = rootSeed, key(rootSeed) }, text: "no signer"},
		"foreign server":    {change: func(j *join) { j.server = otherSeed }, text: "no server's"},
		"too early":         {change: func(j *join) { j.seen = at(-time.Second) }, text: "not valid before"},
		"just expired":      {change: func(j *join) { j.seen = at(24 * time.Hour) }, want: ErrExpired},
		"another invite": {
			change: func(j *join) { j.invite, j.cert.Invite = otherSeed, key(otherSeed) },
			text:   "by another invite",
		},
		"name not the forced": {change: func(j *join) { j.cap.Name, j.cap.Uses = "carl", 1 }, text: `for the name "carl"`},
		"relay without tag":   {change: func(j *join) { j.cert.Role = RoleRelay }, text: `no tag "relay"`},
		"tag not given":       {change: func(j *join) { j.cert.Tags = []string{"admin"} }, text: `tag "admin"`},
		"IPv6 of another":     {change: func(j *join) { j.cert.IP6 = j.cert.IP6.Next() }, text: "not derived"},
		"IPv4 outside":        {change: func(j *join) { j.cert.IP4 = netip.MustParseAddr("100.65.0.1") }, text: "no address"},
		"IPv4 network":        {change: func(j *join) { j.cert.IP4 = netip.MustParseAddr("100.64.0.0") }, text: "no address"},
		"IPv4 broadcast":      {change: func(j *join) { j.cert.IP4 = netip.MustParseAddr("100.64.255.255") }, text: "no address"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			j := w.newJoin(deviceSeed)
			try.change(&j)
			err := w.admit(j)
			if err == nil || !strings.Contains(err.Error(), try.text) || try.want != nil && !errors.Is(err, try.want) {
				t.Errorf("got %v, want %v %q", err, try.want, try.text)
			}
			w.wantLive()
		})
	}
}

func TestAdmit(t *testing.T) {
	for name, change := range map[string]func(*join){
		"as it is":     func(*join) {},
		"first second": func(j *join) { j.seen = at(0) },
		"last second":  func(j *join) { j.seen = at(24*time.Hour - time.Second) },
		"forced name":  func(j *join) { j.cap.Name, j.cap.Uses = j.cert.Name, 1 },
		"all tags":     func(j *join) { j.cert.Tags = []string{"db", "web"} },
		"no tags":      func(j *join) { j.cert.Tags = nil },
		"relay":        func(j *join) { j.cap.Tags, j.cert.Tags, j.cert.Role = []string{RelayTag}, nil, RoleRelay },
		"node by a relay's invite": func(j *join) {
			j.cap.Tags, j.cert.Tags = []string{RelayTag}, []string{RelayTag}
		},
		"last address": func(j *join) { j.cert.IP4 = netip.MustParseAddr("100.64.255.254") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			j := w.newJoin(deviceSeed)
			change(&j)
			w.mustAdmit(j)
			w.mustAdmit(j) // changes nothing
			w.wantLive(j.cert.Name)
			if got, ok := w.Device(key(deviceSeed)); !ok || got.IP4 != j.cert.IP4 {
				t.Errorf("device is %+v, %v", got, ok)
			}
		})
	}
}

// TestAdmitBadDocuments gives each document to Admit with one bit changed.
func TestAdmitBadDocuments(t *testing.T) {
	w := newWorld(t)
	docs := documents(t)
	for i := range len(docs[2].doc) {
		changed := bytes.Clone(docs[2].doc)
		changed[i] ^= 1
		if _, err := w.Admit(changed, docs[4].doc); err == nil {
			t.Fatalf("invite: octet %d changed", i)
		}
	}
	inner := bytes.Clone(docs[3].doc)
	inner[len(inner)-1] ^= 1
	seen := must(Countersign(inner, at(time.Hour), privateKey(serverSeed)))(t)
	if _, err := w.Admit(docs[2].doc, seen); !errors.Is(err, ErrSignature) {
		t.Errorf("certificate with a bad signature, countersigned: %v, want %v", err, ErrSignature)
	}
	if _, err := w.Admit(docs[2].doc, docs[4].doc); err != nil {
		t.Errorf("unchanged: %v", err)
	}
}

func TestConflict(t *testing.T) {
	first := newWorld(t).newJoin(deviceSeed).cert
	for name, change := range map[string]func(*NodeCert){
		"name":      func(c *NodeCert) { c.Name = first.Name },
		"IPv4":      func(c *NodeCert) { c.IP4 = first.IP4 },
		"WireGuard": func(c *NodeCert) { c.WireGuard = first.WireGuard },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.mustAdmit(w.newJoin(deviceSeed))
			second := w.newJoin(otherSeed)
			change(&second.cert)
			if err := w.admit(second); !errors.Is(err, ErrConflict) {
				t.Errorf("newcomer: %v, want %v", err, ErrConflict)
			}
			w.wantLive(first.Name)
			// It is free once the first has gone, and the refusal cost no use.
			w.Remove(key(deviceSeed))
			w.wantLive()
			w.mustAdmit(second)
			if err := w.admit(w.newJoin(deviceSeed)); !errors.Is(err, ErrConflict) {
				t.Errorf("returning: %v, want %v", err, ErrConflict)
			}
		})
	}
}

func TestUses(t *testing.T) {
	w := newWorld(t)
	w.mustAdmit(w.newJoin(20))
	w.mustAdmit(w.newJoin(21))
	if err := w.admit(w.newJoin(22)); !errors.Is(err, ErrUsed) {
		t.Errorf("third of two: %v, want %v", err, ErrUsed)
	}
	w.Remove(key(20))
	if err := w.admit(w.newJoin(22)); !errors.Is(err, ErrUsed) {
		t.Errorf("after one left: %v, want %v", err, ErrUsed)
	}
	w.mustAdmit(w.newJoin(20)) // again is no further use
	w.wantLive("node-u", "node-v")
}

func TestReplace(t *testing.T) {
	w := newWorld(t)
	old := w.newJoin(deviceSeed)
	old.cert.Serial = 5
	w.mustAdmit(old)

	same, lower, higher := old, old, old
	same.cert.Name = "renamed"
	lower.cert.Serial = 4
	higher.cert.Serial, higher.cert.Name = 6, "renamed"
	if err := w.admit(same); !errors.Is(err, ErrConflict) {
		t.Errorf("same serial, another name: %v, want %v", err, ErrConflict)
	}
	if err := w.admit(lower); !errors.Is(err, ErrConflict) {
		t.Errorf("lower serial: %v, want %v", err, ErrConflict)
	}
	w.wantLive(old.cert.Name)
	w.mustAdmit(higher)
	w.wantLive("renamed")

	// The former name is free again, the rest is not.
	other := w.newJoin(otherSeed)
	other.cert.Name = old.cert.Name
	w.mustAdmit(other)
	w.wantLive(old.cert.Name, "renamed")
	if err := w.admit(old); !errors.Is(err, ErrConflict) {
		t.Errorf("the replaced one again: %v, want %v", err, ErrConflict)
	}
	// A replacement that collides leaves everything as it was.
	higher.cert.Serial, higher.cert.IP4 = 7, other.cert.IP4
	if err := w.admit(higher); !errors.Is(err, ErrConflict) {
		t.Errorf("replacement with a taken address: %v, want %v", err, ErrConflict)
	}
	w.wantLive(old.cert.Name, "renamed")
}

func TestRemoveUnknown(t *testing.T) {
	w := newWorld(t)
	w.mustAdmit(w.newJoin(deviceSeed))
	w.Remove(key(otherSeed))
	w.Remove(Key{})
	w.wantLive(w.newJoin(deviceSeed).cert.Name)
}
