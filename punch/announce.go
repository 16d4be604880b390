package punch

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

const (
	// MaxAnnouncement bounds an announcement in bytes.
	MaxAnnouncement = 512

	announceVersion = 1
	// announceRate is how many announcements are opened per second.
	announceRate = 100
	// announceAgain is how soon an announcement has pairs checked again that did
	// not answer.
	announceAgain = 2 * time.Second
)

var (
	errAnnounceOpen   = errors.New("announcement not of this mesh")
	errAnnounceFormat = errors.New("malformed announcement")
	errAnnounceRate   = errors.New("too many announcements")
)

// An announcement tells the nodes of a LAN, by multicast, that a node of their
// mesh is in it, so that they meet when no server is reached. It is sealed under a
// key of the mesh: to others it is noise. Sealed it is a random 24-byte nonce
// followed by XChaCha20-Poly1305 of
//
//	+---------------+-----------------+---------+------------------------------+
//	| version = 1   | WireGuard key   | n <= 16 | n host candidates, coded as  |
//	|               | (32)            |         | in signals                   |
//	+---------------+-----------------+---------+------------------------------+
//
// Whoever ever had an invite can make one, of anybody, and any can be repeated. All it leads to is
// checks on addresses that are on-link, within the limits of every check; an
// address is believed only when it answers one.
type announcement struct {
	key        Key
	candidates []Candidate
}

// announcer is the cipher of a mesh's announcements.
func announcer(mesh [32]byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, mesh[:], nil, "overlay/v1/announce", chacha20poly1305.KeySize)
	if err != nil {
		return nil, fmt.Errorf("derive announcement key: %w", err)
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("open announcement cipher: %w", err)
	}
	return aead, nil
}

func (n *announcement) seal(aead cipher.AEAD) []byte {
	b := append([]byte{announceVersion}, n.key[:]...)
	b = append(b, byte(len(n.candidates)))
	for _, c := range n.candidates {
		b = appendAddress(b, c.Addr, c.Type)
	}
	nonce := make([]byte, chacha20poly1305.NonceSizeX)
	_, _ = rand.Read(nonce) // never fails
	return aead.Seal(nonce, nonce, b, nil)
}

func openAnnouncement(aead cipher.AEAD, sealed []byte) (*announcement, error) {
	if len(sealed) < chacha20poly1305.NonceSizeX || len(sealed) > MaxAnnouncement {
		return nil, errAnnounceFormat
	}
	nonce, box := sealed[:chacha20poly1305.NonceSizeX], sealed[chacha20poly1305.NonceSizeX:]
	b, err := aead.Open(nil, nonce, box, nil)
	if err != nil {
		return nil, errAnnounceOpen
	}
	return parseAnnouncement(b)
}

func parseAnnouncement(b []byte) (*announcement, error) {
	const header = 1 + len(Key{})
	if len(b) < header || b[0] != announceVersion {
		return nil, errAnnounceFormat
	}
	list, _, err := cutAddresses(b[header:])
	if err != nil {
		return nil, errAnnounceFormat
	}
	for _, c := range list {
		if c.Type != Host {
			return nil, errAnnounceFormat
		}
	}
	return &announcement{key: Key(b[1:header]), candidates: list}, nil
}

// Announcement gives what tells the nodes of a LAN where we are, to be sent to
// them by multicast; nil while no address of ours is known.
func (a *Agent) Announcement() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := announcement{key: Key(a.private.PublicKey().Bytes())}
	for _, c := range a.own {
		if c.Type == Host {
			n.candidates = append(n.candidates, c)
		}
	}
	if len(n.candidates) == 0 {
		return nil
	}
	return n.seal(a.announcer)
}

// HandleAnnouncement takes what came by multicast. The addresses in it that are
// on-link are checked at once; what else it names is ignored. It reports why one
// was dropped; our own is not an error. Safe for concurrent use.
func (a *Agent) HandleAnnouncement(sealed []byte) error {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.announced.take(now, announceRate) {
		return fmt.Errorf("handle announcement: %w", errAnnounceRate)
	}
	n, err := openAnnouncement(a.announcer, sealed)
	if err != nil {
		return fmt.Errorf("handle announcement: %w", err)
	}
	if n.key == Key(a.private.PublicKey().Bytes()) {
		return nil
	}
	p := a.peers[n.key]
	if p == nil {
		return fmt.Errorf("handle announcement: %w", errUnknownPeer)
	}
	a.meetNearby(p, n.candidates, now)
	return nil
}

// meetNearby checks what a peer's announcement names in our LAN.
func (a *Agent) meetNearby(p *peer, list []Candidate, now time.Time) {
	var here []Candidate
	for _, c := range list {
		if c.Addr = plain(c.Addr); a.onLink(c.Addr.Addr()) {
			here = append(here, c)
		}
	}
	a.setCandidates(p, here, announced)
	for _, q := range p.pairs {
		idle := q.next.IsZero() && now.Sub(q.sent) > announceAgain
		if q.source&announced != 0 && idle && (!q.valid || q.suspect) {
			q.tried = true
			q.attempt, q.next = 0, now
		}
	}
	a.schedule(p, now)
}
