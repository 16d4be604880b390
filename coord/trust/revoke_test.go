package trust

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestUpdateState(t *testing.T) {
	w := newWorld(t)
	first := w.stateHash
	if err := w.UpdateState(w.first); err != nil {
		t.Errorf("the same again: %v", err)
	}
	other := must(SignState(func() State { s := testState(t); s.Name = "away"; return s }(), privateKey(rootSeed)))(t)
	second := w.next(func(s *State) { s.Name = "second" })
	for name, d := range map[string]Document{
		"same epoch, another":    other,
		"prev of another":        w.next(func(s *State) { s.Prev = other.Hash() }),
		"epoch left out":         w.next(func(s *State) { s.Epoch = 3 }),
		"epoch left out, linked": w.next(func(s *State) { s.Epoch, s.Prev = 3, second.Hash() }),
		"by another root": must(SignState(func() State {
			s := testState(t)
			s.Epoch, s.Prev = 2, first
			return s
		}(), privateKey(otherSeed)))(t),
		"genesis": w.base,
	} {
		if err := w.UpdateState(d); err == nil || w.State().Name != "home" {
			t.Errorf("%s: %v, and the name is %q", name, err, w.State().Name)
		}
	}
	if err := w.UpdateState(second); err != nil || w.State().Name != "second" {
		t.Fatalf("next: %v, and the name is %q", err, w.State().Name)
	}
	if err := w.UpdateState(w.first); err == nil || w.State().Epoch != 2 {
		t.Errorf("back to epoch 1: %v, and the epoch is %d", err, w.State().Epoch)
	}
	if err := w.UpdateState(w.next(func(*State) {})); err != nil {
		t.Errorf("third: %v", err)
	}
}

// TestStateWithdraws: what a new state no longer covers is not live, and what
// it covers anew may come.
func TestStateWithdraws(t *testing.T) {
	for name, change := range map[string]func(*State){
		"signer": func(s *State) { s.Signers = []Key{key(otherSeed)} },
		"prefix": func(s *State) { s.Prefix4 = netip.MustParsePrefix("100.64.2.0/24") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.mustAdmit(w.newJoin(deviceSeed))
			if err := w.UpdateState(w.next(func(s *State) { s.Policy = Hash{1} })); err != nil {
				t.Fatal(err)
			}
			w.wantLive(w.newJoin(deviceSeed).cert.Name)
			if err := w.UpdateState(w.next(change)); err != nil {
				t.Fatal(err)
			}
			w.wantLive()
			if err := w.admit(w.newJoin(deviceSeed)); err == nil {
				t.Error("admitted again")
			}
		})
	}
}

// TestFirstSigner: Genesis' signer needs no listing in epoch 1, but later.
func TestFirstSigner(t *testing.T) {
	w := newWorld(t)
	s := testState(t)
	s.Signers = nil
	unlisted := must(SignState(s, privateKey(rootSeed)))(t)
	w.Mesh = must(NewMesh(w.hash, w.base, unlisted))(t)
	w.mustAdmit(w.newJoin(deviceSeed))
	if err := w.UpdateState(w.next(func(*State) {})); err != nil {
		t.Fatal(err)
	}
	w.wantLive()
}

func TestRevocation(t *testing.T) {
	seen := at(time.Hour) // when newJoin's certificate was countersigned
	for name, try := range map[string]struct {
		target Key
		by     byte
		from   time.Time
		out    bool
	}{
		"device by signer":         {key(deviceSeed), signerSeed, seen, true},
		"device by root":           {key(deviceSeed), rootSeed, seen, true},
		"device by itself":         {key(deviceSeed), deviceSeed, seen, true},
		"device from later":        {key(deviceSeed), signerSeed, seen.Add(time.Hour), true},
		"invite from before":       {key(inviteSeed), signerSeed, seen.Add(-time.Second), true},
		"invite from then":         {key(inviteSeed), signerSeed, seen, true},
		"invite from later":        {key(inviteSeed), signerSeed, seen.Add(time.Second), false},
		"signer from before":       {key(signerSeed), rootSeed, seen.Add(-time.Second), true},
		"signer by itself":         {key(signerSeed), signerSeed, seen, true},
		"signer from later":        {key(signerSeed), rootSeed, seen.Add(time.Second), false},
		"another":                  {key(otherSeed), rootSeed, seen, false},
		"invite by itself":         {key(inviteSeed), inviteSeed, at(0), false}, // else each guest could expel the others
		"unknown device by itself": {key(otherSeed), otherSeed, at(0), false},
	} {
		t.Run(name, func(t *testing.T) {
			before, after := newWorld(t), newWorld(t)
			j := before.newJoin(deviceSeed)
			before.mustAdmit(j)
			if err := before.revoke(try.target, try.by, try.from); err != nil {
				t.Fatal(err)
			}
			if err := after.revoke(try.target, try.by, try.from); err != nil {
				t.Fatal(err)
			}
			err := after.admit(j)
			if try.out != errors.Is(err, ErrRevoked) || !try.out && err != nil {
				t.Errorf("admitted after it: %v", err)
			}
			if !reflect.DeepEqual(before.Live(), after.Live()) || try.out != (len(before.Live()) == 0) {
				t.Errorf("live are %v when revoked after, %v when before", before.Live(), after.Live())
			}
		})
	}
}

func TestRevocationRefused(t *testing.T) {
	w := newWorld(t)
	w.mustAdmit(w.newJoin(deviceSeed))
	for name, try := range map[string]struct {
		target Key
		by     byte
	}{
		"device by a stranger": {key(deviceSeed), otherSeed},
		"device by the invite": {key(deviceSeed), inviteSeed},
		"device by the server": {key(deviceSeed), serverSeed},
		"invite by its device": {key(inviteSeed), deviceSeed},
		"root by a signer":     {key(rootSeed), signerSeed},
		"root by itself":       {key(rootSeed), rootSeed},
	} {
		if err := w.revoke(try.target, try.by, at(0)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if len(w.Revocations()) != 0 {
		t.Errorf("%d revocations are kept", len(w.Revocations()))
	}
	w.wantLive(w.newJoin(deviceSeed).cert.Name)
}

// TestRevocationKept: the caller's buffer may change afterwards.
func TestRevocationKept(t *testing.T) {
	w := newWorld(t)
	d := must(SignRevocation(Revocation{key(deviceSeed), key(rootSeed), at(0)}, privateKey(rootSeed)))(t)
	want := string(d)
	if err := w.AddRevocation(d); err != nil {
		t.Fatal(err)
	}
	clear(d)
	if got := w.Revocations(); len(got) != 1 || string(got[0]) != want {
		t.Errorf("kept %x, want %x", got, want)
	}
	if err := w.AddRevocation(d); !errors.Is(err, ErrEncoding) {
		t.Errorf("zeros: %v, want %v", err, ErrEncoding)
	}
}

// TestRevocationOrder: whatever the order, and however often they come, the
// same revocations count and the same device is out.
func TestRevocationOrder(t *testing.T) {
	var docs []Document
	for _, by := range []byte{rootSeed, signerSeed, deviceSeed} {
		for _, target := range []byte{signerSeed, inviteSeed, deviceSeed} {
			for hour := range 3 {
				r := Revocation{key(target), key(by), at(time.Duration(hour) * time.Hour)}
				docs = append(docs, must(SignRevocation(r, privateKey(by)))(t))
			}
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		some := rapid.SliceOfN(rapid.SampledFrom(docs), 0, 12).Draw(rt, "revocations")
		shuffled := append(rapid.Permutation(some).Draw(rt, "shuffled"), some...)
		split := rapid.IntRange(0, len(some)).Draw(rt, "split")
		a, b := newWorld(t), newWorld(t)
		add := func(w *world, d Document) {
			// Those by the device of others are refused, each time.
			if err := w.AddRevocation(d); err != nil && !strings.Contains(err.Error(), "neither the root nor") {
				rt.Error(err)
			}
		}
		for i, d := range some {
			if i == split {
				_ = a.admit(a.newJoin(deviceSeed)) // refused when already withdrawn
			}
			add(a, d)
		}
		if split == len(some) {
			_ = a.admit(a.newJoin(deviceSeed))
		}
		for _, d := range shuffled {
			add(b, d)
		}
		_ = b.admit(b.newJoin(deviceSeed))
		if !slices.EqualFunc(a.Revocations(), b.Revocations(), func(x, y Document) bool { return string(x) == string(y) }) {
			rt.Errorf("%x and %x", a.Revocations(), b.Revocations())
		}
		if !reflect.DeepEqual(a.Live(), b.Live()) {
			rt.Errorf("live are %v and %v", a.Live(), b.Live())
		}
	})
}

// TestRevocationBound: a flood of one kind is refused and leaves room for the
// other, and for stronger ones of targets already known.
func TestRevocationBound(t *testing.T) {
	w := newWorld(t)
	if err := w.revoke(key(deviceSeed), deviceSeed, at(time.Hour)); err != nil {
		t.Fatal(err)
	}
	for i := range maxRevocations - 1 {
		w.departed[Key{byte(i), byte(i >> 8), byte(i >> 16), 1}] = withdrawal{}
	}
	if err := w.revoke(key(otherSeed), otherSeed, at(0)); err == nil {
		t.Error("one more than there may be was accepted")
	}
	if err := w.revoke(key(deviceSeed), deviceSeed, at(0)); err != nil {
		t.Errorf("a stronger one of a known target: %v", err)
	}
	if err := w.revoke(key(otherSeed), rootSeed, at(0)); err != nil {
		t.Errorf("one by the root: %v", err)
	}
}
