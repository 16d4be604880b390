// Package overlay is one node: the only place where coord, punch and tun meet.
//
//	control.go   stream to the coordination server: netmap in, record and signals out
//	netmap.go    what the server says, verified, becomes peers
//	endpoint.go  the one writer of peer endpoints: punch's paths, through wgctrl
//	relays.go    links to relays: which, and what goes over them
//	portmap.go   a way in through the router
//	peerrelay.go a relay for others; peerchoice.go which of theirs are used
//	session.go   the parts of a joined node, from up to down
//	node.go      the daemon: up and down; leave.go its end for good
//	local.go     the daemon's socket; client.go its other side
//	state.go     what is on disk
//
// A program may embed a Node: New, Run, then Up.
package overlay

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"
)

// Defaults of a node's places and numbers.
const (
	DefaultStateDir  = "/var/lib/overlay"
	DefaultSocket    = "/run/overlay/overlayd.sock"
	DefaultInterface = "overlay0"
	DefaultMTU       = 1400
	MinMTU           = 1280
	MaxMTU           = 9000
)

// Config says where a node lives. Empty fields mean the defaults.
type Config struct {
	StateDir string
	Socket   string
	Version  string
	// Processors lets the node choose GOMAXPROCS by its load; see tun.Config. For
	// programs that do nothing else.
	Processors bool
	Log        *slog.Logger // nil: silent
}

func (c *Config) setDefaults() {
	if c.StateDir == "" {
		c.StateDir = DefaultStateDir
	}
	if c.Socket == "" {
		c.Socket = DefaultSocket
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Kind groups failures by what a caller can do about them.
type Kind string

// The kinds of an Error.
const (
	Failure     Kind = "failure"
	Usage       Kind = "usage"
	NotRunning  Kind = "not_running"
	Refused     Kind = "refused" // not joined, or the server said no
	Permission  Kind = "permission"
	NoReply     Kind = "no_reply"
	Unreachable Kind = "unreachable"
)

// Error is a failure for people: Message says what is wrong and why, Hint what
// to do about it.
type Error struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

// Error gives the message.
func (e *Error) Error() string { return e.Message }

// KindOf tells the kind of any error; Failure when it is none of ours.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Failure
}

func fail(kind Kind, hint, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// UpRequest is what `overlay up` asks for. Zero fields keep what is saved.
type UpRequest struct {
	Invite     string `json:"invite,omitempty"`
	Name       string `json:"name,omitempty"`
	Server     string `json:"server,omitempty"`
	Interface  string `json:"interface,omitempty"`
	MTU        int    `json:"mtu,omitempty"`
	ListenPort int    `json:"listenPort,omitempty"`
	// Offloads switches parts of the data path off, as in tun.Config; an empty
	// one switches all on again.
	Offloads *string `json:"offloads,omitempty"`
	// Proxy is an HTTP proxy, http://[user:password@]host:port, for what goes over
	// TCP; an empty one means none. It is a secret.
	Proxy *string `json:"proxy,omitempty"`
	// PortMapping says whether the router is asked for a way in: "on" or "off".
	PortMapping string `json:"portMapping,omitempty"`
	// PeerRelay says whether this node relays for others: "on", "off", or the most
	// Mbit/s.
	PeerRelay string `json:"peerRelay,omitempty"`
}

// Progress is one step of coming up, for people. Warn marks a step that did
// not go as wished.
type Progress struct {
	Step string `json:"step"`
	Text string `json:"text"`
	Warn bool   `json:"warn,omitempty"`
}

// UpResult is the outcome of coming up. Invite is set once: when this node
// founded the mesh.
type UpResult struct {
	Name   string     `json:"name"`
	IPv4   netip.Addr `json:"ipv4"`
	IPv6   netip.Addr `json:"ipv6"`
	Online bool       `json:"online"`
	Invite string     `json:"invite,omitempty"`
}

// LeaveRequest asks to give the identity up. The founder of a mesh must say that
// the mesh's root key may go with it.
type LeaveRequest struct {
	ForgetRoot bool `json:"forgetRoot,omitempty"`
	// Offline leaves also when the server cannot be told, which then lists this
	// machine for ever.
	Offline bool `json:"offline,omitempty"`
	// State is the directory that is meant: a daemon that uses another one answers
	// NotRunning. Empty: the daemon's.
	State string `json:"state,omitempty"`
}

// Status is this node's view of the mesh.
type Status struct {
	Schema int          `json:"schema"`
	Self   SelfStatus   `json:"self"`
	Peers  []PeerStatus `json:"peers"`
	// Relays are those this node keeps a link to.
	Relays []RelayStatus `json:"relays"`
}

// SelfStatus is this node. Online means connected to the coordination server.
type SelfStatus struct {
	Name      string     `json:"name"`
	IPv4      netip.Addr `json:"ipv4"`
	IPv6      netip.Addr `json:"ipv6"`
	PublicKey string     `json:"publicKey,omitempty"`
	Online    bool       `json:"online"`
	Mesh      string     `json:"mesh"`
	Interface string     `json:"interface"`
	Server    string     `json:"server"`
	// Trouble says why Online is false; empty otherwise.
	Trouble string `json:"trouble,omitempty"`
	// PeerRelay is what this node relays for others; null: nobody reaches it without
	// being asked, there is no pair to relay for, or its owner does not want it.
	PeerRelay *PeerRelayStatus `json:"peerRelay,omitempty"`
}

// PeerRelayStatus is what a node relays for others: so many nodes and flows now, so
// many bytes since it began, and the most that it does.
type PeerRelayStatus struct {
	Port     uint16 `json:"port"` // as others reach it
	Nodes    int    `json:"nodes"`
	Flows    int    `json:"flows"`
	Bytes    uint64 `json:"bytes"`
	MaxFlows int    `json:"maxFlows"`
	MaxMbits uint64 `json:"maxMbits"`
}

// PeerStatus is one other member.
type PeerStatus struct {
	Name      string     `json:"name"`
	IPv4      netip.Addr `json:"ipv4"`
	IPv6      netip.Addr `json:"ipv6"`
	PublicKey string     `json:"publicKey,omitempty"`
	Online    bool       `json:"online"`
	Path      PathStatus `json:"path"`
	RTTms     *float64   `json:"rttMs"`
	RxBytes   int64      `json:"rxBytes"`
	TxBytes   int64      `json:"txBytes"`
	// Segments is how many packets of a burst one message to the peer may hold
	// now: 1, 4 or 64, which means all.
	Segments      int        `json:"segments"`
	LastHandshake *time.Time `json:"lastHandshake"`
}

// PathStatus is how packets reach a peer: direct, relay or none. Via is how the
// endpoint was found, or tcp, relay-udp, relay-tls, or peer-relay: over a node of the
// mesh, which relays over UDP. Relay is named as in RelayStatus.
type PathStatus struct {
	Kind     string `json:"kind"`
	Endpoint string `json:"endpoint,omitempty"`
	Via      string `json:"via,omitempty"`
	Relay    string `json:"relay,omitempty"`  // its name
	Reason   string `json:"reason,omitempty"` // why it is not direct, for people
	// MTU is the largest IP packet of a direct path, in bytes, as checks found it
	// under traffic; 0: not known.
	MTU int `json:"mtu,omitempty"`
}

// RelayStatus is a relay this node keeps a link to. Home is the one at which the
// node is to be reached first. The one in the own server is named by the server's
// host, or "server" to others than root.
type RelayStatus struct {
	Name      string   `json:"name"`
	Transport string   `json:"transport"` // udp, tls, or empty: out of reach
	RTTms     *float64 `json:"rttMs"`
	Home      bool     `json:"home,omitempty"`
	Peer      bool     `json:"peer,omitempty"` // a node of the mesh
	// Trouble says why it is out of reach, or not reached over UDP.
	Trouble string `json:"trouble,omitempty"`
}

// PingReply is one echo over the tunnel.
type PingReply struct {
	Name  string     `json:"name"`
	IP    netip.Addr `json:"ip"`
	OK    bool       `json:"ok"`
	RTTms *float64   `json:"rttMs"`
	Path  PathStatus `json:"path"`
}

// InviteRequest asks a signer's node for an invite. Zero fields mean one use
// and 24 hours.
type InviteRequest struct {
	Uses    int           `json:"uses,omitempty"`
	Expires time.Duration `json:"expires,omitempty"`
	Name    string        `json:"name,omitempty"`
	Tags    []string      `json:"tags,omitempty"`
}

// InviteReply carries the invite, which is a secret.
type InviteReply struct {
	Invite  string    `json:"invite"`
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"`
}
