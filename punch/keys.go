package punch

import (
	"bytes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"

	"golang.org/x/crypto/chacha20poly1305"
)

// secrets are what two peers share, derived from one Diffie-Hellman result.
type secrets struct {
	check []byte      // MESSAGE-INTEGRITY of checks, both directions
	out   cipher.AEAD // seals our signals
	in    cipher.AEAD // opens the peer's signals
}

// derive computes the secrets shared with a peer. The info names the purpose
// and both keys: in order of value for checks, sender first for signals, so that
// a signal cannot be reflected.
func derive(private *ecdh.PrivateKey, mesh [32]byte, peer Key) (*secrets, error) {
	root, low, high, err := agree(private, peer)
	if err != nil {
		return nil, err
	}
	own := private.PublicKey().Bytes()
	s := &secrets{}
	if s.check, err = expand(root, mesh, "overlay/v1/check", low, high); err != nil {
		return nil, err
	}
	if s.out, err = sealer(root, mesh, own, peer[:]); err != nil {
		return nil, err
	}
	if s.in, err = sealer(root, mesh, peer[:], own); err != nil {
		return nil, err
	}
	return s, nil
}

// agree gives the Diffie-Hellman result with a peer, and both public keys in
// order of value.
func agree(private *ecdh.PrivateKey, peer Key) (root, low, high []byte, err error) {
	public, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		return nil, nil, nil, fmt.Errorf("read public key: %w", err)
	}
	if root, err = private.ECDH(public); err != nil {
		return nil, nil, nil, fmt.Errorf("agree with public key: %w", err)
	}
	low, high = private.PublicKey().Bytes(), peer[:]
	if bytes.Compare(low, high) > 0 {
		low, high = high, low
	}
	return root, low, high, nil
}

func expand(root []byte, mesh [32]byte, purpose string, keys ...[]byte) ([]byte, error) {
	info := purpose + string(bytes.Join(keys, nil))
	key, err := hkdf.Key(sha256.New, root, mesh[:], info, 32)
	if err != nil {
		return nil, fmt.Errorf("derive %s key: %w", purpose, err)
	}
	return key, nil
}

func sealer(root []byte, mesh [32]byte, from, to []byte) (cipher.AEAD, error) {
	key, err := expand(root, mesh, "overlay/v1/signal", from, to)
	if err != nil {
		return nil, err
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("open signal cipher: %w", err)
	}
	return aead, nil
}

// user names the sender of a check to the owner of a nonce, and to nobody else.
type user [userSize]byte

func (s *secrets) user(receiver Nonce) user {
	mac := hmac.New(sha256.New, s.check)
	mac.Write(receiver[:])
	return user(mac.Sum(nil)[:userSize])
}
