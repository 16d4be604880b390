package punch

import (
	"log/slog"
	"net/netip"
	"time"
)

// Key is a WireGuard public key; it names a peer.
type Key [32]byte

// Nonce is published by a node. A check towards it carries a user name derived
// from it, so that the receiver finds the sender by one map look-up.
type Nonce [16]byte

// CandidateType says how a candidate was found (RFC 8445 section 5.1.1).
type CandidateType uint8

// The zero CandidateType is invalid.
const (
	Host            CandidateType = iota + 1 // an address of a local interface
	ServerReflexive                          // seen by a STUN server
	PeerReflexive                            // seen by the peer in a check
	PortMapped                               // obtained from the router
	Relayed                                  // a handle: the way leads over a relay
	Predicted                                // a port that a sequential NAT was expected to use
	Birthday                                 // one of many ports that were tried
)

// MaxCandidates is how many candidates one peer may have. A longer list is
// refused whole.
const MaxCandidates = 16

// Candidate is a transport address where a node may be reached. Token is the
// server's proof that it saw the address (server-reflexive only); it travels to
// the coordination server, not to peers.
type Candidate struct {
	Addr  netip.AddrPort
	Type  CandidateType
	Token []byte
}

// Server is a STUN server. With a Username, requests carry MESSAGE-INTEGRITY
// under Key, and answers without it are dropped.
type Server struct {
	Addr     netip.AddrPort
	Username []byte
	Key      []byte
}

// Peer is what the netmap says of a peer. Online peers are connected to
// eagerly, others only on Demand.
type Peer struct {
	Key        Key
	Nonce      Nonce
	Online     bool
	Candidates []Candidate
}

// Path is the way to a peer: Addr answered an authenticated check, or is the
// handle of a relay (Type Relayed), which is used before it answers. The zero
// Addr means that there is no path. Packets leave from Local, at which the answer
// arrived: its port is 0 for the node's UDP port, or names one of
// Config.OpenSockets; a zero address leaves the choice to the system. While one way replaces
// another or is in doubt, all packets also go to Also, from AlsoLocal; the zero Also
// means that they do not.
type Path struct {
	Peer      Key
	Addr      netip.AddrPort
	Local     netip.AddrPort
	Also      netip.AddrPort
	AlsoLocal netip.AddrPort
	Type      CandidateType // of the remote candidate
	RTT       time.Duration // smoothed; an estimate before the first answer over a relay
	Loss      float64       // share of packets lost each way, as far as checks tell
	// MTU is the size of the largest datagram that the path carries, in bytes of UDP
	// payload, over a relay without the relay's header; 0: not known.
	MTU int
	// Left says why this path, over a relay, is preferred to a direct one that works.
	Left Quality
}

// Activity is what the data plane saw of a peer: counts of packets sent to it
// and authenticated packets received from it since the program started.
// Lost counts those sent of which the peer says that they did not arrive, as far
// as it says anything.
type Activity struct {
	Sent, Received, Lost uint64
}

// Config tells an Agent what it needs. Send, Signal and the On functions are
// called without locks held; none of them may block.
type Config struct {
	PrivateKey [32]byte // X25519, the node's WireGuard key
	Mesh       [32]byte // trust hash; separates the keys of meshes
	Nonces     [2]Nonce // ours: current and previous; checks to either are ours
	// Boot is higher at every start of the node; 0: the time, in nanoseconds.
	// Peers refuse a lower one for 30 s, and one lower than two others for ever.
	Boot uint64

	// Send sends a datagram from a local socket and address: the port of from is 0
	// for the node's UDP port, or names one of OpenSockets; a zero address means that
	// the system chooses. ttl 0 means the default.
	Send func(b []byte, to, from netip.AddrPort, ttl int) error
	// OpenSockets opens IPv4 sockets beside the node's UDP port, and CloseSockets
	// closes some of them; they are named by their local ports. Receive gets what
	// looks like STUN, and the paths that lead through them carry data. nil: there
	// are none, and peers of unpredictable NATs stay on relays.
	OpenSockets  func(count int) (ports []uint16, err error)
	CloseSockets func(ports []uint16)
	// Signal carries a sealed message to a peer through a relay or the server.
	// An error means that there is no way now; the agent goes on without.
	Signal func(to Key, sealed []byte) error
	// OnPath is called at every change of a peer's path, its local address or
	// Also, in order.
	OnPath func(Path)
	// OnMTU is called when the MTU of a peer's path changes, in order with OnPath. nil:
	// MTUs are not searched.
	OnMTU func(Path)
	// OnDoubt is called when the answer to a check over a relay is late, with the
	// relay's handle for that peer; at most once per second and handle.
	OnDoubt func(netip.AddrPort)
	// OnSessionLost is called when a peer says, under the integrity of a check,
	// that it has no session with us; at most once per second and peer.
	OnSessionLost func(Key)
	// OnCandidates is called when the own candidates changed, or a token came
	// where there was none.
	OnCandidates func([]Candidate)
	// OnRemapped is called when a NAT gave us another address or port than it
	// had, although nothing changed here: it was restarted, or is another one.
	OnRemapped func()
	// Activity reports a peer's counters; nil: always zero. It is called without
	// locks held.
	Activity func(Key) Activity
	// Forbidden says that an address must never be probed (mesh prefixes, the
	// server's address-and-port pairs). nil: only the built-in rules hold. It is
	// called with locks held and must not call the agent.
	Forbidden func(netip.AddrPort) bool
	// OnMessage is told what a peer sent with SendMessage. nil: it is dropped.
	OnMessage func(Key, []byte)
	// Loopback allows addresses of this machine itself, for two programs on it.
	Loopback bool

	// Datagram is the size of the largest datagram that the data plane sends on a path
	// whose MTU is not known; 0: 1432, WireGuard's for an interface MTU of 1400.
	Datagram int

	Log *slog.Logger // nil: silent
}
