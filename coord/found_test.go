package coord

import (
	"crypto/rand"
	"math/bits"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func TestDrawPrefixes(t *testing.T) {
	ulas, shared := netip.MustParsePrefix("fd00::/8"), netip.MustParsePrefix("100.64.0.0/10")
	rapid.Check(t, func(t *rapid.T) {
		taken := rapid.Uint64().Draw(t, "taken /16")
		avoid := []netip.Prefix{netip.MustParsePrefix("192.168.1.0/24"), netip.MustParsePrefix("fd00::/9")}
		for i := range meshes4 {
			if taken>>i&1 == 1 {
				avoid = append(avoid, netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(64 + i), 3, 0}), 24))
			}
		}
		ula, prefix4 := DrawPrefixes(rand.Reader, avoid)
		if ula.Bits() != 48 || ula != ula.Masked() || !ulas.Overlaps(ula) {
			t.Fatalf("ULA %v", ula)
		}
		if prefix4.Bits() != 16 || prefix4 != prefix4.Masked() || !shared.Overlaps(prefix4) {
			t.Fatalf("prefix %v", prefix4)
		}
		free := ^taken &^ (1 << (crowded - 64))
		for _, a := range avoid {
			if a.Overlaps(ula) || bits.OnesCount64(free) > 0 && a.Overlaps(prefix4) {
				t.Fatalf("%v and %v, but %v is taken", ula, prefix4, a)
			}
		}
		if bits.OnesCount64(free) > 0 && prefix4.Addr().As4()[1] == crowded {
			t.Fatalf("prefix %v is crowded", prefix4)
		}
	})
}

func TestDrawPrefixesDiffer(t *testing.T) {
	seen := map[netip.Prefix]bool{}
	for range 200 {
		ula, prefix4 := DrawPrefixes(rand.Reader, nil)
		if seen[ula] {
			t.Fatalf("%v was drawn twice", ula)
		}
		seen[ula], seen[prefix4] = true, true
	}
	if len(seen) < 200+meshes4/2 {
		t.Errorf("200 draws gave %d prefixes", len(seen)-200)
	}
}
