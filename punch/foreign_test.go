package punch

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMessage(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		rest(time.Second)
		long := strings.Repeat("x", MaxMessage)
		for _, m := range []string{"one", long} {
			if err := a.SendMessage(b.key, []byte(m)); err != nil {
				t.Fatal(err)
			}
			rest(oneWay)
		}
		w.mu.Lock()
		if want := []string{"one", long}; !slices.Equal(b.messages, want) || len(a.messages) != 0 {
			t.Errorf("b got %q, a %q", b.messages, a.messages)
		}
		w.mu.Unlock()
		for name, err := range map[string]error{
			"empty":   a.SendMessage(b.key, nil),
			"long":    a.SendMessage(b.key, make([]byte, MaxMessage+1)),
			"unknown": a.SendMessage(Key{9}, []byte("x")),
		} {
			if err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		var err error
		for range signalRate {
			err = errors.Join(err, a.SendMessage(b.key, []byte("x")))
		}
		if !errors.Is(err, errTalk) {
			t.Errorf("%d messages at once: %v", signalRate, err)
		}
	})
}

func TestMessageFormat(t *testing.T) {
	s := exampleSignal()
	s.kind, s.message = signalMessage, []byte("message")
	b := s.marshal()
	got, err := parseSignal(append(slices.Clone(b), 1, 2))
	if err != nil || string(got.message) != "message" {
		t.Fatalf("message %q, %v", got.message, err)
	}
	for n := range b {
		if _, err := parseSignal(b[:n]); err == nil {
			t.Fatalf("accepted when cut to %d of %d bytes", n, len(b))
		}
	}
	for _, size := range []int{0, MaxMessage + 1} {
		s.message = make([]byte, size)
		if _, err := parseSignal(s.marshal()); err == nil {
			t.Errorf("a message of %d bytes is accepted", size)
		}
	}
}

func TestPeerAt(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		rest(time.Second)
		if k, ok := a.PeerAt(b.outer); !ok || k != b.key {
			t.Errorf("at b's address: %x, %v", k, ok)
		}
		for _, addr := range []netip.AddrPort{nextPort(b.outer), a.outer, {}} {
			if k, ok := a.PeerAt(addr); ok {
				t.Errorf("at %v: %x", addr, k)
			}
		}
		if !a.MayProbe(b.outer) || a.MayProbe(stunAddr()) || a.MayProbe(netip.MustParseAddrPort("127.0.0.1:1")) {
			t.Error("MayProbe does not follow the rules")
		}
	})
}

// TestRelayCost has a relay that costs something lose against one that is as far.
func TestRelayCost(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 2)
		near := Relay{Addr: b.handle(0), RTT: 2 * oneWay, Here: true}
		other := Relay{Addr: b.handle(1), Here: true}
		a.SetRelays(b.key, []Relay{near, other})
		rest(3 * time.Second)
		a.wantPath(b, near.Addr)
		near.Cost = 10 * time.Millisecond
		a.SetRelays(b.key, []Relay{near})
		a.SetRelays(b.key, []Relay{near, other})
		rest(time.Second)
		a.wantPath(b, other.Addr)
	})
}

func TestSharedKey(t *testing.T) {
	one, two := [32]byte{1}, [32]byte{2}
	k1, err := PublicKey(one)
	if err != nil {
		t.Fatal(err)
	}
	k2, err := PublicKey(two)
	if err != nil {
		t.Fatal(err)
	}
	derive := func(private [32]byte, peer Key, purpose string) []byte {
		key, err := SharedKey(private, [32]byte{3}, peer, purpose)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	a, b := derive(one, k2, "x"), derive(two, k1, "x")
	if !bytes.Equal(a, b) || bytes.Equal(a, derive(one, k2, "y")) {
		t.Error("both sides do not have one key for each purpose")
	}
	if _, err := SharedKey(one, [32]byte{}, Key{}, "x"); err == nil {
		t.Error("a key without entropy is accepted")
	}
}

func TestBindingRequest(t *testing.T) {
	id, request, err := BindingRequest()
	if err != nil {
		t.Fatal(err)
	}
	from := netip.MustParseAddrPort("203.0.113.1:7")
	answer := AnswerBinding(request, from, func([]byte) (key, token []byte, ok bool) { return nil, nil, true })
	if got, err := MappedAddress(id, answer); err != nil || got != from {
		t.Errorf("mapped to %v, %v", got, err)
	}
	for name, b := range map[string][]byte{"nothing": nil, "the request": request, "another's answer": answer} {
		other := id
		other[0]++
		if got, err := MappedAddress(other, b); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}
