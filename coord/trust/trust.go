// Package trust makes and verifies the signed documents that decide who is in
// a mesh. All of it is pure: no clock, no disk, no network.
//
//	R mesh root  ── signs ── Genesis, State
//	S signer     ── signs ── InviteCap           (S is listed in State)
//	I invite     ── signs ── NodeCert, with D    (I is named by an InviteCap)
//	D device     ── signs ── NodeCert, Record, its own Revocation
//
// The coordination server holds none of these keys, so it can refuse service
// but can neither add a node nor move an address or a name.
package trust

import (
	"net/netip"
	"time"
)

// Key is an Ed25519 or X25519 public key.
type Key [32]byte

// Hash is a SHA-256.
type Hash [32]byte

// Document is a signed document: exactly the bytes that were signed, and the
// signatures. It is stored and forwarded as it is, never serialised again.
type Document []byte

// Genesis starts a mesh. Its hash, the trust hash, is in every invite but the
// owner's.
type Genesis struct {
	MeshID [16]byte
	Root   Key          // R
	Signer Key          // the first S
	ULA    netip.Prefix // the mesh's IPv6 /48
	Pin    Hash         // SHA-256 of the first server's SubjectPublicKeyInfo
}

// State is the mesh's current shape. A lower epoch is refused.
type State struct {
	Epoch   uint64
	Prev    Hash // of the previous State document; zero in epoch 1
	Name    string
	Prefix4 netip.Prefix
	Servers []string // host:port
	Pins    []Pin
	Signers []Key
	Policy  Hash // zero: no policy
}

// PinStatus says whether a server key is in use.
type PinStatus uint8

// The states of a server key, in the order of its life.
const (
	PinNext PinStatus = iota + 1
	PinCurrent
	PinRetired
)

// Pin is the SHA-256 of a server's SubjectPublicKeyInfo.
type Pin struct {
	Hash   Hash
	Status PinStatus
}

// InviteCap lets whoever holds I admit up to Uses devices.
type InviteCap struct {
	Invite    Key // I
	Signer    Key // S
	NotBefore time.Time
	NotAfter  time.Time
	Uses      uint16
	Name      string // forced name of the device, or empty
	Tags      []string
}

// Role is what a node does in the mesh.
type Role uint8

// The roles.
const (
	RoleNode Role = iota + 1
	RoleRelay
)

// NodeCert binds a device to its WireGuard key, name and addresses.
type NodeCert struct {
	Invite    Key // I
	Device    Key // D
	WireGuard Key // W, canonical
	Name      string
	IP4       netip.Addr
	IP6       netip.Addr
	Tags      []string
	Role      Role
	Serial    uint64
	IssuedAt  time.Time
}

// Revocation withdraws a device, an invite or a signer from a moment on. A
// device may withdraw itself.
type Revocation struct {
	Target Key
	By     Key // S, R, or the target itself when it is a device
	From   time.Time
}

// Record is what a device says of its present self. The highest serial counts.
type Record struct {
	Device       Key
	Serial       uint64 // milliseconds since 1970 when it was signed
	Nonce        [16]byte
	Capabilities uint32
	Candidates   []Endpoint // at most MaxEndpoints
}

// MaxEndpoints is how many endpoints a Record may have; more are refused whole.
const MaxEndpoints = 16

// Endpoint is a published transport address and how it was found, with the
// numbers of punch.CandidateType.
type Endpoint struct {
	Addr netip.AddrPort
	Type uint8
}
