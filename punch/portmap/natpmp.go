package portmap

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// The wire format of NAT-PMP (RFC 6886 sections 3.2 and 3.3).
//
//	 0        1        2        4                 8                       12
//	+--------+--------+--------+                                  request
//	| 0      | 0      |                           the outer address, please
//	+--------+--------+--------+-----------------+-----------------------+
//	| 0      | 1 UDP  | 0      | ports of ours   | lifetime in seconds   |
//	|        |        |        | and external    |                       |
//	+--------+--------+--------+-----------------+-----------------------+
//
//	 0        1        2        4                 8                       12
//	+--------+--------+--------+-----------------+-----------------------+  answer
//	| 0      | 128    | result | epoch           | outer address         |
//	+--------+--------+--------+-----------------+-----------------------+----------+
//	| 0      | 129    | result | epoch           | ports of ours and ext.| lifetime |
//	+--------+--------+--------+-----------------+-----------------------+----------+
const (
	pmpVersion    = 0
	pmpAnswer     = 0x80
	pmpAddress    = 0
	pmpMapUDP     = 1
	pmpShort      = 8 // an answer that refuses
	pmpAddressLen = 12
	pmpMapLen     = 16

	pmpSuccess = 0
)

// natpmp is NAT-PMP towards one router.
type natpmp struct {
	route Route
	port  uint16
	epoch epoch
	told  netip.Addr // the router's outer address; zero: not since find
}

func newNATPMP(r Route, port uint16) *natpmp { return &natpmp{route: r, port: port} }

func (*natpmp) name() string { return NATPMP }

func (n *natpmp) find(ctx context.Context) error {
	n.told = netip.Addr{} // it may be another router by now
	_, err := n.address(ctx)
	return err
}

// address asks for the router's outer address.
func (n *natpmp) address(ctx context.Context) (netip.Addr, error) {
	r, err := n.send(ctx, pmpAddress, []byte{pmpVersion, pmpAddress})
	if err == nil {
		n.told = r.address
	}
	return r.address, err
}

func (n *natpmp) outer() netip.Addr { return n.told }

func (n *natpmp) ask(ctx context.Context, w want) (grant, error) {
	ip, err := n.address(ctx)
	if err != nil {
		return grant{}, err
	}
	r, err := n.assign(ctx, w)
	if err != nil {
		return grant{}, err
	}
	n.epoch.mapped()
	return grant{netip.AddrPortFrom(ip, r.external), r.lifetime}, nil
}

func (n *natpmp) assign(ctx context.Context, w want) (pmpReply, error) {
	port := w.external.Port()
	if port == 0 && w.lifetime > 0 {
		port = w.port
	}
	b := []byte{pmpVersion, pmpMapUDP, 0, 0}
	b = binary.BigEndian.AppendUint16(b, w.port)
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint32(b, seconds(w.lifetime))
	return n.send(ctx, pmpMapUDP, b)
}

// alive looks at the router's clock and outer address.
func (n *natpmp) alive(ctx context.Context, got grant) (bool, error) {
	ip, err := n.address(ctx)
	if err != nil {
		return false, err
	}
	return ip == got.external.Addr() && !n.epoch.lost(), nil
}

// remove asks for no lifetime and no external port (RFC 6886 section 3.4), which
// concerns but our own.
func (n *natpmp) remove(ctx context.Context, _ grant) error {
	_, err := n.assign(ctx, want{port: n.port})
	return err
}

// send gives the answer to a request, unless it refuses.
func (n *natpmp) send(ctx context.Context, opcode byte, request []byte) (pmpReply, error) {
	var got pmpReply
	err := exchange(ctx, n.route, request, func(b []byte) bool {
		r, err := parsePMP(b)
		if err != nil || r.opcode != opcode || r.result == pmpSuccess && opcode == pmpMapUDP && r.port != n.port {
			return false
		}
		got = r
		return true
	})
	if err != nil {
		return pmpReply{}, err
	}
	if got.result != pmpSuccess {
		return pmpReply{}, &refusal{err: fmt.Errorf("the router refuses: %s", resultText(NATPMP, int(got.result)))}
	}
	n.epoch.note(got.epoch, time.Now())
	return got, nil
}

// pmpReply is an answer: address is of pmpAddress, what follows of pmpMapUDP.
type pmpReply struct {
	opcode   byte
	result   uint16
	epoch    uint32
	address  netip.Addr
	port     uint16
	external uint16
	lifetime time.Duration
}

func parsePMP(b []byte) (pmpReply, error) {
	if len(b) < pmpShort || len(b) > pmpMapLen || b[0] != pmpVersion || b[1]&pmpAnswer == 0 {
		return pmpReply{}, errFormat
	}
	r := pmpReply{
		opcode: b[1] &^ pmpAnswer,
		result: binary.BigEndian.Uint16(b[2:]),
		epoch:  binary.BigEndian.Uint32(b[4:]),
	}
	switch {
	case r.result != pmpSuccess:
	case r.opcode == pmpAddress && len(b) == pmpAddressLen:
		r.address = netip.AddrFrom4([4]byte(b[8:]))
	case r.opcode == pmpMapUDP && len(b) == pmpMapLen:
		r.port = binary.BigEndian.Uint16(b[8:])
		r.external = binary.BigEndian.Uint16(b[10:])
		r.lifetime = duration(binary.BigEndian.Uint32(b[12:]))
	default:
		return pmpReply{}, errFormat
	}
	return r, nil
}
