package direct

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"overlay/punch"
)

const (
	offerVersion = 1
	// maxOffer bounds a sealed offer in bytes.
	maxOffer = 256
	// offerEvery is how often an offer is repeated that was not answered yet.
	offerEvery = 500 * time.Millisecond
	// maxOffers is how many one attempt sends.
	maxOffers = 24
)

var (
	errOffer  = errors.New("malformed offer")
	errSealed = errors.New("offer not sealed by this peer")
)

// attempt names one DialTCP of one side. It is random, so that what is proven in
// one is worth nothing in another.
type attempt [16]byte

// offer is what the two sides of DialTCP tell each other. Sealed it is a random
// 24-byte nonce followed by XChaCha20-Poly1305, with the sender's public key as
// additional data, of
//
//	+-------------+-------------------------+--------------------------------+
//	| version = 1 | attempt of the sender   | attempt of the receiver, as    |
//	|             | (16)                    | the sender knows it, or 0 (16) |
//	+-------------+-------------------------+--------------------------------+
//	| m <= n      | n <= 4                  | n addresses, the first m of    |
//	|             |                         | them seen by a server          |
//	+-------------+-------------------------+--------------------------------+
//
// An address is its length, 6 or 18, 4 or 16 bytes, and 2 of port, little endian
// (netip.AddrPort.MarshalBinary). An offer that names the receiver's attempt is
// new; any other may have been recorded long ago.
type offer struct {
	nonce, seen attempt
	addrs       []netip.AddrPort
	mapped      int
}

func (o *offer) marshal() []byte {
	b := []byte{offerVersion}
	b = append(b, o.nonce[:]...)
	b = append(b, o.seen[:]...)
	b = append(b, byte(o.mapped), byte(len(o.addrs)))
	for _, a := range o.addrs {
		raw, err := a.MarshalBinary()
		if err != nil {
			continue // it has no errors
		}
		b = append(append(b, byte(len(raw))), raw...)
	}
	return b
}

func parseOffer(b []byte) (offer, error) {
	const header = 1 + 16 + 16 + 2
	if len(b) < header || b[0] != offerVersion || b[33] > b[34] || b[34] > MaxAddresses {
		return offer{}, errOffer
	}
	o := offer{nonce: attempt(b[1:17]), seen: attempt(b[17:33]), mapped: int(b[33])}
	count, b := int(b[34]), b[header:]
	for range count {
		if len(b) < 1 || b[0] != 6 && b[0] != 18 || len(b) < 1+int(b[0]) {
			return offer{}, errOffer
		}
		var a netip.AddrPort
		if err := a.UnmarshalBinary(b[1 : 1+int(b[0])]); err != nil || a.Port() == 0 || a.Addr().Is4In6() {
			return offer{}, errOffer
		}
		o.addrs = append(o.addrs, a)
		b = b[1+int(b[0]):]
	}
	return o, nil
}

// pairing is what the two sides of one DialTCP share.
type pairing struct {
	self, peer punch.Key
	leads      bool // this side chooses the connection: its key is the lower one
	nonce      attempt
	root       []byte
	cipher     cipher.AEAD
}

func newPairing(c TCPConfig) (*pairing, error) {
	self, err := punch.PublicKey(c.PrivateKey)
	if err != nil {
		return nil, err
	}
	p := &pairing{self: self, peer: c.Peer, leads: bytes.Compare(self[:], c.Peer[:]) < 0}
	rand.Read(p.nonce[:])
	if p.root, err = punch.SharedKey(c.PrivateKey, c.Group, c.Peer, "overlay/v1/tcp"); err != nil {
		return nil, err
	}
	key, err := punch.SharedKey(c.PrivateKey, c.Group, c.Peer, "overlay/v1/tcp-offer")
	if err != nil {
		return nil, err
	}
	if p.cipher, err = chacha20poly1305.NewX(key); err != nil {
		return nil, fmt.Errorf("open offer cipher: %w", err)
	}
	return p, nil
}

func (p *pairing) seal(o offer) []byte {
	nonce := make([]byte, chacha20poly1305.NonceSizeX, maxOffer)
	rand.Read(nonce)
	return p.cipher.Seal(nonce, nonce, o.marshal(), p.self[:])
}

func (p *pairing) open(sealed []byte) (offer, error) {
	if len(sealed) < chacha20poly1305.NonceSizeX || len(sealed) > maxOffer {
		return offer{}, errOffer
	}
	nonce, box := sealed[:chacha20poly1305.NonceSizeX], sealed[chacha20poly1305.NonceSizeX:]
	b, err := p.cipher.Open(nil, nonce, box, p.peer[:])
	if err != nil {
		return offer{}, errSealed
	}
	return parseOffer(b)
}

// proof is the key of the handshake between two attempts, the leading side's
// first.
func (p *pairing) proof(theirs attempt) []byte {
	first, second := p.nonce, theirs
	if !p.leads {
		first, second = second, first
	}
	salt := append(append([]byte(nil), first[:]...), second[:]...)
	key, err := hkdf.Key(sha256.New, p.root, salt, "handshake", 32)
	if err != nil {
		panic(fmt.Sprintf("derive key: %v", err)) // only a bad length fails
	}
	return key
}

// exchange tells the own offer and hands on the peer's when it names this
// attempt. It goes on until ctx ends, because the peer may not have heard that.
func (d *dialing) exchange(ctx context.Context, own offer, ready chan<- offer) error {
	own.nonce = d.pair.nonce
	repeat := time.NewTimer(0)
	defer repeat.Stop()
	var last offer
	answered := false
	for left := maxOffers; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-repeat.C:
			if left--; left < 0 {
				continue
			}
			if err := d.Send(d.pair.seal(own)); err != nil {
				d.Log.Debug("offer not sent", "err", err)
			}
			if !answered {
				repeat.Reset(offerEvery)
			}
		case sealed := <-d.Signals:
			theirs, err := d.pair.open(sealed)
			if err != nil {
				d.Log.Debug("offer dropped", "err", err)
				continue
			}
			knows := theirs.seen == own.nonce
			if knows && !answered {
				answered = true
				ready <- theirs
			}
			// One that repeats itself has not heard our answer.
			repeats := theirs.nonce == last.nonce && theirs.seen == last.seen
			if repeats || !knows || own.seen != theirs.nonce {
				repeat.Reset(0)
			}
			last, own.seen = theirs, theirs.nonce
		}
	}
}
