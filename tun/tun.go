// Package tun is everything that touches the operating system and
// wireguard-go: the TUN device, the UDP sockets (Bind), the UAPI socket, peers
// and endpoints through wgctrl, addresses, routes and link events through
// netlink.
//
//	kernel route ─ TUN ─ wireguard-go seals ─ Bind.Send ─ UDP socket
//	UDP sockets ─ Bind ┬ STUN-shaped, or from a relay: Config.Receive, never wireguard-go
//	                   ├ flow header: taken off; the rest is as from a path of the peer
//	                   ├ fragment: put together, then as WireGuard
//	                   └ WireGuard: opens ─ TUN
//
// Peers that say so in their record (Large) get large messages: many packets in
// one container (container.go), which the Bind cuts into fragments that fit the
// path (fragment.go). To all others the format is WireGuard's own. A first byte
// of 0x80 to 0x8f is a fragment, 0x90 the header of a flow through a relay
// (ways.go), 0xa0 a message of a relay, 0xb0 a signal inside a flow; the others
// above 0x80 are reserved and dropped.
package tun

import (
	"log/slog"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Key is a WireGuard public key.
type Key = wgtypes.Key

// Config describes one interface. Name, PrivateKey and MTU are required.
type Config struct {
	Name       string
	PrivateKey wgtypes.Key
	Port       uint16 // UDP, both families; taken means an error
	MTU        int
	Addrs      []netip.Prefix // addresses of the interface
	Routes     []netip.Prefix // routed into the interface
	// Mesh are the overlay's prefixes. Endpoints inside them are handles: the
	// Bind drops what is sent there and calls Demand.
	Mesh []netip.Prefix
	// Offloads switches parts of the data path off: "-gso", "-gro", "-tso",
	// "-large", comma-separated; empty means all on. Without "-large" peers that
	// can take large messages get them.
	Offloads string
	// Processors lets the Device choose how many processors run Go code, from 1
	// to what GOMAXPROCS was at Open, by the load; Close puts that back. It is for
	// a process that has one Device and little else to do, since GOMAXPROCS is
	// the whole process's. Where the environment sets GOMAXPROCS, that stays.
	Processors bool

	// Receive gets every STUN-shaped datagram and every message of a relay (first
	// byte 0xa0), in the receiving goroutine, with the local address it arrived at
	// (zero: unknown) and, as its port, that of a spare socket, 0 for a main one.
	// What is STUN-shaped or a signal (0xb0) in a flow comes without the flow's
	// header, from the handle of SetWays. b is valid during the call. It must not
	// call back into the Device, but for Send, OpenSockets and CloseSockets. It may
	// be called by several goroutines at a time.
	Receive func(b []byte, from, at netip.AddrPort)
	// Demand is told when packets wait for a peer without a path, or are sent
	// to a peer after a second of silence. It must not block.
	Demand func(Key)
	// SessionUnknown is told that a peer should begin a session. That is, at most
	// once a second for each peer, when data of a session that is not known comes by
	// a path of a peer with whom there was no session since SetPeers brought it: this
	// side was restarted; anybody may have sent it. It is when the peer answers no
	// initiations on its path, and from ExpireSessions. For the call the same holds
	// as for Receive.
	SessionUnknown func(Key)

	Log *slog.Logger // nil: silent
}

// Capabilities are what a node takes beyond the plain WireGuard format, one bit
// each, as in its signed record. Unknown bits mean nothing.
type Capabilities uint32

// Large says that a node takes large messages: fragments, containers, partial
// checksums.
const Large Capabilities = 1 << 0

// Peer is a peer as the netmap wants it.
type Peer struct {
	Key        Key
	AllowedIPs []netip.Prefix // exactly the peer's overlay addresses
	Handle     netip.Addr     // the peer's overlay IPv6: base of its handles
	// Keepalive is the persistent keepalive while there is a path; without one
	// it would ask for handshakes that go nowhere, for ever.
	Keepalive time.Duration
	// Initiate says that this side starts handshakes; the other side's own
	// initiations are held back for a moment (see Bind).
	Initiate bool
	// Capabilities are those of the peer's record; 0 is a plain WireGuard peer.
	Capabilities Capabilities
}

// Stats is what wireguard-go counts for a peer.
type Stats struct {
	Endpoint      netip.AddrPort
	RxBytes       int64
	TxBytes       int64
	LastHandshake time.Time // zero: never
}
