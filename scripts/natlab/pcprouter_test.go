package natlab

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// TestPCPRouterRefuses has requests of the right host and nonce granted, and no
// others.
func TestPCPRouterRefuses(t *testing.T) {
	p := &pcpRouter{home: &Home{wan: netip.MustParseAddr("100.64.0.9")}, ports: map[uint16]pcpMapping{}}
	one, two := netip.MustParseAddr("192.168.1.2"), netip.MustParseAddr("192.168.1.3")
	request := func(version byte, nonce byte, lifetime uint32) []byte {
		b := make([]byte, pcpMapSize)
		b[0], b[1], b[pcpProtocol], b[pcpHead] = version, pcpMap, pcpUDP, nonce
		binary.BigEndian.PutUint32(b[pcpLifetime:], lifetime)
		binary.BigEndian.PutUint16(b[pcpInner:], 4000)
		return b
	}
	for _, c := range []struct {
		what   string
		b      []byte
		from   netip.Addr
		result byte
		held   int
	}{
		{"another version", request(1, 7, 60), one, pcpTooOld, 0},
		{"new", request(2, 7, 60), one, 0, 1},
		{"again", request(2, 7, 60), one, 0, 1},
		{"another nonce", request(2, 8, 60), one, pcpForbidden, 1},
		{"another host's", request(2, 7, 60), two, pcpForbidden, 1},
		{"end with another nonce", request(2, 8, 0), one, pcpForbidden, 1},
		{"end", request(2, 7, 0), one, 0, 0},
		{"of nothing", request(2, 7, 0), one, 0, 0},
	} {
		out := p.answer(c.b, c.from)
		if len(out) < pcpHead || out[0] != pcpVersion || out[1] != pcpMap|pcpAnswer || out[pcpResult] != c.result || len(p.ports) != c.held {
			t.Errorf("%s: % x, %d held", c.what, out, len(p.ports))
		}
	}
	answer := request(2, 7, 60)
	answer[1] |= pcpAnswer
	for _, b := range [][]byte{nil, {2}, {2, pcpMap}, answer} {
		if out := p.answer(b, one); out != nil {
			t.Errorf("% x is answered by % x", b, out)
		}
	}
}
