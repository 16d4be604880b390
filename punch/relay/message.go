package relay

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"net/netip"

	"overlay/punch"
)

// kind is the type of a control message.
type kind uint8

const (
	kindHello kind = iota + 1
	kindChallenge
	kindPong
	kindAdmit
	kindRefused
	kindOpen
	kindOpened
	kindBye
)

const (
	version   = 1
	trialFlag = 1 // of HELLO and ADMIT

	maxOpen = 28 // peers of one OPEN

	maxCredentialsUDP = MaxAdmission - admitFixed
	maxAdmissionTLS   = admitFixed + MaxCredentials

	headSize      = 4
	sequenceSize  = 16
	cookieSize    = 16
	keySize       = 32
	observedSize  = 1 + 16 + 2
	bitmapSize    = 4
	helloSize     = headSize + 8 + sequenceSize + cookieSize + macSize
	challengeSize = headSize + sequenceSize + cookieSize
	pongSize      = headSize + sequenceSize + observedSize + macSize
	refusedSize   = headSize + sequenceSize + macSize
	openFixed     = headSize + 8 + sequenceSize + macSize
	openedSize    = headSize + sequenceSize + bitmapSize + macSize
	credentialsAt = headSize + 8 + sequenceSize + cookieSize + keySize
	admitFixed    = credentialsAt + 2 + ed25519.SignatureSize + macSize
)

// Reasons of REFUSED.
const (
	refusedStranger = 1 // not a member
	refusedFull     = 2 // no room
)

// sequence numbers a node's messages: every start of the node and every message
// has a higher one. Compared as bytes. Answers repeat it.
//
//	 0        8         16
//	+--------+---------+
//	|  boot  | counter |
//	+--------+---------+
type sequence [sequenceSize]byte

func newSequence(boot, counter uint64) (s sequence) {
	binary.BigEndian.PutUint64(s[:], boot)
	binary.BigEndian.PutUint64(s[8:], counter)
	return s
}

// after reports whether s is higher than o.
func (s sequence) after(o sequence) bool { return bytes.Compare(s[:], o[:]) > 0 }

// cookie shows that a node receives what is sent to its address. Over TLS it is
// bound to the connection instead. The zero cookie is none.
type cookie [cookieSize]byte

// Every control message begins with a head. All numbers are big endian; a MAC is
// the first 16 bytes of HMAC-SHA256 under the session's key over all before it.
//
//	 0        1        2         3         4
//	+--------+--------+---------+---------+
//	|  0xA0  |  type  | version |  flags  |  OPEN, OPENED: count · REFUSED: reason
//	+--------+--------+---------+---------+
func appendHead(b []byte, k kind, flags uint8) []byte {
	return append(b, ControlByte, byte(k), version, flags)
}

// kindOf is the type of a control message, 0 when it is not one of this version.
func kindOf(b []byte) kind {
	if len(b) < headSize || b[0] != ControlByte || b[2] != version {
		return 0
	}
	return kind(b[1])
}

// shaped reports whether a message is of a type and of a size.
func shaped(b []byte, k kind, size int) bool { return len(b) == size && kindOf(b) == k }

// hello asks for a pong and keeps the node known to the relay.
//
//	 0      4         12         28       44    60
//	+------+---------+----------+--------+-----+
//	| head | session | sequence | cookie | MAC |  flags: 1 trial
//	+------+---------+----------+--------+-----+
//
// A trial does not make this transport the one the relay sends to.
type hello struct {
	trial  bool
	id     sessionID
	seq    sequence
	cookie cookie
}

func (h *hello) build(s *session) []byte {
	b := appendHead(make([]byte, 0, helloSize), kindHello, flagIf(h.trial))
	b = append(b, s.id[:]...)
	b = append(b, h.seq[:]...)
	b = append(b, h.cookie[:]...)
	return s.seal(b)
}

// parseHello reads what session.sealed has yet to prove.
func parseHello(b []byte) (h hello, ok bool) {
	if !shaped(b, kindHello, helloSize) || b[3]&^trialFlag != 0 {
		return h, false
	}
	h.trial = b[3] == trialFlag
	b = b[headSize:]
	b = b[copy(h.id[:], b):]
	b = b[copy(h.seq[:], b):]
	copy(h.cookie[:], b)
	return h, true
}

func flagIf(trial bool) uint8 {
	if trial {
		return trialFlag
	}
	return 0
}

// challenge answers a HELLO of a node that is not known, or not at this address.
//
//	 0      4          20       36
//	+------+----------+--------+
//	| head | sequence | cookie |
//	+------+----------+--------+
type challenge struct {
	seq    sequence
	cookie cookie
}

func (c *challenge) build() []byte {
	b := appendHead(make([]byte, 0, challengeSize), kindChallenge, 0)
	b = append(b, c.seq[:]...)
	return append(b, c.cookie[:]...)
}

func parseChallenge(b []byte) (c challenge, ok bool) {
	if !shaped(b, kindChallenge, challengeSize) || b[3] != 0 {
		return c, false
	}
	b = b[headSize:]
	b = b[copy(c.seq[:], b):]
	copy(c.cookie[:], b)
	return c, true
}

// pong answers HELLO and ADMIT: the node is known here.
//
//	 0      4          20       21        37     39    55
//	+------+----------+--------+---------+------+-----+
//	| head | sequence | family | address | port | MAC |  family: 4, 6, 0 over TLS
//	+------+----------+--------+---------+------+-----+
//
// An IPv4 address is written as IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2).
type pong struct {
	seq      sequence
	observed netip.AddrPort // where the message came from; zero over TLS
}

func (p *pong) build(s *session) []byte {
	b := appendHead(make([]byte, 0, pongSize), kindPong, 0)
	b = append(b, p.seq[:]...)
	if p.observed.IsValid() {
		ip := p.observed.Addr().As16()
		b = append(append(b, familyOf(p.observed.Addr())), ip[:]...)
		b = binary.BigEndian.AppendUint16(b, p.observed.Port())
	} else {
		b = append(b, make([]byte, observedSize)...)
	}
	return s.seal(b)
}

func familyOf(a netip.Addr) byte {
	if a.Unmap().Is4() {
		return 4
	}
	return 6
}

// parsePong reads what session.sealed has yet to prove.
func parsePong(b []byte) (p pong, ok bool) {
	if !shaped(b, kindPong, pongSize) || b[3] != 0 {
		return p, false
	}
	b = b[headSize:]
	b = b[copy(p.seq[:], b):]
	family, port := b[0], binary.BigEndian.Uint16(b[17:])
	addr := netip.AddrFrom16([16]byte(b[1:17])).Unmap()
	if family == 0 {
		return p, port == 0 && addr == netip.IPv6Unspecified()
	}
	p.observed = netip.AddrPortFrom(addr, port)
	return p, family == familyOf(addr)
}

// refused answers an ADMIT that the relay understood and does not follow.
//
//	 0      4          20    36
//	+------+----------+-----+
//	| head | sequence | MAC |  flags: the reason
//	+------+----------+-----+
type refused struct {
	reason uint8
	seq    sequence
}

func (r *refused) build(s *session) []byte {
	b := appendHead(make([]byte, 0, refusedSize), kindRefused, r.reason)
	return s.seal(append(b, r.seq[:]...))
}

// parseRefused reads what session.sealed has yet to prove.
func parseRefused(b []byte) (r refused, ok bool) {
	if !shaped(b, kindRefused, refusedSize) {
		return r, false
	}
	r.reason = b[3]
	copy(r.seq[:], b[headSize:])
	return r, true
}

// open asks for the flows with some peers.
//
//	 0      4         12         28          28+32n   44+32n
//	+------+---------+----------+-----------+-----+
//	| head | session | sequence | n times W | MAC |  count: n, 1 to 28
//	+------+---------+----------+-----------+-----+
type open struct {
	id    sessionID
	seq   sequence
	peers []punch.Key
}

func (o *open) build(s *session) []byte {
	b := appendHead(make([]byte, 0, openFixed+keySize*len(o.peers)), kindOpen, uint8(len(o.peers)))
	b = append(b, s.id[:]...)
	b = append(b, o.seq[:]...)
	for _, k := range o.peers {
		b = append(b, k[:]...)
	}
	return s.seal(b)
}

// parseOpen reads what session.sealed has yet to prove.
func parseOpen(b []byte) (o open, ok bool) {
	if kindOf(b) != kindOpen || b[3] == 0 || b[3] > maxOpen || len(b) != openFixed+keySize*int(b[3]) {
		return o, false
	}
	o.peers = make([]punch.Key, b[3])
	b = b[headSize:]
	b = b[copy(o.id[:], b):]
	b = b[copy(o.seq[:], b):]
	for i := range o.peers {
		b = b[copy(o.peers[i][:], b):]
	}
	return o, true
}

// opened answers OPEN.
//
//	 0      4          20       24    40
//	+------+----------+--------+-----+
//	| head | sequence | bitmap | MAC |  count as in OPEN
//	+------+----------+--------+-----+
//
// Bit i, from the least significant, says that peer i of the OPEN is admitted
// here and the flow with it is open.
type opened struct {
	seq    sequence
	count  int
	bitmap uint32
}

func (o *opened) build(s *session) []byte {
	b := appendHead(make([]byte, 0, openedSize), kindOpened, uint8(o.count))
	b = append(b, o.seq[:]...)
	return s.seal(binary.BigEndian.AppendUint32(b, o.bitmap))
}

// parseOpened reads what session.sealed has yet to prove.
func parseOpened(b []byte) (o opened, ok bool) {
	if !shaped(b, kindOpened, openedSize) || b[3] == 0 || b[3] > maxOpen {
		return o, false
	}
	o.count = int(b[3])
	b = b[headSize:]
	b = b[copy(o.seq[:], b):]
	o.bitmap = binary.BigEndian.Uint32(b)
	return o, o.bitmap>>o.count == 0
}

// admission makes a node known to the relay. It travels in one datagram of at most
// MaxAdmission bytes, or over TLS, where the credentials may be longer.
//
//	 0      4         12         28       44  76       78            78+n        142+n 158+n
//	+------+---------+----------+--------+---+--------+-------------+-----------+-----+
//	| head | session | sequence | cookie | W | length | credentials | signature | MAC |
//	+------+---------+----------+--------+---+--------+-------------+-----------+-----+
//
// The signature is by the device key the credentials name (Ed25519), over
// "overlay/v1/relay-admit", a zero byte, the relay's key and all before the
// signature. The flags are those of HELLO.
type admission struct {
	hello
	node        punch.Key
	credentials []byte
	signature   []byte
	signed      []byte // all before the signature
}

const admitPurpose = "overlay/v1/relay-admit\x00"

var errCredentials = errors.New("credentials are too long")

func (a *admission) build(s *session, relay [32]byte, device ed25519.PrivateKey) ([]byte, error) {
	if len(a.credentials) > MaxCredentials {
		return nil, errCredentials
	}
	b := appendHead(make([]byte, 0, admitFixed+len(a.credentials)), kindAdmit, flagIf(a.trial))
	b = append(b, s.id[:]...)
	b = append(b, a.seq[:]...)
	b = append(b, a.cookie[:]...)
	b = append(b, a.node[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(a.credentials)))
	b = append(b, a.credentials...)
	return s.seal(append(b, ed25519.Sign(device, admitText(relay, b))...)), nil
}

// parseAdmit reads what session.sealed, the signature and the credentials have
// yet to prove, of at most limit bytes. The slices of the result are parts of b.
func parseAdmit(b []byte, limit int) (a admission, ok bool) {
	if len(b) < admitFixed || len(b) > limit || kindOf(b) != kindAdmit || b[3]&^trialFlag != 0 {
		return a, false
	}
	n := int(binary.BigEndian.Uint16(b[credentialsAt:]))
	if len(b) != admitFixed+n {
		return a, false
	}
	a.trial = b[3] == trialFlag
	end := credentialsAt + 2 + n
	a.credentials, a.signed = b[credentialsAt+2:end], b[:end]
	a.signature = b[end : end+ed25519.SignatureSize]
	b = b[headSize:]
	b = b[copy(a.id[:], b):]
	b = b[copy(a.seq[:], b):]
	b = b[copy(a.cookie[:], b):]
	copy(a.node[:], b)
	return a, true
}

// by reports whether a device signed the admission to a relay.
func (a *admission) by(device, relay [32]byte) bool {
	return ed25519.Verify(device[:], admitText(relay, a.signed), a.signature)
}

func admitText(relay [32]byte, signed []byte) []byte {
	b := make([]byte, 0, len(admitPurpose)+len(relay)+len(signed))
	b = append(append(b, admitPurpose...), relay[:]...)
	return append(b, signed...)
}
