// Package relay forwards datagrams between nodes that cannot reach each other.
//
// A Server forwards what two admitted nodes send each other in a flow; it sees
// ciphertext only and changes nothing. A Client keeps a node's link to one
// server: over UDP from the port the node has anyway, or over TLS where UDP does
// not pass. Both speak the messages drawn in wire.go and message.go.
package relay

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"overlay/punch"
)

// First bytes of datagrams.
const (
	FlowByte    = 0x90 // forwarded from node to node: a Header, then what the nodes agreed on
	ControlByte = 0xA0 // between node and relay
	SignalByte  = 0xB0 // behind a Header: a sealed signal of package punch
)

// Bounds of what is sent, in bytes.
const (
	// MaxFrame is the longest datagram a relay takes, its header included: the
	// largest UDP payload with jumbo frames.
	MaxFrame = 9216 + 64
	// MaxAdmission is the longest ADMIT over UDP, credentials included: one
	// datagram on any path.
	MaxAdmission = 1000
	// MaxCredentials is how long credentials may be over TLS.
	MaxCredentials = 2 << 10
)

// Header names the flow between two nodes and begins each of its datagrams. It
// is the same for all of them, in both directions, so that a train of them
// is forwarded as it came.
//
//	 0               1                                               8
//	+---------------+-----------------------------------------------+----
//	|     0x90      |  7 bytes of SHA-256(purpose, low W, high W)   | payload
//	+---------------+-----------------------------------------------+----
//
// The zero Header names no flow.
type Header [headerSize]byte

const (
	headerSize  = 8
	flowPurpose = "overlay/v1/relay-flow"
)

// FlowOf gives the header of the flow between two nodes, in either order.
func FlowOf(a, b punch.Key) Header {
	if bytes.Compare(a[:], b[:]) > 0 {
		a, b = b, a
	}
	var text [len(flowPurpose) + 2*len(a)]byte
	copy(text[:], flowPurpose)
	copy(text[len(flowPurpose):], a[:])
	copy(text[len(flowPurpose)+len(a):], b[:])
	sum := sha256.Sum256(text[:])
	h := Header{FlowByte}
	copy(h[1:], sum[:])
	return h
}

// number is the header as the key of a table.
func (h Header) number() uint64 { return binary.BigEndian.Uint64(h[:]) }

// Over TLS every datagram travels as a frame.
//
//	 0        2
//	+--------+----------------------------+
//	| length | flow or control datagram   |
//	+--------+----------------------------+
const framePrefix = 2

// appendFrame appends a datagram of at most MaxFrame bytes as a frame.
func appendFrame(b, datagram []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(datagram)))
	return append(b, datagram...)
}

// cutFrame takes the first datagram off a run of frames. It says false when the
// first frame is not whole, is empty or is longer than MaxFrame.
func cutFrame(run []byte) (datagram, rest []byte, ok bool) {
	if len(run) < framePrefix {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(run))
	if n == 0 || n > MaxFrame || len(run) < framePrefix+n {
		return nil, nil, false
	}
	return run[framePrefix : framePrefix+n], run[framePrefix+n:], true
}

// sessionID finds a node at a relay.
type sessionID [8]byte

// session is what a node and a relay share: both derive it from their X25519
// keys, once for all times.
//
//	HKDF-SHA256(X25519(w, r), no salt, "overlay/v1/relay" || W || R):
//	 0                              32        40
//	+------------------------------+---------+
//	|           MAC key            | session |
//	+------------------------------+---------+
type session struct {
	mac [32]byte
	id  sessionID
}

const sessionPurpose = "overlay/v1/relay"

// nodeSession derives the session of the node that holds private with a relay.
func nodeSession(private *ecdh.PrivateKey, relay [32]byte) (session, error) {
	return deriveSession(private, relay, private.PublicKey().Bytes(), relay[:])
}

// relaySession derives the session of a node with the relay that holds private.
func relaySession(private *ecdh.PrivateKey, node punch.Key) (session, error) {
	return deriveSession(private, node, node[:], private.PublicKey().Bytes())
}

func deriveSession(private *ecdh.PrivateKey, other [32]byte, node, relay []byte) (s session, err error) {
	public, err := ecdh.X25519().NewPublicKey(other[:])
	if err != nil {
		return s, fmt.Errorf("read public key: %w", err)
	}
	secret, err := private.ECDH(public)
	if err != nil {
		return s, fmt.Errorf("agree with public key: %w", err)
	}
	keys, err := hkdf.Key(sha256.New, secret, nil, sessionPurpose+string(node)+string(relay), len(s.mac)+len(s.id))
	if err != nil {
		return s, fmt.Errorf("derive session: %w", err)
	}
	copy(s.id[:], keys[copy(s.mac[:], keys):])
	return s, nil
}

const macSize = 16

// seal appends the MAC over a message to it.
func (s *session) seal(message []byte) []byte { return append(message, s.sum(message)...) }

// sealed reports whether a message ends with its MAC.
func (s *session) sealed(message []byte) bool {
	n := len(message) - macSize
	return n >= 0 && hmac.Equal(message[n:], s.sum(message[:n]))
}

func (s *session) sum(message []byte) []byte {
	h := hmac.New(sha256.New, s.mac[:])
	h.Write(message)
	return h.Sum(nil)[:macSize]
}
