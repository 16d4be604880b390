package punch

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pion/stun/v2"
)

// hole drops what is longer than an IPv4 packet of a size, without a word.
func hole(packet int) func(wire) bool {
	return func(x wire) bool { return x.to != stunAddr() && len(x.b)+overhead4 > packet }
}

// fathomed returns two nodes with a path that carries packets of a size.
func fathomed(w *world, packet int) (a, b *node) {
	w.fathoms = true
	a, b = w.gathered(1, outerA), w.gathered(2, outerB)
	w.setDrop(hole(packet))
	meet(a, b)
	rest(3 * time.Second)
	return a, b
}

func (n *node) wantMTU(peer *node, want int) {
	n.w.t.Helper()
	if p, _ := n.Path(peer.key); p.MTU != want {
		n.w.t.Errorf("MTU %d, want %d; told %v", p.MTU, want, n.toldMTUs(time.Time{}))
	}
}

// padded counts the long checks among packets.
func padded(list []wire) (count int) {
	for _, x := range list {
		if len(x.b) > maxMessage {
			count++
		}
	}
	return count
}

// TestPathMTU wants the largest size that passes to be known a second after
// traffic began, and nothing to be sent for it before.
func TestPathMTU(t *testing.T) {
	for packet, want := range map[int]int{
		9000: 1472, 1500: 1472, 1492: 1464, 1480: 1432, 1460: 1432, 1459: 1392, 1400: 1372, 1300: 1252, 1280: 1252, 1100: 1012,
	} {
		inWorld(t, func(w *world) {
			a, b := fathomed(w, packet)
			if n := padded(w.all()); n > 0 || len(a.toldMTUs(time.Time{})) > 0 {
				t.Errorf("%d long checks without traffic", n)
			}
			begin := time.Now()
			a.talk(b, time.Second, true)
			a.wantMTU(b, want)
			a.talk(b, 30*time.Second, true)
			a.wantMTU(b, want)
			list := a.toldMTUs(time.Time{})
			if len(list) != 1 {
				t.Errorf("packets of %d: told %v", packet, list)
			}
			t.Logf("packets of %d: MTU %d after %v, %d long checks in 31 s", packet, want, list[0].at.Sub(begin), padded(w.between(a.outer, b.outer, begin)))
			asleep := time.Now()
			rest(time.Hour)
			if n := padded(w.between(a.outer, b.outer, asleep)); n > 10 {
				t.Errorf("%d long checks in an hour without traffic", n)
			}
			for _, x := range w.between(b.outer, a.outer, begin) {
				if !x.request() && len(x.b) > 68 {
					t.Errorf("an answer of %d bytes", len(x.b))
				}
			}
		})
	}
}

// TestBlackHole lets large datagrams vanish from one moment on, under traffic
// that flows, that stalls, or that nobody answers, and pass again.
func TestBlackHole(t *testing.T) {
	for name, c := range map[string]struct{ before, after bool }{
		"flows": {true, true}, "stalls": {true, false}, "one way": {false, false},
	} {
		for _, packet := range []int{1280, 1400, 1100} {
			inWorld(t, func(w *world) {
				want := map[int]int{1280: 1252, 1400: 1372, 1100: 1012}[packet]
				a, b := fathomed(w, 1500)
				a.talk(b, 20*time.Second, c.before)
				a.wantMTU(b, 1472)
				begin := time.Now()
				w.setDrop(hole(packet))
				a.talk(b, 4*time.Second, c.after)
				a.wantMTU(b, want)
				list := a.toldMTUs(begin)
				if len(list) == 0 || list[0].mtu > 1252 || list[len(list)-1].at.Sub(begin) > 3*time.Second {
					t.Fatalf("%s, %d: told %v after %v", name, packet, list, begin)
				}
				t.Logf("%s, %d: fell to %d after %v", name, packet, list[0].mtu, list[0].at.Sub(begin))
				a.wantPath(b, b.outer)
				w.setDrop(hole(1500))
				a.talk(b, 9*time.Minute, c.after)
				a.wantMTU(b, want)
				a.talk(b, 2*time.Minute, c.after)
				a.wantMTU(b, 1472)
			})
		}
	}
}

// TestLossIsNoBlackHole loses packets of all sizes: the MTU is found, and lost for
// moments at most.
func TestLossIsNoBlackHole(t *testing.T) {
	for seed := range uint64(20) {
		inWorld(t, func(w *world) {
			rng := rand.New(rand.NewPCG(seed, 5))
			loss := 0.3 * rng.Float64()
			a, b := fathomed(w, 1500)
			w.setDrop(func(x wire) bool { return hole(1500)(x) || x.to != stunAddr() && rng.Float64() < loss })
			a.talk(b, 10*time.Second, true)
			small, begin := time.Duration(0), time.Now()
			for range 120 {
				a.talk(b, time.Second, true)
				if p, ok := a.Path(b.key); ok && p.MTU > 0 && p.MTU < defaultDatagram {
					small += time.Second
				}
			}
			if small > 10*time.Second {
				t.Errorf("seed %d, loss %.2f: small for %v of 2 minutes: %v", seed, loss, small, a.toldMTUs(begin))
			}
		})
	}
}

// TestPeerWithoutPadding has a peer that drops long checks, as older ones do: the
// path keeps its size, and few checks are spent.
func TestPeerWithoutPadding(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := fathomed(w, maxMessage+overhead4)
		begin := time.Now()
		a.talk(b, 5*time.Minute, true)
		a.wantMTU(b, 0)
		if n := padded(w.between(a.outer, b.outer, begin)); n > 50 {
			t.Errorf("%d long checks in 5 minutes", n)
		}
	})
}

// TestMTUAfterMove forgets the MTU with the network.
func TestMTUAfterMove(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := fathomed(w, 1280)
		a.talk(b, time.Second, true)
		a.wantMTU(b, 1252)
		w.setDrop(hole(1500))
		a.NetworkChanged()
		a.talk(b, 5*time.Second, true)
		a.wantMTU(b, 1472)
	})
}

// TestPaddedCheck spells out what a padded check looks like and which lengths are
// taken.
func TestPaddedCheck(t *testing.T) {
	key := []byte("key")
	for _, size := range []int{maxMessage + 4, 1232, 1432, 1472, 8972, maxPadded} {
		b, err := check{user: user{1}, boot: 2, counter: 3, size: size}.marshal(key)
		if err != nil || len(b) != size {
			t.Fatalf("%d bytes, want %d: %v", len(b), size, err)
		}
		m, err := decode(b)
		if err != nil {
			t.Fatalf("%d: %v", size, err)
		}
		c, err := checkOf(m)
		if err != nil || c.boot != 2 || c.counter != 3 || stun.MessageIntegrity(key).Check(m) != nil {
			t.Errorf("%d: read %v, %v", size, c, err)
		}
		for name, change := range map[string]func([]byte){
			"a response":         func(b []byte) { b[0] = 1 },
			"another attribute":  func(b []byte) { b[stunHeader+1]++ },
			"short padding":      func(b []byte) { b[stunHeader+2], b[stunHeader+3] = 0, 8 },
			"padding beyond all": func(b []byte) { b[stunHeader+2] = 0xff },
		} {
			bad := bytes.Clone(b)
			change(bad)
			if _, err := decode(bad); err == nil {
				t.Errorf("%d bytes with %s: accepted", size, name)
			}
		}
		if _, err := decode(append(b, 0, 0, 0, 0)); err == nil {
			t.Errorf("%d and four more: accepted", size)
		}
	}
	if b, err := (check{size: maxPadded + 4}).marshal(key); err == nil {
		if _, err := decode(b); err == nil {
			t.Error("too long: accepted")
		}
	}
}

// FuzzDecode wants that no message makes us read more than one short one holds,
// padding aside.
func FuzzDecode(f *testing.F) {
	for _, size := range []int{0, 600, 1472} {
		b, err := check{user: user{1}, size: size}.marshal([]byte("key"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		if len(b) > maxPadded || len(m.Attributes) > maxMessage/4 {
			t.Fatalf("%d bytes with %d attributes", len(b), len(m.Attributes))
		}
		if len(b) > maxMessage && (m.Type != stun.BindingRequest || m.Attributes[0].Type != AttrPadding) {
			t.Fatalf("%d bytes of %v", len(b), m)
		}
		_, _ = checkOf(m)
	})
}
