// Package trust makes and verifies the signed documents that decide who is in
// a mesh. All of it is pure: no clock, no disk, no network.
//
//	R mesh root  ── signs ── Genesis, State
//	S signer     ── signs ── InviteCap           (S is listed in State)
//	I invite     ── signs ── NodeCert, with D    (I is named by an InviteCap)
//	D device     ── signs ── NodeCert, Record, its own Revocation
//
// The coordination server holds none of these keys, so it can refuse service
// but can neither add a node nor move an address or a name. It only attests the
// time at which it saw a certificate, with its TLS key.
package trust

import (
	"net/netip"
	"time"
)

// Key is an Ed25519 or X25519 public key. The zero Key names nobody.
type Key [32]byte

// Hash is a SHA-256. The zero Hash means that there is none.
type Hash [32]byte

// Document is a signed document: exactly the bytes that were signed, and the
// signatures. It is stored and forwarded as it is, never serialised again.
//
//	 0      1         2                 6
//	+------+---------+-----------------+--------+-------------+- - - - - - -+
//	| kind | version | length of body  |  body  |  signature  |  signature  |
//	|  1   |    1    |        4        |        |     64      |  NodeCert   |
//	+------+---------+-----------------+--------+-------------+- - - - - - -+
//	|<---------- signed bytes ------------------>|
//
// A signature is Ed25519 (RFC 8032) over
//
//	"overlay/v1/" || name of the kind || 0x00 || signed bytes
//
// Numbers are big-endian. In the bodies drawn below a string is its length (1)
// and its bytes, a list its count (1) and its items, a time the seconds since
// 1970 UTC (8), so that times lose their fraction when signed. Every value has
// one encoding; any other is refused.
type Document []byte

// MaxDocument is the length in bytes above which a Document is refused unread.
const MaxDocument = 16 << 10

// Genesis starts a mesh. Its hash, the trust hash, is in every invite but the
// owner's.
//
//	+---------+------+--------+---------------------+-----+
//	| mesh id | root | signer | first 6 octets of   | pin |
//	|   16    |  32  |   32   | the ULA prefix   6  | 32  |
//	+---------+------+--------+---------------------+-----+
type Genesis struct {
	MeshID [16]byte
	Root   Key          // R
	Signer Key          // the first S
	ULA    netip.Prefix // the mesh's IPv6 /48, within fc00::/7 (RFC 4193)
	Pin    Hash         // SHA-256 of the first server's SubjectPublicKeyInfo
}

// State is the mesh's current shape. A lower epoch is refused.
//
//	+-------+------+--------+-----------+------+---------+---------+---------+--------+
//	| epoch | prev | name   | Prefix4   | bits | servers | pins    | signers | policy |
//	|   8   |  32  | string |     4     |  1   | list of | list of | list of |   32   |
//	|       |      |        |           |      | strings | 32 + 1  |   32    |        |
//	+-------+------+--------+-----------+------+---------+---------+---------+--------+
type State struct {
	Epoch   uint64 // from 1
	Prev    Hash   // of the previous State document; zero in epoch 1
	Name    string // see ValidName
	Prefix4 netip.Prefix
	Servers []string // host:port, the preferred first; at most MaxServers
	Pins    []Pin    // at most MaxPins, at least one current
	Signers []Key    // ascending; at most MaxSigners
	Policy  Hash     // zero: no policy
}

// Longer lists in a State are refused whole.
const (
	MaxServers = 16
	MaxPins    = 16
	MaxSigners = 64
)

// PinStatus says whether a server key is in use. The zero PinStatus is invalid.
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

// InviteCap lets whoever holds I admit up to Uses devices. It is valid from
// NotBefore until just before NotAfter, by the server's clock: signers set
// NotBefore some minutes back so that a fast clock does no harm.
//
//	+--------+--------+------------+-----------+------+--------+---------+
//	| invite | signer | not before | not after | uses | name   | tags    |
//	|   32   |   32   |     8      |     8     |  2   | string | list of |
//	|        |        |            |           |      |        | strings |
//	+--------+--------+------------+-----------+------+--------+---------+
type InviteCap struct {
	Invite    Key // I
	Signer    Key // S
	NotBefore time.Time
	NotAfter  time.Time
	Uses      uint16   // 1 to MaxUses; 1 when Name is set
	Name      string   // forced name of the device, or empty
	Tags      []string // ascending, each as in ValidName; at most MaxTags
}

// MaxUses is how many devices one invite may admit.
const MaxUses = 1000

// MaxTags is how many tags an invite or a node may have; more are refused
// whole.
const MaxTags = 8

// Role is what a node does in the mesh. The zero Role is invalid.
type Role uint8

// The roles.
const (
	RoleNode  Role = iota + 1
	RoleRelay      // forwards for nodes, is no WireGuard peer
)

// String is the role's name.
func (r Role) String() string {
	switch r {
	case RoleNode:
		return "node"
	case RoleRelay:
		return "relay"
	}
	return "unknown"
}

// NodeCert binds a device to its WireGuard key, name and addresses. It carries
// two signatures: by I, then by D.
//
//	+--------+--------+----+--------+-----+-----+---------+------+--------+-----------+
//	| invite | device | W  | name   | ip4 | ip6 | tags    | role | serial | issued at |
//	|   32   |   32   | 32 | string |  4  | 16  | list of |  1   |   8    |     8     |
//	|        |        |    |        |     |     | strings |      |        |           |
//	+--------+--------+----+--------+-----+-----+---------+------+--------+-----------+
type NodeCert struct {
	Invite    Key    // I
	Device    Key    // D
	WireGuard Key    // W, see CanonicalKey
	Name      string // see ValidName
	IP4       netip.Addr
	IP6       netip.Addr // see DeriveIP6
	Tags      []string   // ascending, each as in ValidName; at most MaxTags
	Role      Role
	Serial    uint64    // from 1; of two certificates of one device the higher counts
	IssuedAt  time.Time // by the device's clock, for people; nothing is judged by it
}

// Revocation withdraws a device, an invite or a signer from a moment on. A
// device may withdraw itself.
//
//	+--------+----+------+
//	| target | by | from |
//	|   32   | 32 |  8   |
//	+--------+----+------+
type Revocation struct {
	Target Key
	By     Key // S, R, or the target itself when it is a device
	From   time.Time
}

// RelayTag is the tag of an invite that admits relays. A node certificate with
// RoleRelay counts only under such an invite.
const RelayTag = "relay"

// Record is what a device says of its present self. The highest serial counts.
// The list of relays is left out when it is empty.
//
//	+--------+--------+-------+-------+--------------+-----------------------------------+- - - - - - - - +
//	| device | serial | nonce | relay | capabilities | list of candidates:               | list of relays:|
//	|   32   |   8    |  16   | port  |      2       | family (1: 4 or 6), address (4 or | relay (32),    |
//	|        |        |       |   2   |              | 16), port (2), type (1)           | trip (2)       |
//	+--------+--------+-------+-------+--------------+-----------------------------------+- - - - - - - - +
//
// Nodes from before there were peer relays take the port for capabilities that
// they do not know.
type Record struct {
	Device       Key
	Serial       uint64 // milliseconds since 1970 when it was signed
	Nonce        [16]byte
	RelayPort    uint16 // UDP, on the addresses of the candidates, where a node relays for others; 0: nowhere
	Capabilities uint16
	Candidates   []Endpoint  // no two alike; at most MaxEndpoints
	Relays       []RelayTrip // that the device keeps a link to, the first its home; at most MaxRelays
}

// RelayTrip is how far a device is from a relay it keeps a link to.
type RelayTrip struct {
	Relay Key    // the relay's X25519 public key; named once in a Record
	Trip  uint16 // round trip in milliseconds; 65535 is that or more
}

// MaxRelays is how many relays a Record may name; more are refused whole.
const MaxRelays = 8

// MaxEndpoints is how many endpoints a Record may have; more are refused whole.
const MaxEndpoints = 16

// Endpoint is a published transport address and how it was found, with the
// numbers of punch.CandidateType. IPv4 addresses are plain, never IPv4-mapped,
// and IPv6 addresses have no zone. Whether an address may be probed is decided
// by those who probe.
type Endpoint struct {
	Addr netip.AddrPort
	Type uint8
}
