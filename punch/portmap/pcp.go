package portmap

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// The wire format of PCP (RFC 6887 sections 7 and 11.1). An ANNOUNCE is the
// header alone.
//
//	 0        1        2                 4        request                  8
//	+--------+--------+-----------------+----------------------------------+
//	| 2      | opcode | 0               | lifetime in seconds              |
//	+--------+--------+-----------------+----------------------------------+
//	| address of the client, IPv4 as ::ffff:a.b.c.d                        | 24
//	+-----------------------------------+----------------------------------+
//	| nonce (12)                                                           | 36
//	+--------+--------------------------+-----------------+----------------+
//	| 17 UDP | 0                        | port of ours    | external port  | 44
//	+--------+--------------------------+-----------------+----------------+
//	| external address                                                     | 60
//	+----------------------------------------------------------------------+
//
// In an answer the opcode has its high bit set, the fourth byte is the result, the
// epoch and twelve bytes of nothing stand where the client was, and the external
// address and port are those assigned. Options follow; none are used.
const (
	pcpVersion  = 2
	pcpAnswer   = 0x80 // in the opcode
	pcpAnnounce = 0
	pcpMap      = 1
	pcpHeader   = 24
	pcpMapSize  = 60
	maxPCP      = 1100
	pcpNonce    = 12
	protocolUDP = 17

	// Results (RFC 6887 section 7.4) that are told apart.
	pcpSuccess            = 0
	pcpUnsupportedVersion = 1
	pcpNotAuthorized      = 2
)

var (
	errVersion = errors.New("the router speaks another version")
	errFormat  = errors.New("malformed answer")
)

// pcp is PCP towards one router.
type pcp struct {
	route Route
	port  uint16
	nonce [pcpNonce]byte
	epoch epoch
}

// randomSecret is for programs that keep none.
func randomSecret() []byte {
	secret := make([]byte, 32)
	rand.Read(secret)
	return secret
}

// newPCP derives the nonce from the secret: it has to be the same after a crash,
// or the router refuses to renew (RFC 6887 section 11.3.2), and another one for
// every router, since each gets to know it.
func newPCP(r Route, port uint16, secret []byte) *pcp {
	h := sha256.New()
	fmt.Fprintf(h, "pcp nonce %d %v %v %d ", len(secret), r.Gateway.WithZone(""), r.Local, port)
	h.Write(secret)
	return &pcp{route: r, port: port, nonce: [pcpNonce]byte(h.Sum(nil))}
}

func (*pcp) name() string { return PCP }

// find sends an ANNOUNCE, which any server answers, if only to say that it does
// not know it.
func (p *pcp) find(ctx context.Context) error {
	answer, err := p.send(ctx, pcpAnnounce, pcpRequest(pcpAnnounce, p.route.Local, 0))
	if err == nil && answer.result == pcpUnsupportedVersion {
		return errVersion
	}
	return err
}

func (p *pcp) ask(ctx context.Context, w want) (grant, error) { return p.assign(ctx, w) }

// alive asks for the router's clock: as long as it goes on, so do the mappings.
func (p *pcp) alive(ctx context.Context, _ grant) (bool, error) {
	if p.epoch.lost() { // an earlier answer told
		return false, nil
	}
	if err := p.find(ctx); err != nil {
		return false, err
	}
	return !p.epoch.lost(), nil
}

// remove asks for a lifetime of nothing (RFC 6887 section 15). Where that is
// refused the mapping gets the shortest life there is: miniupnpd up to 2.3.1 forgets
// whose a pinhole of IPv6 is when it is asked for it a second time, also by a
// repeated request, and lets it be renewed then, but not removed.
func (p *pcp) remove(ctx context.Context, got grant) error {
	_, err := p.assign(ctx, want{port: p.port, external: got.external})
	if refused, ok := errors.AsType[*refusal](err); ok && refused.code == pcpNotAuthorized {
		left, again := p.assign(ctx, want{port: p.port, external: got.external, lifetime: time.Second})
		if again == nil {
			return fmt.Errorf("%w; it is gone in %v", err, left.lifetime)
		}
	}
	return err
}

// assign sends a MAP request.
func (p *pcp) assign(ctx context.Context, w want) (grant, error) {
	b := pcpRequest(pcpMap, p.route.Local, w.lifetime)
	b = append(b, p.nonce[:]...)
	b = append(b, protocolUDP, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, w.port)
	port, ip := w.external.Port(), w.external.Addr()
	if port == 0 {
		port = w.port
	}
	if !ip.IsValid() || ip.Is4() != p.route.Local.Is4() {
		ip = netip.IPv6Unspecified()
		if p.route.Local.Is4() {
			ip = netip.IPv4Unspecified()
		}
	}
	b = binary.BigEndian.AppendUint16(b, port)
	b = appendIP(b, ip)
	answer, err := p.send(ctx, pcpMap, b)
	if err != nil {
		return grant{}, err
	}
	if answer.result != pcpSuccess {
		return grant{}, &refusal{fmt.Errorf("the router refuses: %s", resultText(PCP, int(answer.result))), answer.result}
	}
	p.epoch.mapped()
	return grant{answer.external, answer.lifetime}, nil
}

// send gives the answer to a request, and notes the epoch in it.
func (p *pcp) send(ctx context.Context, opcode byte, request []byte) (pcpReply, error) {
	var got pcpReply
	var bad error
	err := exchange(ctx, p.route, request, func(b []byte) bool {
		reply, err := parsePCP(b)
		if errors.Is(err, errVersion) {
			bad = err
			return true
		}
		if err != nil || reply.opcode != opcode || opcode == pcpMap && !p.ours(reply) {
			return false
		}
		got = reply
		return true
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return pcpReply{}, err
	}
	p.epoch.note(got.epoch, time.Now())
	return got, nil
}

// ours reports whether an answer is to our request, and not to another program's
// or to one that somebody guessed.
func (p *pcp) ours(r pcpReply) bool {
	return r.nonce == p.nonce && r.protocol == protocolUDP && r.port == p.port
}

func pcpRequest(opcode byte, local netip.Addr, lifetime time.Duration) []byte {
	b := make([]byte, 0, pcpMapSize)
	b = append(b, pcpVersion, opcode, 0, 0)
	b = binary.BigEndian.AppendUint32(b, seconds(lifetime))
	return appendIP(b, local)
}

func appendIP(b []byte, ip netip.Addr) []byte {
	a := ip.As16()
	return append(b, a[:]...)
}

// pcpReply is an answer; what follows the epoch is of a MAP only.
type pcpReply struct {
	opcode   byte
	result   byte
	lifetime time.Duration
	epoch    uint32
	nonce    [pcpNonce]byte
	protocol byte
	port     uint16
	external netip.AddrPort
}

// parsePCP reads an answer; errVersion is one in the words of another version,
// for example of a router that knows NAT-PMP only (RFC 6887 section 9).
func parsePCP(b []byte) (pcpReply, error) {
	if len(b) >= 4 && b[0] != pcpVersion && b[1]&pcpAnswer != 0 {
		return pcpReply{}, errVersion
	}
	if len(b) < pcpHeader || len(b) > maxPCP || len(b)%4 != 0 || b[0] != pcpVersion || b[1]&pcpAnswer == 0 {
		return pcpReply{}, errFormat
	}
	r := pcpReply{
		opcode:   b[1] &^ pcpAnswer,
		result:   b[3],
		lifetime: duration(binary.BigEndian.Uint32(b[4:])),
		epoch:    binary.BigEndian.Uint32(b[8:]),
	}
	if r.opcode != pcpMap {
		return r, nil
	}
	if len(b) < pcpMapSize {
		return pcpReply{}, errFormat
	}
	r.nonce = [pcpNonce]byte(b[24:])
	r.protocol = b[36]
	r.port = binary.BigEndian.Uint16(b[40:])
	ip := netip.AddrFrom16([16]byte(b[44:])).Unmap()
	r.external = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[42:]))
	return r, nil
}
