package punch

import (
	"bytes"
	"crypto/ecdh"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

// What programs need that use an Agent over sockets of their own, beside
// WireGuard or without it: see package direct.

// MaxMessage bounds what SendMessage takes, in bytes.
const MaxMessage = 400

var (
	errMessage = errors.New("message of wrong size")
	errTalk    = errors.New("too many signals to this peer")
)

// PublicKey gives the public key of an X25519 private key. The error is a
// private key that is none.
func PublicKey(private [32]byte) (Key, error) {
	k, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		return Key{}, fmt.Errorf("read private key: %w", err)
	}
	return Key(k.PublicKey().Bytes()), nil
}

// SharedKey derives 32 bytes that only two peers have: the owner of private and
// of the public key peer get the same from the same mesh and purpose. Purposes
// begin with the name of the program, and separate uses from each other.
func SharedKey(private, mesh [32]byte, peer Key, purpose string) ([]byte, error) {
	own, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	root, low, high, err := agree(own, peer)
	if err != nil {
		return nil, err
	}
	return expand(root, mesh, purpose, low, high)
}

// PeerAt tells which peer an address belongs to: an authenticated message of that
// peer came from there. Safe for concurrent use.
func (a *Agent) PeerAt(addr netip.AddrPort) (Key, bool) {
	addr = plain(addr)
	a.mu.Lock()
	defer a.mu.Unlock()
	for k, p := range a.peers {
		if slices.ContainsFunc(p.pairs, func(q *pair) bool { return q.addr == addr && !q.heard.IsZero() }) {
			return k, true
		}
	}
	return Key{}, false
}

// MayProbe reports whether packets may be sent to an address that a peer named:
// it is a unicast address of another host, and Config.Forbidden agrees. Safe for
// concurrent use.
func (a *Agent) MayProbe(addr netip.AddrPort) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.allowed(plain(addr))
}

// SendMessage carries up to MaxMessage bytes to a peer as signals travel, sealed
// and in order, to its Config.OnMessage. It may be lost. The error is an unknown
// peer, a bad size, or that there were too many signals in the last second. Safe
// for concurrent use.
func (a *Agent) SendMessage(k Key, message []byte) error {
	if len(message) == 0 || len(message) > MaxMessage {
		return fmt.Errorf("send message of %d bytes: %w", len(message), errMessage)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	p, now := a.peers[k], time.Now()
	if p == nil {
		return fmt.Errorf("send message: %w", errUnknownPeer)
	}
	if !p.talk.ready(now, signalRate) {
		return fmt.Errorf("send message: %w", errTalk)
	}
	p.message = bytes.Clone(message)
	a.signal(p, signalMessage, now)
	p.message = nil
	a.notify()
	return nil
}

// receiveMessage hands on what a peer sent with SendMessage.
func (a *Agent) receiveMessage(p *peer, message []byte) {
	if a.cfg.OnMessage == nil {
		return
	}
	a.effects = append(a.effects, func() { a.cfg.OnMessage(p.key, message) })
	a.notify()
}

// probeable is the function of that name, but for the agent's own machine.
func (a *Agent) probeable(addr netip.AddrPort) bool {
	if a.cfg.Loopback && addr.Addr().IsLoopback() {
		return addr.Port() != 0
	}
	return probeable(addr)
}

// BindingRequest gives a plain Binding request (RFC 8489), for a server that is
// asked over TCP or from another socket, and what MappedAddress knows its answer
// by.
func BindingRequest() (id [12]byte, request []byte, err error) {
	m, err := stun.Build(stun.TransactionID, stun.BindingRequest)
	if err != nil {
		return id, nil, fmt.Errorf("build request: %w", err)
	}
	return m.TransactionID, m.Raw, nil
}

// MappedAddress reads the answer to a BindingRequest: where the server saw it
// come from.
func MappedAddress(id [12]byte, answer []byte) (netip.AddrPort, error) {
	m, err := decode(answer)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if m.Type != stun.BindingSuccess || m.TransactionID != id {
		return netip.AddrPort{}, errShape
	}
	return mappedOf(m)
}
