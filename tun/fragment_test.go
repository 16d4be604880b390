package tun

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dataMessage is WireGuard data of n bytes that differ.
func dataMessage(index uint32, counter uint64, n int) []byte {
	b := pattern(n, byte(counter))
	copy(b, wireGuard(typeData, index, 16))
	binary.LittleEndian.PutUint64(b[counterAt:], counter)
	return b
}

// fragmentsOf are the datagrams a message is sent in.
func fragmentsOf(t testing.TB, message []byte, limit int) [][]byte {
	t.Helper()
	f, ok := cut(message, limit)
	if !ok {
		return [][]byte{message}
	}
	padded := append(bytes.Clone(message), make([]byte, f.padding)...)
	var out [][]byte
	for i := range f.count {
		f.index = i
		b := make([]byte, fragmentHeader+f.size)
		f.put(b)
		copy(b[fragmentHeader:], padded[i*f.size:][:f.size])
		out = append(out, b)
	}
	return out
}

func TestCut(t *testing.T) {
	for _, c := range []struct{ length, limit, count, size int }{
		{1432, 1432, 0, 0},
		{1433, 1432, 2, 717},
		{5502, 1432, 4, 1376},
		{62000, 1432, 44, 1410},
		{maxPacket, 1432, 47, 1395},
		{2 * (1432 - fragmentHeader), 1432, 2, 1424},
		{64 * 600, 608, 64, 600},
		{64*600 + 1, 608, 0, 0}, // does not fit
		{70000, 1432, 0, 0},
		{70000, 60000, 0, 0},
		{5000, 0, 0, 0}, // the peer takes none
		{5000, minFragmented - 1, 0, 0},
		{minFragmented + 1, minFragmented, 2, 129},
	} {
		f, ok := cut(dataMessage(9, 1<<40+1027, c.length), c.limit)
		if f.count != c.count || f.size != c.size || ok != (c.count > 0) {
			t.Errorf("%d bytes to %d: %+v", c.length, c.limit, f)
		}
		if ok && (f.length() != c.length || f.size+fragmentHeader > c.limit || f.session != 9 || f.id != 3) {
			t.Errorf("%d bytes to %d: %+v", c.length, c.limit, f)
		}
	}
}

// The layout on the wire, byte by byte.
func TestFragmentOnWire(t *testing.T) {
	b := make([]byte, 8)
	fragment{session: 0x04030201, id: 0x2a5, index: 5, count: 44, padding: 9}.put(b)
	want := []byte{0x80 | 0x2a5>>6, 0x25 << 2, 5<<4 | 43>>2, 43<<6&0xff | 9, 1, 2, 3, 4}
	if !bytes.Equal(b, want) {
		t.Errorf("%x, want %x", b, want)
	}
}

func TestParseFragmentRefuses(t *testing.T) {
	good := fragment{session: 1, id: 2, index: 1, count: 3, padding: 2}
	encoded := func(change func(*fragment), size int) []byte {
		f, b := good, make([]byte, fragmentHeader+size)
		change(&f)
		f.put(b)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":          {},
		"header alone":   encoded(func(*fragment) {}, 0),
		"half a header":  encoded(func(*fragment) {}, 100)[:4],
		"one of one":     encoded(func(f *fragment) { f.index, f.count, f.padding = 0, 1, 0 }, 100),
		"behind the end": encoded(func(f *fragment) { f.index = 3 }, 100),
		"much padding":   encoded(func(f *fragment) { f.padding = 3 }, 100),
		"all padding":    encoded(func(*fragment) {}, 2),
		"too large":      encoded(func(f *fragment) { f.count, f.padding = 47, 0 }, 1395),
		"too small":      encoded(func(f *fragment) { f.padding = 0 }, 10),
		"another kind":   append([]byte{0x90}, encoded(func(*fragment) {}, 100)[1:]...),
		"WireGuard":      dataMessage(1, 2, 100),
	} {
		if f, ok := parseFragment(b); ok {
			t.Errorf("%s: taken as %+v", name, f)
		}
	}
	if f, ok := parseFragment(encoded(func(*fragment) {}, 100)); !ok || f.length() != 298 {
		t.Errorf("good one refused: %+v", f)
	}
}

func FuzzFragment(f *testing.F) {
	f.Add(fragmentsOf(f, dataMessage(1, 5, 3000), 1432)[0], 1432)
	f.Add(dataMessage(1, 5, 3000), 700)
	f.Fuzz(func(t *testing.T, b []byte, limit int) {
		if h, ok := parseFragment(b); ok {
			if h.count < 2 || h.count > maxFragments || h.index >= h.count || h.length() > maxPacket || h.count*h.size > slotSize {
				t.Fatalf("%+v of %d bytes", h, len(b))
			}
			again := bytes.Clone(b)
			if h.put(again); !bytes.Equal(again, b) {
				t.Fatal("another header")
			}
		}
		if len(b) < 16 {
			return
		}
		h, ok := cut(b, limit)
		if !ok {
			return
		}
		var train []byte
		for i, one := range fragmentsOf(t, b, limit) {
			if got, ok := parseFragment(one); len(b) >= keepaliveSize && (!ok || got.index != i || len(one) > limit) {
				t.Fatalf("%+v", got)
			}
			train = append(train, one...)
		}
		got := make([]byte, len(b))
		if !h.adjacent(got, train, 0, fragmentHeader+h.size) || !bytes.Equal(got, b) {
			t.Fatal("another message")
		}
	})
}

// loaded are the datagrams of the messages of a train that were loaded, up to
// its next one, as the kernel cuts them.
func loaded(t *testing.T, tr *train) [][]byte {
	t.Helper()
	var out [][]byte
	for i := range tr.next {
		m, g := &tr.msgs[i].head, tr.groups[i]
		var all []byte
		for _, v := range unsafe.Slice(m.Iov, m.Iovlen) {
			all = append(all, unsafe.Slice(v.Base, v.Len)...)
		}
		if g.count > maxSegments || len(all) > maxTrain || len(all) != g.bytes || (m.Controllen > 0) != (g.count > 1) {
			t.Fatalf("group %+v of %d bytes, control %d", g, len(all), m.Controllen)
		}
		for range g.count {
			n := min(g.size, len(all))
			out = append(out, all[:n])
			all = all[n:]
		}
		if len(all) > 0 {
			t.Fatalf("group %+v: %d bytes too many", g, len(all))
		}
	}
	return out
}

// Whatever is in a batch and wherever a send ends, the datagrams come out once
// and in order; a message that fits one send is in one.
func TestTrainResumes(t *testing.T) {
	sizes := []int{32, 96, 1432, 1432, 1432, 5502, 5502, 20000, 62000, maxPacket}
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 1))
		o := batch{to: newEndpoint(netip.MustParseAddrPort("192.0.2.1:1"), nil), limit: 1432, segment: seed%4 > 0}
		var want [][]byte
		for i := range 1 + random.IntN(batchSize) {
			m := dataMessage(3, uint64(i), sizes[random.IntN(min(len(sizes), int(1+seed%11)))])
			o.bufs = append(o.bufs, m)
			want = append(want, fragmentsOf(t, m, o.limit)...)
		}
		tr := newTrain()
		for at := (place{}); at.message < len(o.bufs); {
			tr.load(&o, at)
			if tr.count == 0 {
				t.Fatal("nothing fits")
			}
			if tr.next = tr.count; random.IntN(2) == 0 {
				tr.next = random.IntN(tr.count + 1)
			}
			for i, b := range loaded(t, tr) {
				if !bytes.Equal(b, want[i]) {
					t.Fatalf("seed %d: at %+v: datagram %d differs", seed, at, i)
				}
			}
			want = want[len(loaded(t, tr)):]
			at, _ = tr.rest()
			if random.IntN(4) == 0 {
				o.segment = !o.segment
			}
			tr.unload()
			if tr.iovs != [trainPieces]unix.Iovec{} {
				t.Fatal("memory of the caller is kept")
			}
		}
		if len(want) > 0 {
			t.Fatalf("seed %d: %d datagrams missing", seed, len(want))
		}
	}
}

// A super-packet is one send, and so are several messages with fragments of one
// size; one message's fragments never end another's train.
func TestTrainGroups(t *testing.T) {
	for _, c := range []struct {
		sizes []int
		want  []int // datagrams of each message of the kernel
	}{
		{[]int{62000}, []int{44}},
		{[]int{62000, 62000, 96}, []int{44, 45}},
		{[]int{5502, 5502, 5502}, []int{12}},
		{[]int{5502, 3000}, []int{4, 3}},
		{[]int{5502, 1384, 1384, 90}, []int{7}},
		{[]int{5502, 5502, 5502, 5502, 5502, 5502, 5502, 5502, 5502, 5502, 5502, 5502}, []int{44, 4}},
		{[]int{1432, 1432, 100, 1432}, []int{3, 1}},
		{[]int{maxPacket, 100}, []int{46, 2}},
	} {
		o := batch{to: newEndpoint(netip.MustParseAddrPort("192.0.2.1:1"), nil), limit: 1432, segment: true}
		for i, n := range c.sizes {
			o.bufs = append(o.bufs, dataMessage(3, uint64(i), n))
		}
		tr := newTrain()
		tr.load(&o, place{})
		var got []int
		for _, g := range tr.groups[:tr.count] {
			got = append(got, g.count)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%v: groups %v, want %v", c.sizes, got, c.want)
		}
	}
}
