package coord

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"strings"
	"unicode"

	"overlay/coord/trust"
)

// InviteKind says what an Invite's Hash is. The zero InviteKind is invalid.
type InviteKind uint8

// The kinds of invites.
const (
	InviteOwner  InviteKind = iota + 1 // the first one of a server, which makes its owner
	InviteMember                       // any other
)

const (
	invitePrefix  = "ovl1_"
	inviteInfo    = "overlay/v1/invite"
	inviteLenAt   = 1 + 16 + 32 // offset of the length of Server
	inviteFixed   = inviteLenAt + 1 + crc32.Size
	inviteShown   = len(invitePrefix) + 4 // characters in messages and logs
	maxInviteText = 4096                  // with white space; an invite has at most 417
)

// Invite is what one person hands to another so that their device can join. Its
// Seed is the secret; whoever has it can join as long as the invite is valid.
// As text it is "ovl1_" and, in base64url without padding (RFC 4648 section 5),
//
//	+------+------+------+-----------------+--------+--------------+
//	| kind | seed | hash | length of       | server | CRC-32 of    |
//	|  1   |  16  |  32  | server (1)      |        | the rest (4) |
//	+------+------+------+-----------------+--------+--------------+
//
// The zero Invite is invalid. It must not be printed but for the user who asked
// for it: String gives the whole secret, LogValue and GoString do not.
type Invite struct {
	Kind   InviteKind
	Seed   [16]byte
	Hash   [32]byte // owner: SHA-256 of the server's SubjectPublicKeyInfo; member: trust hash
	Server string   // host:port, see trust.ValidServer
}

// NewInvite draws the seed of a new invite to the mesh behind server.
func NewInvite(kind InviteKind, hash [32]byte, server string) (Invite, error) {
	i := Invite{Kind: kind, Hash: hash, Server: server}
	if err := i.check(); err != nil {
		return Invite{}, fmt.Errorf("make invite: %w", err)
	}
	// Since Go 1.24 Read fills the seed or ends the program.
	_, _ = rand.Read(i.Seed[:])
	return i, nil
}

func (i Invite) check() error {
	if i.Kind != InviteOwner && i.Kind != InviteMember {
		return fmt.Errorf("kind %d of invites is unknown", i.Kind)
	}
	return trust.ValidServer(i.Server)
}

// String returns the invite as the user hands it on, secret included.
func (i Invite) String() string {
	b := append(make([]byte, 0, inviteFixed+len(i.Server)), uint8(i.Kind))
	b = append(b, i.Seed[:]...)
	b = append(b, i.Hash[:]...)
	b = append(b, uint8(len(i.Server)))
	b = append(b, i.Server...)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	return invitePrefix + base64.RawURLEncoding.EncodeToString(b)
}

// GoString returns the invite without its secret, for %#v.
func (i Invite) GoString() string { return redactInvite(i.String()) }

// LogValue returns the invite without its secret, for log/slog.
func (i Invite) LogValue() slog.Value { return slog.StringValue(redactInvite(i.String())) }

// redactInvite leaves so much of an invite that its owner knows it again, and
// nothing that a terminal would obey.
func redactInvite(s string) string {
	s = s[:min(len(s), inviteShown)]
	if foreign := strings.IndexFunc(s, notInInvite); foreign >= 0 {
		s = s[:foreign]
	}
	return s + "..."
}

// Key returns I, the key with which the invited device signs its certificate
// and which the server knows only the public half of.
func (i Invite) Key() ed25519.PrivateKey {
	seed, err := hkdf.Key(sha256.New, i.Seed[:], nil, inviteInfo, ed25519.SeedSize)
	if err != nil {
		panic(fmt.Sprintf("derive invite key: %v", err)) // its lengths are constants
	}
	return ed25519.NewKeyFromSeed(seed)
}

// ParseInvite reads what a user pasted: white space and line breaks around and
// inside it do not matter. Its errors are for that user and never show more of
// the invite than redactInvite leaves.
func ParseInvite(s string) (Invite, error) {
	if len(s) > maxInviteText {
		return Invite{}, fmt.Errorf("this is not an invite: it has %d characters", len(s))
	}
	text := strings.Map(dropSpace, s)
	if err := checkInvitePrefix(text); err != nil {
		return Invite{}, err
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text[len(invitePrefix):])
	if err != nil || len(b) < inviteFixed || inviteLength(text) != len(text) {
		return Invite{}, damagedInvite(text)
	}
	body, sum := b[:len(b)-crc32.Size], b[len(b)-crc32.Size:]
	if crc32.ChecksumIEEE(body) != binary.BigEndian.Uint32(sum) {
		return Invite{}, damagedInvite(text)
	}
	i := Invite{Kind: InviteKind(b[0]), Server: string(body[inviteLenAt+1:])}
	copy(i.Seed[:], b[1:])
	copy(i.Hash[:], b[1+len(i.Seed):])
	if err := i.check(); err != nil {
		return Invite{}, fmt.Errorf("invite %s is not usable by this version of overlay: %w", redactInvite(text), err)
	}
	return i, nil
}

// dropSpace removes what chat programs and terminals put into a long word.
func dropSpace(c rune) rune {
	if unicode.IsSpace(c) || unicode.Is(unicode.Cf, c) {
		return -1
	}
	return c
}

func checkInvitePrefix(text string) error {
	if strings.HasPrefix(text, invitePrefix) {
		return nil
	}
	if text == "" {
		return errors.New(`the invite is empty: an invite starts with "ovl1_"`)
	}
	prefix, _, found := strings.Cut(text, "_")
	if number, ok := strings.CutPrefix(prefix, "ovl"); found && ok && isInviteVersion(number) {
		return fmt.Errorf(`invite needs a newer overlay: it starts with "%s_", this one reads "ovl1_"; update overlay on this machine`, prefix)
	}
	if strings.HasPrefix(invitePrefix, text) {
		return damagedInvite(text)
	}
	// What was pasted may be another secret, so none of it is shown.
	return errors.New(`this is not an invite: an invite starts with "ovl1_"`)
}

// isInviteVersion says whether s is a number from 2 that a prefix may have.
func isInviteVersion(s string) bool {
	const maxDigits = 4
	return len(s) > 0 && len(s) <= maxDigits && strings.Trim(s, "0123456789") == "" && s[0] != '0' && s != "1"
}

// inviteLength returns how many characters the invite that starts like text
// has, 0 when the text ends before it tells.
func inviteLength(text string) int {
	const telling = (inviteLenAt + 3) / 3 * 4 // characters up to the length of Server
	if len(text) < len(invitePrefix)+telling {
		return 0
	}
	b, err := base64.RawURLEncoding.DecodeString(text[len(invitePrefix):][:telling])
	if err != nil {
		return 0
	}
	return len(invitePrefix) + base64.RawURLEncoding.EncodedLen(inviteFixed+int(b[inviteLenAt]))
}

func damagedInvite(text string) error {
	shown, have := redactInvite(text), len(text)
	if at := strings.IndexFunc(text, notInInvite); at >= 0 {
		return fmt.Errorf("invite is damaged: character %d of %s is none that an invite has; copy it again in full", at+1, shown)
	}
	switch want := inviteLength(text); {
	case want == 0:
		return fmt.Errorf("invite is damaged: %s ends after %d characters; copy it again in full", shown, have)
	case want != have:
		return fmt.Errorf("invite is damaged: checksum does not match (%d of %d characters) in %s; copy it again in full", have, want, shown)
	}
	return fmt.Errorf("invite is damaged: checksum does not match in %s; copy it again in full", shown)
}

// notInInvite says whether c is outside the alphabet of base64url.
func notInInvite(c rune) bool {
	return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_'
}
