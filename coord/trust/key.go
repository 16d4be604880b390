package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// signBit is the top bit of the last octet: unused in an X25519 key, the sign
// of x in an Ed25519 key.
const signBit = 0x80

// CanonicalKey refuses an X25519 key that is not the one encoding of its point
// or that is of low order (RFC 7748 section 6.1), so that two devices cannot
// claim one key in two spellings and no secret comes out zero.
func CanonicalKey(k Key) error {
	if k[31]&signBit != 0 {
		return errors.New("WireGuard key is not canonical: bit 255 is set")
	}
	if !belowPrime(k) {
		return errors.New("WireGuard key is not canonical: not below 2^255-19")
	}
	if lowOrder(k,
		"\xe0\xeb\x7a\x7c\x3b\x41\xb8\xae\x16\x56\xe3\xfa\xf1\x9f\xc4\x6a\xda\x09\x8d\xeb\x9c\x32\xb1\xfd\x86\x62\x05\x16\x5f\x49\xb8\x00",
		"\x5f\x9c\x95\xbc\xa3\x50\x8c\x24\xb1\xd0\xb1\x55\x9c\x83\xef\x5b\x04\x44\x5c\xc4\x58\x1c\x8e\x86\xd8\x22\x4e\xdd\xd0\x9f\x11\x57") {
		return errors.New("WireGuard key is of low order")
	}
	return nil
}

// checkSigningKey refuses an Ed25519 key under which a signature proves
// nothing: a point of low order accepts signatures that need no private key.
func checkSigningKey(k Key) error {
	y := k
	y[31] &^= signBit
	if !belowPrime(y) {
		return errors.New("signing key is not canonical")
	}
	if lowOrder(y,
		"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a",
		"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05") {
		return errors.New("signing key is of low order")
	}
	return nil
}

// lowOrder says whether the coordinate k is 0, 1, p-1 or one of the two given,
// which are the points of order 8 of the curve in question.
func lowOrder(k Key, order8 ...string) bool {
	zero, one, minusOne := Key{}, Key{0: 1}, primeLess(1)
	return k == zero || k == one || k == minusOne || slices.Contains(order8, string(k[:]))
}

// belowPrime says whether k, read little-endian, is below 2^255-19.
func belowPrime(k Key) bool {
	p := primeLess(0)
	slices.Reverse(k[:])
	slices.Reverse(p[:])
	return bytes.Compare(k[:], p[:]) < 0
}

// primeLess returns 2^255-19-n, little-endian, for n up to 236.
func primeLess(n uint8) Key {
	var p Key
	for i := range p {
		p[i] = 0xff
	}
	p[0], p[31] = 0xed-n, 0x7f
	return p
}

// DeriveIP6 returns a device's address: the mesh's /48 and 80 bits of the
// SHA-256 of "ip6", the trust hash and D. Nobody can be given another one.
func DeriveIP6(ula netip.Prefix, trustHash Hash, device Key) netip.Addr {
	h := sha256.New()
	h.Write([]byte("ip6"))
	h.Write(trustHash[:])
	h.Write(device[:])
	addr := ula.Addr().As16()
	copy(addr[ulaBytes:], h.Sum(nil))
	return netip.AddrFrom16(addr)
}

func publicKey(private ed25519.PrivateKey) (Key, error) {
	if len(private) != ed25519.PrivateKeySize {
		return Key{}, fmt.Errorf("private key has %d octets, not %d", len(private), ed25519.PrivateKeySize)
	}
	return Key(private[ed25519.PublicKeySize:]), nil
}

func verify(k Key, text, signature []byte) error {
	if err := checkSigningKey(k); err != nil {
		return fmt.Errorf("%w: %w", ErrSignature, err)
	}
	if !ed25519.Verify(k[:], text, signature) {
		return ErrSignature
	}
	return nil
}
