package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// opener gives a fresh store, and reopens the same one after close.
type opener func(t testing.TB) (s Store, reopen func() Store)

// conformance is what every engine has to pass.
func conformance(t *testing.T, open opener) {
	t.Helper()
	for name, f := range map[string]func(*testing.T, opener){
		"get and list":       testGetList,
		"compare and swap":   testCompare,
		"all or nothing":     testAtomic,
		"limits":             testLimits,
		"revisions survive":  testReopen,
		"parallel increment": testParallel,
		"watch":              testWatch,
		"watch ends":         testWatchEnds,
		"compaction":         testCompaction,
		"closed":             testClosed,
		"against a model":    testModel,
	} {
		t.Run(name, func(t *testing.T) { f(t, open) })
	}
}

func put(t testing.TB, s Store, key, value string) uint64 {
	t.Helper()
	r, err := s.Txn(t.Context(), nil, []Op{{Key: key, Value: []byte(value)}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func testGetList(t *testing.T, open opener) {
	s, _ := open(t)
	r1 := put(t, s, "a/2", "two")
	r2 := put(t, s, "a/1", "one")
	put(t, s, "b", "")
	got, err := s.Get(t.Context(), "a/1")
	if diff := cmp.Diff(Entry{"a/1", []byte("one"), r2}, got); err != nil || diff != "" {
		t.Fatal(err, diff)
	}
	absent, err := s.Get(t.Context(), "a/")
	if err != nil || absent.Revision != 0 || absent.Key != "a/" {
		t.Fatalf("absent key: %+v, %v", absent, err)
	}
	list, rev, err := s.List(t.Context(), "a/")
	want := []Entry{{"a/1", []byte("one"), r2}, {"a/2", []byte("two"), r1}}
	if diff := cmp.Diff(want, list); err != nil || diff != "" || rev != 3 {
		t.Fatal(err, rev, diff)
	}
	got.Value[0] = 'X'
	if again, _ := s.Get(t.Context(), "a/1"); string(again.Value) != "one" {
		t.Fatalf("a reader changed the store: %q", again.Value)
	}
}

func testCompare(t *testing.T, open opener) {
	s, _ := open(t)
	r := put(t, s, "k", "v")
	for _, c := range []struct {
		key  string
		rev  uint64
		want error
	}{
		{"k", 0, ErrConflict},
		{"k", r + 1, ErrConflict},
		{"absent", r, ErrConflict},
		{"absent", 0, nil},
		{"k", r, nil},
	} {
		_, err := s.Txn(t.Context(), []Compare{{c.key, c.rev}}, []Op{{Key: "other", Value: []byte("x")}})
		if !errors.Is(err, c.want) {
			t.Errorf("compare %q at %d: %v, want %v", c.key, c.rev, err, c.want)
		}
	}
}

func testAtomic(t *testing.T, open opener) {
	s, _ := open(t)
	put(t, s, "a", "1")
	before, rev, _ := s.List(t.Context(), "")
	ops := []Op{{Key: "a", Delete: true}, {Key: "b", Value: []byte("2")}}
	if _, err := s.Txn(t.Context(), []Compare{{"a", 1}, {"b", 9}}, ops); !errors.Is(err, ErrConflict) {
		t.Fatal(err)
	}
	after, rev2, _ := s.List(t.Context(), "")
	if diff := cmp.Diff(before, after); diff != "" || rev != rev2 {
		t.Fatalf("a refused transaction left something: %s (revision %d, %d)", diff, rev, rev2)
	}
	if _, err := s.Txn(t.Context(), []Compare{{"a", 1}, {"b", 0}}, ops); err != nil {
		t.Fatal(err)
	}
	if list, _, _ := s.List(t.Context(), ""); len(list) != 1 || list[0].Key != "b" {
		t.Fatalf("after the transaction: %v", list)
	}
}

func testLimits(t *testing.T, open opener) {
	s, _ := open(t)
	for name, ops := range map[string][]Op{
		"no change": nil,
		"no key":    {{Value: []byte("x")}},
		"long key":  {{Key: strings.Repeat("k", MaxKey+1)}},
		"big value": {{Key: "k", Value: make([]byte, MaxValue+1)}},
		"many":      slices.Repeat([]Op{{Key: "k"}}, MaxOps+1),
	} {
		if _, err := s.Txn(t.Context(), nil, ops); !errors.Is(err, ErrLimit) {
			t.Errorf("%s: %v", name, err)
		}
	}
	big := Op{Key: strings.Repeat("k", MaxKey), Value: bytes.Repeat([]byte("v"), MaxValue)}
	if _, err := s.Txn(t.Context(), nil, []Op{big}); err != nil {
		t.Error("the limits themselves:", err)
	}
}

func testReopen(t *testing.T, open opener) {
	s, reopen := open(t)
	r := put(t, s, "k", "v")
	if _, err := s.Txn(t.Context(), nil, []Op{{Key: "k", Delete: true}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = reopen()
	if _, rev, err := s.List(t.Context(), ""); err != nil || rev != r+1 {
		t.Fatalf("revision %d, %v; want %d", rev, err, r+1)
	}
	if again := put(t, s, "k", "w"); again != r+2 {
		t.Fatalf("next revision %d, want %d", again, r+2)
	}
}

func testParallel(t *testing.T, open opener) {
	s, _ := open(t)
	const workers, each = 8, 10
	var conflicts atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for done := 0; done < each; {
				e, err := s.Get(t.Context(), "n")
				if err != nil {
					t.Error(err)
					return
				}
				_, err = s.Txn(t.Context(), []Compare{{"n", e.Revision}}, []Op{{Key: "n", Value: append(e.Value, 'x')}})
				switch {
				case err == nil:
					done++
				case errors.Is(err, ErrConflict):
					conflicts.Add(1)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if e, _ := s.Get(t.Context(), "n"); len(e.Value) != workers*each {
		t.Fatalf("%d increments survive of %d (%d conflicts)", len(e.Value), workers*each, conflicts.Load())
	}
}

func testWatch(t *testing.T, open opener) {
	s, _ := open(t)
	from := put(t, s, "w/old", "1")
	put(t, s, "w/a", "1")
	put(t, s, "other", "1")
	late := make(chan uint64, 1)
	var got []string
	for c, err := range s.Watch(t.Context(), "w/", from) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%d %s=%s %v", c.Revision, c.Key, c.Value, c.Deleted))
		if len(got) == 1 {
			r, err := s.Txn(t.Context(), nil, []Op{{Key: "w/a", Delete: true}, {Key: "w/b", Value: []byte("2")}})
			if err != nil {
				t.Fatal(err)
			}
			late <- r
		}
		if len(got) == 3 {
			break
		}
	}
	r := <-late
	want := []string{"2 w/a=1 false", fmt.Sprintf("%d w/a= true", r), fmt.Sprintf("%d w/b=2 false", r)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

func testWatchEnds(t *testing.T, open opener) {
	s, _ := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := lastError(s, ctx, 0); !errors.Is(err, context.Canceled) {
		t.Error("cancelled:", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := lastError(s, t.Context(), 0); !errors.Is(err, ErrClosed) {
			t.Error("closed:", err)
		}
	})
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func lastError(s Store, ctx context.Context, from uint64) error {
	for _, err := range s.Watch(ctx, "", from) {
		if err != nil {
			return err
		}
	}
	return nil
}

func testCompaction(t *testing.T, open opener) {
	s, reopen := open(t)
	first := put(t, s, "k", "1")
	last := put(t, s, "k", "2")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = reopen()
	next := put(t, s, "k", "3")
	for c, err := range s.Watch(t.Context(), "", last) {
		if err != nil || c.Revision != next {
			t.Errorf("watch from the newest revision: %+v, %v", c, err)
		}
		break
	}
	// An engine that remembers everything is free to; it must not skip.
	for c, err := range s.Watch(t.Context(), "", first) {
		if !errors.Is(err, ErrCompacted) && c.Revision != last {
			t.Errorf("watch from an old revision skipped to %+v, %v", c, err)
		}
		break
	}
}

func testClosed(t *testing.T, open opener) {
	s, _ := open(t)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, getErr := s.Get(t.Context(), "k")
	_, _, listErr := s.List(t.Context(), "")
	_, txnErr := s.Txn(t.Context(), nil, []Op{{Key: "k"}})
	for _, err := range []error{getErr, listErr, txnErr} {
		if !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
}

// testModel runs random transactions, also over restarts, against a map.
func testModel(t *testing.T, open opener) {
	rapid.Check(t, func(rt *rapid.T) {
		s, reopen := open(t)
		defer func() { _ = s.Close() }()
		model, revision := map[string]Entry{}, uint64(0)
		key := rapid.StringMatching(`[ab]/[a-c]`)
		rt.Repeat(map[string]func(*rapid.T){
			"txn": func(rt *rapid.T) {
				compare := Compare{key.Draw(rt, "compare"), rapid.Uint64Range(0, revision).Draw(rt, "at")}
				if rapid.Bool().Draw(rt, "right") {
					compare.Revision = model[compare.Key].Revision
				}
				ops := []Op{
					{Key: key.Draw(rt, "put"), Value: rapid.SliceOfN(rapid.Byte(), 1, 4).Draw(rt, "value")},
					{Key: key.Draw(rt, "delete"), Delete: true},
				}
				got, err := s.Txn(t.Context(), []Compare{compare}, ops)
				if model[compare.Key].Revision != compare.Revision {
					if !errors.Is(err, ErrConflict) {
						rt.Fatalf("want a conflict, got %v", err)
					}
					return
				}
				revision++
				if err != nil || got != revision {
					rt.Fatalf("revision %d, %v; want %d", got, err, revision)
				}
				model[ops[0].Key] = Entry{ops[0].Key, ops[0].Value, revision}
				delete(model, ops[1].Key)
			},
			"reopen": func(rt *rapid.T) {
				if err := s.Close(); err != nil {
					rt.Fatal(err)
				}
				s = reopen()
			},
			"": func(rt *rapid.T) {
				got, rev, err := s.List(t.Context(), "")
				want := slices.SortedFunc(maps.Values(model), func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
				if err != nil || rev != revision || !slices.EqualFunc(got, want, func(a, b Entry) bool { return cmp.Equal(a, b) }) {
					rt.Fatalf("store %v at %d, %v; model %v at %d", got, rev, err, want, revision)
				}
			},
		})
	})
}
