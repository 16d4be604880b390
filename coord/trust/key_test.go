package trust

import (
	"crypto/ecdh"
	"math/big"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// prime returns 2^255-19.
func prime() *big.Int {
	p := new(big.Int).Lsh(big.NewInt(1), 255)
	return p.Sub(p, big.NewInt(19))
}

func littleEndian(n *big.Int) (k Key) {
	n.FillBytes(k[:])
	slices.Reverse(k[:])
	return k
}

// goodX25519 says what CanonicalKey should, by way of big integers and the
// standard library.
func goodX25519(t testing.TB, k Key) bool {
	bigEndian := slices.Clone(k[:])
	slices.Reverse(bigEndian)
	if new(big.Int).SetBytes(bigEndian).Cmp(prime()) >= 0 {
		return false
	}
	private := must(ecdh.X25519().NewPrivateKey(slices.Repeat([]byte{7}, 32)))(t)
	public := must(ecdh.X25519().NewPublicKey(k[:]))(t)
	_, err := private.ECDH(public)
	return err == nil
}

func TestCanonicalKey(t *testing.T) {
	bad := map[string]bool{}
	try := func(k Key) {
		want, err := goodX25519(t, k), CanonicalKey(k)
		if (err == nil) != want {
			t.Errorf("%x: %v, but good is %v", k[:], err, want)
		}
		if err != nil {
			bad[string(k[:])] = true
		}
	}
	// The points of order 8, from "Curve25519" (Bernstein), as decimal numbers.
	order8, _ := new(big.Int).SetString("325606250916557431795983626356110631294008115727848805560023387167927233504", 10)
	other8, _ := new(big.Int).SetString("39382357235489614581723060781553021112529911719440698176882885853963445705823", 10)
	top := new(big.Int).Lsh(big.NewInt(1), 255)
	for _, base := range []*big.Int{big.NewInt(0), order8, other8, prime()} {
		for d := int64(-20); d <= 20; d++ {
			n := new(big.Int).Add(base, big.NewInt(d))
			if n.Sign() < 0 || n.Cmp(top) >= 0 {
				continue
			}
			try(littleEndian(n))
			try(littleEndian(new(big.Int).Add(n, top)))
		}
	}
	for _, n := range []*big.Int{big.NewInt(0), big.NewInt(1), order8, other8, new(big.Int).Sub(prime(), big.NewInt(1))} {
		if k := littleEndian(n); !bad[string(k[:])] {
			t.Errorf("low order, but accepted: %x", k[:])
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		k := Key(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(rt, "key"))
		if (CanonicalKey(k) == nil) != goodX25519(t, k) {
			rt.Errorf("%x: %v", k[:], CanonicalKey(k))
		}
	})
}

// order8Y returns both y of the points of order 8 on edwards25519. Such a point
// doubles to one with y = 0, so x^2 = -y^2, and the curve's equation (RFC 8032
// section 5.1) becomes d y^4 + 2 y^2 - 1 = 0.
func order8Y() []*big.Int {
	p := prime()
	mod := func(n *big.Int) *big.Int { return n.Mod(n, p) }
	inverse := new(big.Int).ModInverse(big.NewInt(121666), p)
	d := mod(inverse.Mul(inverse, big.NewInt(-121665)))
	root := new(big.Int).ModSqrt(mod(new(big.Int).Add(d, big.NewInt(1))), p)
	var ys []*big.Int
	for _, r := range []*big.Int{root, new(big.Int).Neg(root)} {
		square := mod(new(big.Int).Mul(new(big.Int).Sub(r, big.NewInt(1)), new(big.Int).ModInverse(d, p)))
		if y := new(big.Int).ModSqrt(square, p); y != nil {
			ys = append(ys, y, new(big.Int).Sub(p, y))
		}
	}
	return ys
}

// TestSigningKey takes the y of each point of low order on edwards25519 with
// both signs of x and both spellings.
func TestSigningKey(t *testing.T) {
	weak := append(order8Y(), big.NewInt(0), big.NewInt(1), new(big.Int).Sub(prime(), big.NewInt(1)),
		prime(), new(big.Int).Add(prime(), big.NewInt(1)))
	if len(weak) != 2+5 {
		t.Fatalf("%d weak values of y", len(weak))
	}
	top := new(big.Int).Lsh(big.NewInt(1), 255)
	for _, y := range weak {
		for _, n := range []*big.Int{y, new(big.Int).Add(y, top)} {
			if k := littleEndian(n); checkSigningKey(k) == nil {
				t.Errorf("accepted %x", k[:])
			}
		}
	}
	for seed := range byte(64) {
		if err := checkSigningKey(key(seed)); err != nil {
			t.Errorf("refused %v: %v", key(seed), err)
		}
	}
}

// TestDeriveIP6 has a value from sha256sum:
//
//	{ printf ip6; printf '\1%.0s' {1..32}; printf '\2%.0s' {1..32}; } | sha256sum
func TestDeriveIP6(t *testing.T) {
	ula := netip.MustParsePrefix("fd12:3456:789a::/48")
	trustHash, device := Hash(slices.Repeat([]byte{1}, 32)), Key(slices.Repeat([]byte{2}, 32))
	want := netip.MustParseAddr("fd12:3456:789a:b7b5:10d0:d486:0c48:f534")
	if got := DeriveIP6(ula, trustHash, device); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}
