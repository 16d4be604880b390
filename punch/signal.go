package punch

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// MaxSignal bounds a sealed signal in bytes.
const MaxSignal = 1200

const (
	signalVersion = 1
	signalHeader  = 2 + 8 + 8 + 16
)

type signalKind uint8

const (
	// signalCall: openers are out; answer, and send checks.
	signalCall signalKind = iota + 1
	// signalOpened: the answer to a call: openers are out here, too.
	signalOpened
	// signalPropose, signalAgree and signalGo begin a hard round: who proposes, the
	// other side when it is ready, and who proposed when it is ready, too.
	signalPropose
	signalAgree
	signalGo

	// signalFresh tells of a fresh socket; signalMeet is the answer: ours, which is
	// open for it.
	signalFresh signalKind = 10
	signalMeet  signalKind = 11

	// signalMessage carries a message of the programs above; see SendMessage.
	signalMessage signalKind = 20
)

// fresh reports whether signals of the kind are about fresh sockets.
func (k signalKind) fresh() bool { return k == signalFresh || k == signalMeet }

// hard reports whether signals of the kind describe the sender's NAT.
func (k signalKind) hard() bool { return k >= signalPropose && k <= signalGo }

var (
	errSignalSize   = errors.New("signal of wrong size")
	errSignalOpen   = errors.New("signal not sealed by this peer")
	errSignalStale  = errors.New("signal is stale")
	errSignalFormat = errors.New("malformed signal")
	errUnknownPeer  = errors.New("unknown peer")
)

// signal is what peers say to each other through a relay or the server. Sealed
// it is a random 24-byte nonce followed by XChaCha20-Poly1305 of
//
//	 0               1               2
//	+---------------+---------------+-------------------------------+
//	| version = 1   | kind          | boot id (8)                   |
//	+---------------+---------------+-------------------------------+
//	| counter (8)                   | nonce of the sender (16)      |
//	+---------------+---------------+-------------------------------+
//	| n <= 16       | n candidates: where the sender may be reached |
//	+---------------+-----------------------------------------------+
//	| m <= 16       | m addresses of the receiver that the sender's |
//	|               | NAT is open towards, coded as candidates      |
//	+---------------+---------------+-------------------------------+
//	| only of kind 20: its length   | message                       |
//	+-------------------------------+-------------------------------+
//
// A candidate is one byte (family 4 or 6 in the high half, type in the low
// half), 4 or 16 bytes of address, 2 bytes of port. Signals about a hard round go
// on with a description of the sender's NAT (side), those about a fresh socket with
// one that has its address. Bytes after all of it are for
// later versions and are ignored.
type signal struct {
	kind       signalKind
	boot       uint64
	counter    uint64
	nonce      Nonce
	candidates []Candidate
	opened     []netip.AddrPort
	hard       side // of signals about a hard round, or a fresh socket
	message    []byte
}

func (s *signal) marshal() []byte {
	b := []byte{signalVersion, byte(s.kind)}
	b = binary.BigEndian.AppendUint64(b, s.boot)
	b = binary.BigEndian.AppendUint64(b, s.counter)
	b = append(b, s.nonce[:]...)
	b = append(b, byte(len(s.candidates)))
	for _, c := range s.candidates {
		b = appendAddress(b, c.Addr, c.Type)
	}
	b = append(b, byte(len(s.opened)))
	for _, addr := range s.opened {
		b = appendAddress(b, addr, 0)
	}
	if s.kind.hard() || s.kind.fresh() {
		b = s.hard.append(b)
	}
	if s.kind == signalMessage {
		b = binary.BigEndian.AppendUint16(b, uint16(len(s.message)))
		b = append(b, s.message...)
	}
	return b
}

func appendAddress(b []byte, addr netip.AddrPort, typ CandidateType) []byte {
	family := byte(4)
	if addr.Addr().Is6() {
		family = 6
	}
	b = append(b, family<<4|byte(typ))
	b = append(b, addr.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, addr.Port())
}

func parseSignal(b []byte) (*signal, error) {
	if len(b) < signalHeader || b[0] != signalVersion {
		return nil, errSignalFormat
	}
	s := &signal{
		kind:    signalKind(b[1]),
		boot:    binary.BigEndian.Uint64(b[2:]),
		counter: binary.BigEndian.Uint64(b[10:]),
		nonce:   Nonce(b[18:signalHeader]),
	}
	candidates, b, err := cutAddresses(b[signalHeader:])
	if err != nil {
		return nil, err
	}
	for _, c := range candidates {
		if c.Type != Host && c.Type != ServerReflexive && c.Type != PortMapped {
			return nil, errSignalFormat
		}
	}
	s.candidates = candidates
	opened, b, err := cutAddresses(b)
	if err != nil {
		return nil, err
	}
	for _, c := range opened {
		s.opened = append(s.opened, c.Addr)
	}
	switch {
	case s.kind.hard(), s.kind.fresh():
		s.hard, err = parseSide(b)
	case s.kind == signalMessage:
		s.message, err = cutMessage(b)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

func cutMessage(b []byte) ([]byte, error) {
	if len(b) < 2 {
		return nil, errSignalFormat
	}
	size := int(binary.BigEndian.Uint16(b))
	if size == 0 || size > MaxMessage || len(b) < 2+size {
		return nil, errSignalFormat
	}
	return b[2 : 2+size], nil
}

// cutAddresses reads a list and returns what follows it.
func cutAddresses(b []byte) (list []Candidate, rest []byte, err error) {
	if len(b) < 1 || b[0] > MaxCandidates {
		return nil, nil, errSignalFormat
	}
	count := b[0]
	b = b[1:]
	for range count {
		if len(b) < 1 {
			return nil, nil, errSignalFormat
		}
		size := 4
		switch b[0] >> 4 {
		case 4:
		case 6:
			size = 16
		default:
			return nil, nil, errSignalFormat
		}
		if len(b) < 1+size+2 {
			return nil, nil, errSignalFormat
		}
		ip, _ := netip.AddrFromSlice(b[1 : 1+size])
		port := binary.BigEndian.Uint16(b[1+size:])
		list = append(list, Candidate{
			Addr: plain(netip.AddrPortFrom(ip, port)),
			Type: CandidateType(b[0] & 0x0f),
		})
		b = b[1+size+2:]
	}
	return list, b, nil
}

func (s *secrets) seal(plaintext []byte) []byte {
	nonce := make([]byte, chacha20poly1305.NonceSizeX, MaxSignal)
	rand.Read(nonce)
	return s.out.Seal(nonce, nonce, plaintext, nil)
}

func (s *secrets) open(sealed []byte) ([]byte, error) {
	if len(sealed) < chacha20poly1305.NonceSizeX || len(sealed) > MaxSignal {
		return nil, errSignalSize
	}
	nonce, box := sealed[:chacha20poly1305.NonceSizeX], sealed[chacha20poly1305.NonceSizeX:]
	b, err := s.in.Open(nil, nonce, box, nil)
	if err != nil {
		return nil, errSignalOpen
	}
	return b, nil
}

// HandleSignal takes a sealed message that came from a peer through a relay or
// the server. It reports what is wrong with a message that was dropped. Safe for
// concurrent use.
func (a *Agent) HandleSignal(from Key, sealed []byte) error {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[from]
	if p == nil {
		return fmt.Errorf("handle signal: %w", errUnknownPeer)
	}
	b, err := p.secrets.open(sealed)
	if err != nil {
		return fmt.Errorf("handle signal: %w", err)
	}
	s, err := parseSignal(b)
	if err != nil {
		return fmt.Errorf("handle signal: %w", err)
	}
	fresh, restarted := p.signals.inOrder(s.boot, s.counter, now)
	if !fresh {
		return fmt.Errorf("handle signal: %w", errSignalStale)
	}
	if restarted {
		p.wantProbe = true
	}
	a.handleSignal(p, s, now)
	a.schedule(p, now)
	return nil
}

func (a *Agent) handleSignal(p *peer, s *signal, now time.Time) {
	p.setNonce(s.nonce)
	if a.setCandidates(p, s.candidates, signalled) {
		p.wantOpen = true
	}
	a.log.Debug("signal received", "peer", p, "kind", s.kind, "candidates", len(s.candidates))
	p.openTo, p.openAt = s.opened, now
	p.recall = recall{}
	p.search.Answered = true
	p.talked.Heard++
	p.talked.LastHeard = now
	p.meeting.follow(s.candidates)
	a.release(p, now)
	if s.kind == signalMessage {
		a.receiveMessage(p, s.message)
	}
	if s.kind == signalCall {
		p.wantAnswer = true
		p.wantProbe = true
		p.uncertain = true
	}
	if s.kind.hard() {
		a.hardSignal(p, s, now)
	}
	if s.kind.fresh() {
		a.freshSignal(p, s, now)
	}
}
