package tun

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// plainSum is RFC 1071 §4.1, word by word.
func plainSum(b []byte, initial uint32) uint16 {
	s := initial
	for len(b) > 1 {
		s += uint32(binary.BigEndian.Uint16(b))
		b = b[2:]
		s = s>>16 + s&0xffff
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s)
}

func TestSum(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range 400 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		initial := uint64(rng.Uint32())
		want := plainSum(b, uint32(fold(initial)))
		if got := fold(sum(b, initial)); got != want {
			t.Fatalf("%d bytes from %#x: %#x, want %#x", n, initial, got, want)
		}
	}
	full := make([]byte, maxPacket)
	for i := range full {
		full[i] = 0xff
	}
	if got, want := fold(sum(full, 1<<63)), plainSum(full, uint32(fold(1<<63))); got != want {
		t.Fatalf("all ones: %#x, want %#x", got, want)
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte("123"), uint64(7))
	f.Fuzz(func(t *testing.T, b []byte, initial uint64) {
		if len(b) > maxPacket {
			return
		}
		if got, want := fold(sum(b, initial)), plainSum(b, uint32(fold(initial))); got != want {
			t.Fatalf("%#x, want %#x", got, want)
		}
	})
}

func BenchmarkSum(b *testing.B) {
	p := make([]byte, 1400)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		sum(p, 0)
	}
}
