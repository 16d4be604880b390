// Package punch finds and keeps the best path between two hosts behind NATs.
//
// It is protocol without I/O: bytes leave through Config.Send and arrive
// through Agent.Receive, so the same code runs over WireGuard's own socket, over
// a plain socket (package direct, which is the place to begin for a program that
// only wants a connection), and inside a simulated network with a fake clock
// (package nattest). Nothing here knows of the rest of the project.
//
// A NAT lets an answer in where a question went out, and drops the rest. So both
// hosts have to ask: each sends to where the other's NAT will send from, at
// about the same time, and each one's packet is the other's answer. That takes
// five steps.
//
// # 1. Discover
//
// A host knows its own addresses, but not the one that its NAT gives it. A STUN
// server (RFC 8489) answers a Binding request with the address it came from:
// the server-reflexive candidate. It is a property of the socket, so the request
// leaves from the very port that data will use. Several servers, or several
// ports of one, show whether the NAT gives each destination another port, and
// mappings expire, so they are asked for again. The addresses of the interfaces
// are candidates as well (SetLocal): two hosts of one LAN need no NAT at all.
// gather.go; the server's side is AnswerBinding in binding.go.
//
// # 2. Exchange
//
// Each host has to learn the other's candidates before any packet passes between
// them, so they travel over a third party: a server or a relay, whatever
// Config.Signal reaches. It need not be trusted: signals are sealed for
// the peer, and a replayed one is refused (signal.go, replay.go). If there is a
// relay for data, too, use it first (SetRelays): traffic starts at once, whether
// or not the rest succeeds, and moves over without loss when it does
// (relayed.go).
//
// # 3. Initiate
//
// The caller sends its signal and, at the same moment, openers: checks whose TTL
// is so low that they cross the own NAT and die before the other one. They make
// the own NAT expect the peer. Without them the first side's full packet arrives
// at a NAT that expects nothing yet; many a router then takes that for a
// connection to itself and gives the peer's own packet another port, and the two
// never meet. Therefore full checks wait until the peer said that it has opened,
// a second at most. Then they go out on every candidate pair, first quickly and
// then ever slower, because any of them may be lost (call.go). A check is a STUN
// request under a key that only the two peers have (check.go, keys.go).
//
// # 4. Respond
//
// Who is called sends openers, says so, and checks at once. An authenticated
// check that comes from an address nobody named is a candidate, too, the
// peer-reflexive one: this is how one side behind a NAT that gives every
// destination another port is reached. The first answered check makes a path.
// Whatever is not authentic gets no answer and leaves nothing behind
// (receive.go), and nobody can have us flood an address that does not answer
// (limit.go).
//
// # 5. Keep alive
//
// A NAT forgets: many after 30 seconds, so something is sent before that. A path
// can also die, or the peer leave and its address go to somebody else. Who sends
// on without asking then floods a stranger, so consent is checked (RFC 7675):
// every few seconds under traffic, and at once when data goes out and nothing
// comes back. A path that does not answer is left for another, or for a relay,
// and the search begins anew (path.go). One that loses much is left as well
// (quality.go), and the size of datagrams it carries is searched for (reach.go).
//
// # NATs that give every peer another port
//
// Between them calls fail, because the port that a server saw is not the one the
// peer will see. Both sides then sample how the NAT chooses (behavior.go) and agree
// to look for the ports together (hard.go). A router that can be asked for a port
// spares them that: see package portmap, and SetMapped.
package punch
