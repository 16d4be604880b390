package tun

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// numbered is packet n of a flow.
func numbered(port uint16, n, size int) []byte {
	p := segments{udp: true, size: size, payload: pattern(size, 1)}.packets()[0]
	binary.BigEndian.PutUint16(p[ipv4HeaderSize:], port)
	binary.BigEndian.PutUint32(p[ipv4HeaderSize+udpHeaderSize:], uint32(n))
	return p
}

func numberOf(p []byte) (port uint16, n int) {
	return binary.BigEndian.Uint16(p[ipv4HeaderSize:]), int(binary.BigEndian.Uint32(p[ipv4HeaderSize+udpHeaderSize:]))
}

// pull takes the packet whose turn it is.
func (s *shelf) pull(leaves bool) []byte {
	i := s.turn()
	if i == noSlot {
		return nil
	}
	p := s.slots[i].packet
	s.spend(i, len(p))
	s.take(i, leaves)
	return p
}

// A packet of a flow that sends little passes a row of others.
func TestShelfSparseFirst(t *testing.T) {
	s := newShelf()
	for i := range 40 {
		s.put(s.vacant(), numbered(1, i, 60000), virtio{}, 0)
	}
	first := s.pull(false)
	s.put(s.vacant(), numbered(2, 0, 60), virtio{}, 0)
	if port, _ := numberOf(first); port != 1 {
		t.Fatal("the only flow was not first")
	}
	if port, _ := numberOf(s.pull(false)); port != 2 {
		t.Error("the sparse flow waits")
	}
}

// Heavy flows take turns, and each gets the same.
func TestShelfTurns(t *testing.T) {
	s := newShelf()
	sizes := map[uint16]int{1: 1200, 2: 60000}
	next := map[uint16]int{}
	sent := map[uint16]int{}
	for range 4000 {
		for port, size := range sizes {
			for s.queues[flowOf(numbered(port, 0, size))].first == noSlot {
				s.put(s.vacant(), numbered(port, next[port], size), virtio{}, 0)
				next[port]++
			}
		}
		p := s.pull(false)
		port, _ := numberOf(p)
		sent[port] += len(p)
	}
	if share := float64(sent[1]) / float64(sent[2]); share < 0.9 || share > 1.1 {
		t.Errorf("shares are %v", sent)
	}
}

// Whatever comes and goes: nothing is lost, a flow keeps its order, and a slot
// whose buffer left is not used before renew.
func TestShelfKeepsOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newShelf()
		put, got := map[uint16]int{}, map[uint16]int{}
		left := map[int]bool{}
		check := func(p []byte) {
			port, n := numberOf(p)
			if n != got[port] {
				t.Fatalf("packet %d of flow %d, want %d", n, port, got[port])
			}
			got[port]++
		}
		for range rapid.IntRange(1, 400).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0, 1:
				i := s.vacant()
				if i == noSlot {
					continue
				}
				if left[i] {
					t.Fatalf("slot %d has no buffer", i)
				}
				port := uint16(rapid.IntRange(1, 5).Draw(t, "port"))
				s.put(i, numbered(port, put[port], rapid.SampledFrom([]int{20, 1200, 30000}).Draw(t, "size")), virtio{}, 0)
				put[port]++
			case 2, 3:
				leaves := rapid.Bool().Draw(t, "leaves")
				i := s.turn()
				if p := s.pull(leaves); p != nil {
					left[i] = left[i] || leaves
					check(p)
				}
			case 4:
				s.renew()
				clear(left)
			}
		}
		for p := s.pull(false); p != nil; p = s.pull(false) {
			check(p)
		}
		s.renew()
		if s.free != 1<<shelfSlots-1 {
			t.Fatalf("free %b", s.free)
		}
		for port, n := range put {
			if got[port] != n {
				t.Fatalf("flow %d: %d of %d", port, got[port], n)
			}
		}
	})
}

// A queue that stays is told of once an interval, a short or a passing one never.
func TestShelfLate(t *testing.T) {
	var s *shelf
	now := time.Duration(0)
	for trip, want := range map[time.Duration]int{time.Millisecond: 49, 2 * time.Millisecond: 24, 3 * time.Millisecond: 0} {
		s = newShelf()
		begin, signals := now, 0
		for i := range 2 {
			s.put(s.vacant(), numbered(1, i, 60000), virtio{}, now)
		}
		for n := 2; now-begin < time.Second; n++ { // each waits for 2 ms
			now += time.Millisecond
			if s.late(s.turn(), now, trip) {
				signals++
			}
			s.pull(false)
			s.put(s.vacant(), numbered(1, n, 60000), virtio{}, now)
		}
		if signals < want-1 || signals > want+1 {
			t.Errorf("%d signals in a second at %v, want %d", signals, trip, want)
		}
	}
	for n := range 1000 { // a queue of one, however late
		s = newShelf()
		s.put(s.vacant(), numbered(1, n, 60000), virtio{}, now)
		now += 100 * time.Millisecond
		if s.late(s.turn(), now, time.Millisecond) {
			t.Fatal("told of a queue of one packet")
		}
	}
}

// Slowing a flow down marks the packet where the flow reads marks, and takes one
// segment of a super-packet where not.
func TestSlow(t *testing.T) {
	r := &reader{}
	for _, v6 := range []bool{false, true} {
		s := segments{v6: v6, size: 1348, payload: pattern(5000, 1)}
		p, h := s.super()
		entry := shelved{packet: p, head: h}
		if !r.slow(&entry) {
			t.Fatal("nothing left")
		}
		var cut split
		if !cut.start(entry.packet, h) {
			t.Fatal("what is left is no super-packet")
		}
		want := s.packets()
		last := want[len(want)-2]
		var got [][]byte
		for cut.left() > 0 {
			b := make([]byte, 2000)
			got = append(got, b[:cut.next(b)])
		}
		mustEqual(t, got[:len(got)-1], want[:len(want)-2])
		if len(got) != len(want)-1 || len(got[len(got)-1]) != len(last) {
			t.Errorf("%d packets of %d are left", len(got), len(want))
		}

		p, h = s.super()
		if v6 {
			p[1] |= 1 << 4
		} else {
			p[1] |= 2
			sumIPv4(p[:ipv4HeaderSize])
		}
		entry = shelved{packet: p, head: h}
		before := bytes.Clone(p)
		if !r.slow(&entry) || len(entry.packet) != len(before) || bytes.Equal(entry.packet, before) {
			t.Error("not marked")
		}
		if mark := int(p[1]) >> map[bool]int{false: 0, true: 4}[v6] & ecnMask; mark != ecnOverran {
			t.Errorf("marked %b", mark)
		}
		if !v6 && fold(sum(p[:ipv4HeaderSize], 0)) != 0xffff {
			t.Error("header checksum wrong")
		}
	}
	damaged := numbered(1, 1, 100)
	damaged[0], damaged[1], damaged[8] = 0x41, 1, damaged[8]+1
	if !mark(damaged) || damaged[1] != ecnOverran {
		t.Error("a header that is no header was not marked")
	}
	if damaged[0] = 0x45; fold(sum(damaged[:ipv4HeaderSize], 0)) == 0xffff {
		t.Error("a damaged header was mended")
	}
	single := shelved{packet: numbered(1, 1, 100)}
	if r.slow(&single) {
		t.Error("a single packet was not dropped")
	}
}

// One packet fills neither list nor slots for ever, whatever its bytes are.
func FuzzShelf(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 1})
	f.Add(numbered(1, 1, 20))
	f.Fuzz(func(t *testing.T, p []byte) {
		s := newShelf()
		s.put(s.vacant(), p, virtio{segment: 100, kind: kindTCP4, sumStart: 20, sumOffset: 16}, 0)
		i := s.turn()
		(&reader{}).slow(&s.slots[i])
		s.take(i, false)
		if s.turn() != noSlot || s.free != 1<<shelfSlots-1 {
			t.Fatal("something is left")
		}
	})
}
