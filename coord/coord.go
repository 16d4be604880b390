// Package coord is the protocol between a node and the coordination server:
// the invite, the messages, and the client.
//
// A node holds one TLS 1.3 connection. The server proves itself by its key,
// which the invite or the mesh's State pins; the node proves itself by a client
// certificate made of its device key. On that connection go, in this order,
//
//	GET  /v1/hello       mesh documents, a challenge      Hello
//	POST /v1/own         first device of a mesh           OwnRequest   -> CertReply
//	POST /v1/join        reserve name and address         JoinRequest  -> JoinReply
//	POST /v1/cert        the signed certificate           CertRequest  -> CertReply
//	POST /v1/revoke      a signed revocation              RevokeRequest -> {}
//	POST /v1/invites     a signed invite capability       InviteRequest -> {}
//	GET  /v1/invites                                      InviteList
//	GET  /v1/nodes                                        NodeList
//	GET  /v1/address     where this connection comes from Seen
//	GET  /v1/stream      Upgrade: overlay                 frames, see Event
//	GET  /v1/relay       Upgrade: overlay-relay           datagrams, see punch/relay
//
// Bodies are JSON, strict and capped. Failures carry an Error. The header
// Overlay-Protocol carries Version both ways; beyond one version of difference
// the server answers 426.
//
// After the Upgrade both sides send frames:
//
//	 0               4
//	+---------------+----------------------------+
//	| length, big   | JSON, length bytes         |
//	| endian uint32 |                            |
//	+---------------+----------------------------+
//
// the server Events, the node Reports. Unknown events and fields are ignored.
package coord

import (
	"net/netip"
	"time"

	"overlay/coord/trust"
)

// Version is the protocol version this program speaks.
const Version = 1

// HeaderVersion carries Version in requests and answers.
const HeaderVersion = "Overlay-Protocol"

// HeaderResume carries, in a stream request, the Resume of the last event seen.
const HeaderResume = "Overlay-Resume"

// Limits on what the network may send.
const (
	MaxAnonymousBody = 64 << 10 // request body of a device that is not a member
	MaxBody          = 1 << 20  // request body of a member, and any frame of a node
	MaxEvent         = 16 << 20 // a frame of the server: a whole netmap
	MaxSignal        = 1200     // a sealed signal
)

// Labels of the TLS exporter (RFC 8446 section 7.5). Both sides derive 32 bytes.
const (
	ExporterJoin = "EXPORTER-overlay-join" // salt and context of the proofs
	ExporterSTUN = "EXPORTER-overlay-stun" // key of MESSAGE-INTEGRITY
	// ExporterRelay binds a node's admission to its connection to a relay: the
	// first 16 bytes stand in for the cookie.
	ExporterRelay = "EXPORTER-overlay-relay"
)

// A connection to a relay: a GET of RelayPath with Upgrade: RelayProtocol.
const (
	RelayPath     = "/v1/relay"
	RelayProtocol = "overlay-relay"
)

// Hello is what the server tells anybody who connects. Genesis and State are
// empty while the mesh has no owner; Plan is set only then.
type Hello struct {
	Genesis   trust.Document `json:"genesis,omitempty"`
	State     trust.Document `json:"state,omitempty"`
	Plan      *Plan          `json:"plan,omitempty"`
	Challenge []byte         `json:"challenge"` // X25519 public key of this connection
	Time      time.Time      `json:"time"`
}

// Plan is what the server's operator fixed for a mesh that is not founded yet.
// An invalid Prefix4 leaves the choice to the owner's device.
type Plan struct {
	Name    string       `json:"name"`
	Prefix4 netip.Prefix `json:"prefix4,omitzero"`
	Servers []string     `json:"servers"`
}

// Proofs show, on this connection only, that the sender holds the invite's
// seed and the WireGuard private key.
//
//	x         = TLS exporter(ExporterJoin)
//	Invite    = Ed25519(I, "overlay/v1/join" || 0 || x || D || W)
//	WireGuard = HMAC-SHA256(k, "overlay/v1/wg-pop" || 0 || D || W)
//	        k = HKDF-SHA256(X25519(w, Challenge), salt x, info "overlay/v1/wg-pop" || 0 || W || Challenge)
type Proofs struct {
	Invite    []byte `json:"invite"`
	WireGuard []byte `json:"wireguard"`
}

// OwnRequest founds the mesh: everything the owner's device signed, committed
// together with the use of the owner invite. Repeating it is harmless.
//
// Cap and Cert are for the root R in place of an invite: the server made the
// owner invite and knows its private key, so a capability for that key would
// let the server admit devices. Only Proofs.Invite is by the owner invite.
type OwnRequest struct {
	Genesis trust.Document `json:"genesis"`
	State   trust.Document `json:"state"`
	Cap     trust.Document `json:"cap"`
	Cert    trust.Document `json:"cert"`
	Proofs  Proofs         `json:"proofs"`
}

// JoinRequest asks for a name and an address. With Exact a taken name is an
// error, otherwise the server appends a number.
type JoinRequest struct {
	Invite    trust.Key `json:"invite"`
	WireGuard trust.Key `json:"wireguard"`
	Name      string    `json:"name"`
	Exact     bool      `json:"exact"`
	Role      string    `json:"role,omitempty"` // "relay"; empty: a node
	Proofs    Proofs    `json:"proofs"`
}

// JoinReply is what the server reserved for this device. The same device gets
// the same answer again.
type JoinReply struct {
	Cap  trust.Document `json:"cap"`
	Name string         `json:"name"`
	IP4  netip.Addr     `json:"ip4"`
}

// CertRequest hands in the node certificate signed by I and D.
type CertRequest struct {
	Cert trust.Document `json:"cert"`
}

// CertReply is the certificate countersigned by the server.
type CertReply struct {
	Cert trust.Document `json:"cert"`
}

// RevokeRequest hands in a signed revocation.
type RevokeRequest struct {
	Revocation trust.Document `json:"revocation"`
}

// InviteRequest hands in a signed invite capability.
type InviteRequest struct {
	Cap trust.Document `json:"cap"`
}

// InviteList is every invite the server knows, newest first.
type InviteList struct {
	Invites []InviteInfo `json:"invites"`
}

// InviteInfo is the state of one invite.
type InviteInfo struct {
	Invite    trust.Key `json:"invite"`
	CreatedBy string    `json:"createdBy"` // name of the signer's device
	Created   time.Time `json:"created"`
	Expires   time.Time `json:"expires"`
	Uses      int       `json:"uses"`
	Used      []string  `json:"used"` // names of the devices that used it
	Name      string    `json:"name,omitempty"`
	Tags      []string  `json:"tags,omitempty"`
	State     string    `json:"state"` // open, used, expired, withdrawn
}

// NodeList is every member the server knows, by name.
type NodeList struct {
	Nodes []NodeInfo `json:"nodes"`
}

// NodeInfo is a member as the server sees it.
type NodeInfo struct {
	Name      string     `json:"name"`
	IP4       netip.Addr `json:"ip4"`
	IP6       netip.Addr `json:"ip6"`
	WireGuard trust.Key  `json:"publicKey"`
	Device    trust.Key  `json:"device"`
	Tags      []string   `json:"tags,omitempty"`
	Role      string     `json:"role"` // node, relay
	Online    bool       `json:"online"`
	LastSeen  time.Time  `json:"lastSeen,omitzero"`
	Joined    time.Time  `json:"joined"`
	InvitedBy string     `json:"invitedBy"`
}

// Event is one frame from the server. Exactly one field but Resume is set.
type Event struct {
	Welcome *Welcome  `json:"welcome,omitempty"` // first frame of a stream
	Netmap  *Netmap   `json:"netmap,omitempty"`  // whole: replaces what is known
	Delta   *Netmap   `json:"delta,omitempty"`   // changed and removed nodes
	Signal  *Signal   `json:"signal,omitempty"`
	Ping    *struct{} `json:"ping,omitempty"`  // every PingInterval
	Refusal *Error    `json:"error,omitempty"` // of a Report
	// Resume names this point of the netmap's history; empty on events that
	// are not part of it.
	Resume string `json:"resume,omitempty"`
}

// PingInterval is how often the server sends a Ping on an idle stream; a node
// that hears nothing for three of them reconnects. Each Ping is answered by an
// empty Report.
const PingInterval = 15 * time.Second

// Welcome opens a stream.
type Welcome struct {
	// Session is the STUN user name of this connection; its key is the TLS
	// exporter ExporterSTUN.
	Session []byte `json:"session"`
	// STUN are the UDP ports that answer Binding requests on the address the
	// node connected to.
	STUN []uint16  `json:"stun"`
	Time time.Time `json:"time"`
	// Relay is the server's own relay; nil when it has none.
	Relay *Relay `json:"relay,omitempty"`
}

// Relay is the relay inside the server. It is reached over UDP on the addresses
// of the server, and over TLS by RelayPath of the server itself.
type Relay struct {
	Key   []byte   `json:"key"` // X25519 public key
	Ports []uint16 `json:"ports"`
}

// Netmap is the mesh, or what changed of it. In a whole Netmap all members but
// the receiver are in Nodes; in a delta State is empty unless it changed.
type Netmap struct {
	State       trust.Document   `json:"state,omitempty"`
	Revocations []trust.Document `json:"revocations,omitempty"`
	Nodes       []Node           `json:"nodes,omitempty"`
	Removed     []trust.Key      `json:"removed,omitempty"` // devices
}

// Node is one member: its signed documents and whether the server holds a
// stream to it. Record is empty until the device published one.
type Node struct {
	Device trust.Key      `json:"device"`
	Cap    trust.Document `json:"cap"`
	Cert   trust.Document `json:"cert"` // countersigned
	Record trust.Document `json:"record,omitempty"`
	Online bool           `json:"online"`
}

// Signal is a sealed message between two devices; the server only carries it.
// Peer is the sender in an Event and the receiver in a Report.
type Signal struct {
	Peer trust.Key `json:"peer"`
	Data []byte    `json:"data"`
}

// Seen answers a member who asks how the server sees its connection.
type Seen struct {
	Address netip.AddrPort `json:"address"`
}

// Report is one frame from a node; an empty one answers a Ping.
type Report struct {
	Publish *Publish `json:"publish,omitempty"`
	Signal  *Signal  `json:"signal,omitempty"`
}

// Publish replaces the device's Record. Tokens are the server's own proofs of
// the server-reflexive endpoints, in the order of those endpoints.
type Publish struct {
	Record trust.Document `json:"record"`
	Tokens [][]byte       `json:"tokens,omitempty"`
}

// Code names a failure so that programs can branch on it.
type Code string

// The codes of an Error.
const (
	CodeNoIdentity      Code = "no_identity"      // 401: no client certificate
	CodeBadRequest      Code = "bad_request"      // 400
	CodeTooLarge        Code = "too_large"        // 413
	CodeBadKey          Code = "bad_key"          // 400: WireGuard key
	CodeBadProof        Code = "pop_failed"       // 403
	CodeBadCandidates   Code = "bad_candidates"   // 400
	CodeInviteUnknown   Code = "invite_unknown"   // 403
	CodeInviteExpired   Code = "invite_expired"   // 403
	CodeInviteUsed      Code = "invite_used"      // 403
	CodeInviteWithdrawn Code = "invite_withdrawn" // 403
	CodeNameTaken       Code = "name_taken"       // 409
	CodeAddressTaken    Code = "address_taken"    // 409
	CodeNoAddress       Code = "no_address"       // 507: the prefix is full
	CodeNotMember       Code = "not_member"       // 403
	CodeNotSigner       Code = "not_signer"       // 403
	CodeNotRelay        Code = "not_relay"        // 403: the invite admits no relay, or nothing else
	CodeRevoked         Code = "revoked"          // 403
	CodeRateLimited     Code = "rate_limited"     // 429, with Retry-After
	CodeVersion         Code = "version"          // 426
	CodeStorage         Code = "storage"          // 507: cannot save
	CodeInternal        Code = "internal"         // 500
)

// Error is a refusal by the server. Message says what is wrong and why, Hint
// what to do; both are for people.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`

	// RetryAfter is the answer's Retry-After; zero when there was none.
	RetryAfter time.Duration `json:"-"`
}

// Error gives the message.
func (e *Error) Error() string { return e.Message }
