package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// The reasons a caller may tell apart. They are wrapped with what was refused.
var (
	// ErrEncoding: the bytes are no document of the kind, or one of another
	// version, or its values are out of bounds.
	ErrEncoding = errors.New("bad encoding")
	// ErrSignature: a signature is not by the key that the document names.
	ErrSignature = errors.New("bad signature")
	// ErrExpired: the invite was no longer valid when the server saw it used.
	ErrExpired = errors.New("invite expired")
	// ErrRevoked: the device, its invite or the invite's signer was withdrawn.
	ErrRevoked = errors.New("revoked")
	// ErrUsed: the invite has admitted as many devices as it may.
	ErrUsed = errors.New("invite used up")
	// ErrConflict: a name, address or key belongs to another live device, or
	// the device has a newer or different certificate.
	ErrConflict = errors.New("conflict")
)

const (
	version    = 1
	headerSize = 6
	context    = "overlay/v1/"
	maxCert    = 1 << 10 // the length of a NodeCert as a Document
)

// kind is the first octet of a Document.
type kind uint8

const (
	kindGenesis kind = iota + 1
	kindState
	kindInviteCap
	kindNodeCert
	kindCountersigned
	kindRecord
	kindRevocation
)

// String returns the name that goes under the signature.
func (k kind) String() string {
	switch k {
	case kindGenesis:
		return "genesis"
	case kindState:
		return "state"
	case kindInviteCap:
		return "invite-cap"
	case kindNodeCert:
		return "node-cert"
	case kindCountersigned:
		return "countersigned"
	case kindRecord:
		return "record"
	case kindRevocation:
		return "revocation"
	}
	return "unknown"
}

// message is the content of a document. Its check accepts exactly the values
// that have an encoding.
type message interface {
	kind() kind
	check() error
	appendTo(b []byte) []byte
}

// countersigned is a NodeCert as the server saw it at a time. It is signed by
// the server's TLS key.
//
//	+----------------+----------+----+------------+
//	| length of cert | NodeCert | at | server key |
//	|       2        | Document | 8  |     32     |
//	+----------------+----------+----+------------+
type countersigned struct {
	cert   Document
	at     time.Time
	server Key
}

func (Genesis) kind() kind       { return kindGenesis }
func (State) kind() kind         { return kindState }
func (InviteCap) kind() kind     { return kindInviteCap }
func (NodeCert) kind() kind      { return kindNodeCert }
func (countersigned) kind() kind { return kindCountersigned }
func (Record) kind() kind        { return kindRecord }
func (Revocation) kind() kind    { return kindRevocation }

// Hash returns the SHA-256 of the whole document, signatures included.
func (d Document) Hash() Hash { return sha256.Sum256(d) }

// SignGenesis signs g with R, which g must name.
func SignGenesis(g Genesis, root ed25519.PrivateKey) (Document, error) {
	return seal(g, []Key{g.Root}, root)
}

// OpenGenesis verifies d with the R inside. That R is the right one only the
// trust hash can tell; see NewMesh.
func OpenGenesis(d Document) (Genesis, error) {
	return open(d, readGenesis, func(g Genesis) []Key { return []Key{g.Root} })
}

// SignState signs s with R.
func SignState(s State, root ed25519.PrivateKey) (Document, error) {
	key, err := publicKey(root)
	if err != nil {
		return nil, fmt.Errorf("sign state: %w", err)
	}
	return seal(s, []Key{key}, root)
}

// OpenState verifies d with R.
func OpenState(d Document, root Key) (State, error) {
	return open(d, readState, func(State) []Key { return []Key{root} })
}

// SignInviteCap signs c with S, which c must name.
func SignInviteCap(c InviteCap, signer ed25519.PrivateKey) (Document, error) {
	return seal(c, []Key{c.Signer}, signer)
}

// OpenInviteCap verifies d with the S inside. Whether that S may sign is
// decided by Mesh.Admit.
func OpenInviteCap(d Document) (InviteCap, error) {
	return open(d, readInviteCap, func(c InviteCap) []Key { return []Key{c.Signer} })
}

// SignNodeCert signs c with I and D, which c must name.
func SignNodeCert(c NodeCert, invite, device ed25519.PrivateKey) (Document, error) {
	return seal(c, []Key{c.Invite, c.Device}, invite, device)
}

// OpenNodeCert verifies d with the I and the D inside. Whether that I may admit
// devices is decided by Mesh.Admit.
func OpenNodeCert(d Document) (NodeCert, error) {
	return open(d, readNodeCert, func(c NodeCert) []Key { return []Key{c.Invite, c.Device} })
}

// Countersign attests with the server's TLS key that cert was seen at that
// time. The caller has verified cert.
func Countersign(cert Document, at time.Time, server ed25519.PrivateKey) (Document, error) {
	key, err := publicKey(server)
	if err != nil {
		return nil, fmt.Errorf("countersign: %w", err)
	}
	return seal(countersigned{cert: cert, at: at, server: key}, []Key{key}, server)
}

// OpenCountersigned verifies d with the server key inside and returns the
// certificate, still unverified, the time, and the SHA-256 of that server key's
// SubjectPublicKeyInfo. Whether that is a server of the mesh is decided by
// Mesh.Admit.
func OpenCountersigned(d Document) (cert Document, at time.Time, pin Hash, err error) {
	c, err := open(d, readCountersigned, func(c countersigned) []Key { return []Key{c.server} })
	if err != nil {
		return nil, time.Time{}, Hash{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(c.server[:]))
	if err != nil {
		return nil, time.Time{}, Hash{}, fmt.Errorf("encode server key: %w", err)
	}
	return c.cert, c.at, sha256.Sum256(spki), nil
}

// SignRecord signs r with D, which r must name.
func SignRecord(r Record, device ed25519.PrivateKey) (Document, error) {
	return seal(r, []Key{r.Device}, device)
}

// OpenRecord verifies d with the D inside.
func OpenRecord(d Document) (Record, error) {
	return open(d, readRecord, func(r Record) []Key { return []Key{r.Device} })
}

// SignRevocation signs r with S, R or D, which r must name as By.
func SignRevocation(r Revocation, by ed25519.PrivateKey) (Document, error) {
	return seal(r, []Key{r.By}, by)
}

// OpenRevocation verifies d with the key inside that made it. Whether that key
// may revoke the target is decided by Mesh.AddRevocation.
func OpenRevocation(d Document) (Revocation, error) {
	return open(d, readRevocation, func(r Revocation) []Key { return []Key{r.By} })
}

// encode returns the bytes of m that are signed.
func encode(m message) []byte {
	b := m.appendTo(append(make([]byte, 0, 512), uint8(m.kind()), version, 0, 0, 0, 0))
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)-headerSize))
	return b
}

// seal encodes m and signs it with the private keys that belong to signers.
func seal(m message, signers []Key, keys ...ed25519.PrivateKey) (Document, error) {
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("sign %v: %w", m.kind(), err)
	}
	signed := encode(m)
	text := signedText(m.kind(), signed)
	d := signed
	for i, key := range keys {
		public, err := publicKey(key)
		if err != nil {
			return nil, fmt.Errorf("sign %v: %w", m.kind(), err)
		}
		if public != signers[i] {
			return nil, fmt.Errorf("sign %v: the document names another key than the one that signs", m.kind())
		}
		d = append(d, ed25519.Sign(key, text)...)
	}
	return d, nil
}

// open is the inverse of seal: it refuses everything that seal cannot make.
func open[T message](d Document, read func(*reader) T, signers func(T) []Key) (T, error) {
	var zero T
	signed, signatures, err := split(d, zero.kind())
	if err != nil {
		return zero, fmt.Errorf("open %v: %w: %w", zero.kind(), ErrEncoding, err)
	}
	m, err := decode(signed, read)
	if err != nil {
		return zero, fmt.Errorf("open %v: %w: %w", zero.kind(), ErrEncoding, err)
	}
	keys := signers(m)
	if len(signatures) != len(keys)*ed25519.SignatureSize {
		return zero, fmt.Errorf("open %v: %w: %d octets of signatures", zero.kind(), ErrEncoding, len(signatures))
	}
	text := signedText(zero.kind(), signed)
	for i, key := range keys {
		if err := verify(key, text, signatures[i*ed25519.SignatureSize:][:ed25519.SignatureSize]); err != nil {
			return zero, fmt.Errorf("open %v: %w", zero.kind(), err)
		}
	}
	return m, nil
}

// split cuts a document of kind k into the signed bytes and the signatures.
func split(d Document, k kind) (signed, signatures []byte, err error) {
	if len(d) < headerSize || len(d) > MaxDocument {
		return nil, nil, fmt.Errorf("length %d", len(d))
	}
	if kind(d[0]) != k {
		return nil, nil, fmt.Errorf("it is of kind %d (%v)", d[0], kind(d[0]))
	}
	if d[1] != version {
		return nil, nil, fmt.Errorf("version %d, known is %d", d[1], version)
	}
	n := binary.BigEndian.Uint32(d[2:])
	if uint64(n) > uint64(len(d)-headerSize) {
		return nil, nil, fmt.Errorf("body of %d octets in a document of %d", n, len(d))
	}
	return d[:headerSize+int(n)], d[headerSize+int(n):], nil
}

// decode reads the signed bytes of a message. Encoding the result again must
// give the same bytes, so that no value has two encodings.
func decode[T message](signed []byte, read func(*reader) T) (T, error) {
	r := reader{b: signed[headerSize:]}
	m := read(&r)
	var zero T
	if !r.whole() {
		return zero, errors.New("body is cut short, or longer than its fields")
	}
	if err := m.check(); err != nil {
		return zero, err
	}
	if !bytes.Equal(encode(m), signed) {
		return zero, errors.New("not the canonical form")
	}
	return m, nil
}

func signedText(k kind, signed []byte) []byte {
	text := make([]byte, 0, len(context)+len(k.String())+1+len(signed))
	text = append(text, context...)
	text = append(text, k.String()...)
	text = append(text, 0)
	return append(text, signed...)
}
