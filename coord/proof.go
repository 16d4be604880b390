package coord

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"overlay/coord/trust"
)

const (
	labelJoin      = "overlay/v1/join"
	labelWireGuard = "overlay/v1/wg-pop"
	exporterSize   = 32
)

// InviteProofMessage is what the invite key signs to join: see Proofs. x is
// the connection's exporter, d the device, w its WireGuard key.
func InviteProofMessage(x []byte, d, w trust.Key) []byte {
	return slices.Concat([]byte(labelJoin), []byte{0}, x, d[:], w[:])
}

// WireGuardProof is the MAC that shows possession of the WireGuard key w of
// device d: see Proofs. shared is X25519 between w and the challenge, x the
// connection's exporter. The server compares in constant time.
func WireGuardProof(shared, x []byte, challenge [32]byte, d, w trust.Key) []byte {
	info := slices.Concat([]byte(labelWireGuard), []byte{0}, w[:], challenge[:])
	key, err := hkdf.Key(sha256.New, shared, x, string(info), sha256.Size)
	if err != nil {
		panic(err) // only for an output of more than 255 hashes
	}
	mac := hmac.New(sha256.New, key)
	mac.Write(slices.Concat([]byte(labelWireGuard), []byte{0}, d[:], w[:]))
	return mac.Sum(nil)
}

// Prove makes the proofs that let device and the WireGuard private key join
// with invite. They are worth nothing on another connection.
func (c *Conn) Prove(h Hello, invite, device ed25519.PrivateKey, wireguard [32]byte) (Proofs, error) {
	x, err := c.Export(ExporterJoin)
	if err != nil {
		return Proofs{}, err
	}
	return prove(x, h.Challenge, keys{invite, device, wireguard})
}

// keys are the private keys of a device that joins.
type keys struct {
	invite    ed25519.PrivateKey
	device    ed25519.PrivateKey
	wireguard [32]byte
}

func prove(x, challenge []byte, k keys) (Proofs, error) {
	if len(challenge) != 32 {
		return Proofs{}, fmt.Errorf("challenge of %d bytes, want 32", len(challenge))
	}
	private, err := ecdh.X25519().NewPrivateKey(k.wireguard[:])
	if err != nil {
		return Proofs{}, errors.New("the WireGuard key is not usable")
	}
	remote, err := ecdh.X25519().NewPublicKey(challenge)
	if err != nil {
		return Proofs{}, fmt.Errorf("read challenge: %w", err)
	}
	shared, err := private.ECDH(remote)
	if err != nil {
		return Proofs{}, fmt.Errorf("answer challenge: %w", err)
	}
	d, w := publicKey(k.device), trust.Key(private.PublicKey().Bytes())
	return Proofs{
		Invite:    ed25519.Sign(k.invite, InviteProofMessage(x, d, w)),
		WireGuard: WireGuardProof(shared, x, [32]byte(challenge), d, w),
	}, nil
}

// publicKey is the public half of an Ed25519 private key, which RFC 8032
// implementations keep as its last 32 bytes.
func publicKey(k ed25519.PrivateKey) trust.Key { return trust.Key(k[ed25519.SeedSize:]) }
