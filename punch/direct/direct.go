// Package direct connects two programs behind NATs: over UDP as a net.PacketConn
// or net.Conn, over TCP as a net.Conn. It is package punch on sockets of its own.
//
// Both programs need three things: each other's X25519 public key (or one
// secret between them, see SecretKey), the address of a STUN server, and any way
// to pass short messages to each other before they are connected: a chat, a
// mailbox, a web server that both can reach. Those messages are sealed, so
// whoever carries them can lose them but neither read nor forge them.
//
//	conn, err := direct.Dial(ctx, direct.Config{
//		PrivateKey: mine,
//		Servers:    []netip.AddrPort{stun},
//		Send:       func(s direct.Signal) error { return post(s.Peer, s.Body) },
//		Signals:    inbox,
//	}, theirs)
//
// # What it does not do
//
// THE DATA IS NOT ENCRYPTED AND NOT AUTHENTICATED. Only the finding of the path
// is: over UDP the checks, over TCP the handshake at the beginning. Whoever is on
// the path reads and changes what you send, and over UDP whoever can forge a
// source address can insert datagrams. Run QUIC, DTLS or WireGuard over the
// PacketConn, TLS over the TCP connection.
//
// There is no relay either: two programs whose networks let no direct path
// through do not get one, and Dial waits until its context ends.
//
// # Datagrams
//
// A UDP connection is what UDP always is: datagrams may be lost, doubled,
// reordered; those written while there is no path are lost. Keep them at 1200
// bytes or below: that passes everywhere, and what is longer than the path's MTU
// may vanish without an error. A datagram that looks like STUN, first byte below
// 4 and 0x2112A442 in bytes 4 to 7, cannot be sent; neither QUIC, DTLS, RTP nor
// WireGuard have such (RFC 7983).
package direct

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"overlay/punch"
)

// Bounds of a PacketConn.
const (
	// MaxDatagram is the longest datagram that can be sent or received, in bytes.
	MaxDatagram = 65507
	// maxWaiting is how many datagrams wait to be read; further ones are lost.
	maxWaiting = 256
	// lookEvery is how often the own addresses are listed.
	lookEvery = 5 * time.Second
)

var (
	errUnknown = errors.New("no such peer: add it with Connect")
	errSTUN    = errors.New("the datagram looks like STUN")
	errSize    = errors.New("the datagram is too long")
	errSend    = errors.New("no Send function")
)

// Signal is a short message on its way from one program to the other.
type Signal struct {
	// Peer is to whom it goes, or from whom it came; zero: from the only peer.
	Peer punch.Key
	Body []byte // at most punch.MaxSignal bytes
}

// Config is what both programs tell the package. PrivateKey and Send are needed.
type Config struct {
	// PrivateKey is an X25519 key: NewKey or SecretKey makes one.
	PrivateKey [32]byte
	// Group separates programs that use the same keys; both sides have the same.
	Group [32]byte
	// Address is where to listen; zero: everywhere, on a port that the system
	// chooses. Of a loopback address only peers on this machine are reached.
	Address netip.AddrPort
	// Servers are STUN servers. Without one only peers of the same network are
	// reached, and those that have public addresses.
	Servers []netip.AddrPort
	// Send carries a signal to the other program. It must not block for long: Close
	// waits for it. An error means that there is no way now.
	Send func(Signal) error
	// Signals are what came from other programs. The sender of each is named by
	// whoever carries it; a wrong name does no harm.
	Signals <-chan Signal
	// Log gets what happens, at Debug; nil: silent.
	Log *slog.Logger
}

// Addr names a peer of a PacketConn, wherever it is now.
type Addr struct{ Key punch.Key }

// Network implements net.Addr.
func (Addr) Network() string { return "punch" }

// String implements net.Addr: the key in hexadecimal.
func (a Addr) String() string { return hex.EncodeToString(a.Key[:]) }

// NewKey makes a private key and gives its public key.
func NewKey() (private [32]byte, public punch.Key) {
	rand.Read(private[:])
	public, err := punch.PublicKey(private)
	if err != nil {
		panic(fmt.Sprintf("make key: %v", err)) // any 32 bytes are a key
	}
	return private, public
}

// SecretKey makes the private key of one of several programs that share a secret
// of at least 128 bits. Each of them can make the keys of all, and so the public
// keys it needs, with punch.PublicKey.
func SecretKey(secret []byte, name string) [32]byte {
	key, err := hkdf.Key(sha256.New, secret, nil, "overlay/v1/direct-key"+name, 32)
	if err != nil {
		panic(fmt.Sprintf("derive key: %v", err)) // only a bad length fails
	}
	return [32]byte(key)
}

// nonceOf is by which checks find a program until its first signal tells
// another one.
func nonceOf(group [32]byte, k punch.Key) punch.Nonce {
	sum := sha256.Sum256(append(append([]byte("overlay/v1/direct-nonce"), group[:]...), k[:]...))
	return punch.Nonce(sum[:])
}

// localAddrs lists the addresses where a socket that is bound to own is reached.
func localAddrs(own netip.Addr) ([]netip.Prefix, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	var list []netip.Prefix
	for _, a := range all {
		prefix, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		switch {
		case own.IsUnspecified() && prefix.Addr().IsLoopback():
		case own.IsUnspecified(), own == prefix.Addr():
			list = append(list, prefix)
		}
	}
	if len(list) == 0 && !own.IsUnspecified() { // as 127.0.0.2, which no interface has
		list = append(list, netip.PrefixFrom(own, own.BitLen()))
	}
	return list, nil
}
