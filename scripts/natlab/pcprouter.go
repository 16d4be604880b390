package natlab

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"
)

// The parts of PCP (RFC 6887 sections 7 and 11) that a router needs which maps UDP
// ports of IPv4 for who asks, at the port that he has.
const (
	pcpPort     = 5351
	pcpVersion  = 2
	pcpAnswer   = 0x80
	pcpMap      = 1
	pcpHead     = 24
	pcpMapSize  = 60
	pcpUDP      = 17
	pcpResult   = 3 // where it is, as the others are
	pcpLifetime = 4
	pcpProtocol = 36
	pcpInner    = 40
	pcpOuter    = 42
	pcpAddress  = 44

	// The results but for success, which is zero.
	pcpTooOld    = 1
	pcpForbidden = 2
	// pcpWhile is for how many seconds a refusal is valid.
	pcpWhile = 30
)

// pcpRouter maps ports on any outer address, also a carrier's: miniupnpd maps on
// public ones only.
type pcpRouter struct {
	home  *Home
	conn  *net.UDPConn
	began time.Time
	ports map[uint16]pcpMapping
}

// pcpMapping is whose a port is: only who knows the nonce may change it.
type pcpMapping struct {
	host  netip.Addr
	nonce [12]byte
}

// startPCP has the home's router map ports, in the chains of hardRules.
func (h *Home) startPCP() error {
	p := &pcpRouter{home: h, began: time.Now(), ports: map[uint16]pcpMapping{}}
	err := h.inside(func() (err error) {
		p.conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.router(), pcpPort)))
		return err
	})
	if err != nil {
		return fmt.Errorf("listen for PCP: %w", err)
	}
	h.lab.spawn(func(running context.Context) error {
		defer context.AfterFunc(running, func() { p.conn.Close() })()
		if err := p.serve(running); running.Err() == nil {
			return err
		}
		return nil
	})
	return nil
}

func (p *pcpRouter) serve(ctx context.Context) error {
	b := make([]byte, 1500)
	for {
		n, from, err := p.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return fmt.Errorf("read PCP: %w", err)
		}
		out := p.answer(b[:n], from.Addr().Unmap())
		if len(out) == pcpMapSize {
			if err := p.load(ctx); err != nil {
				return err
			}
		}
		if out != nil {
			if _, err := p.conn.WriteToUDPAddrPort(out, from); err != nil && ctx.Err() == nil {
				return fmt.Errorf("answer PCP: %w", err)
			}
		}
	}
}

// answer does what a request wants; nil: nothing is to be said.
func (p *pcpRouter) answer(b []byte, from netip.Addr) []byte {
	if len(b) < 2 || b[1]&pcpAnswer != 0 {
		return nil
	}
	out := make([]byte, pcpHead, pcpMapSize)
	out[0], out[1] = pcpVersion, b[1]|pcpAnswer
	binary.BigEndian.PutUint32(out[8:], uint32(time.Since(p.began)/time.Second))
	switch {
	case b[0] != pcpVersion:
		return refuse(out, pcpTooOld)
	case len(b) < pcpHead:
		return nil
	case b[1] != pcpMap:
		return out
	case len(b) < pcpMapSize || b[pcpProtocol] != pcpUDP:
		return nil
	}
	out = append(out, b[pcpHead:pcpMapSize]...)
	port := binary.BigEndian.Uint16(b[pcpInner:])
	m := pcpMapping{host: from, nonce: [12]byte(b[pcpHead:])}
	if held, ok := p.ports[port]; ok && held != m {
		return refuse(out, pcpForbidden)
	}
	copy(out[pcpLifetime:], b[pcpLifetime:pcpLifetime+4])
	if binary.BigEndian.Uint32(b[pcpLifetime:]) == 0 {
		delete(p.ports, port)
	} else {
		p.ports[port] = m
	}
	binary.BigEndian.PutUint16(out[pcpOuter:], port)
	outer := netip.AddrFrom16(p.home.WAN().As16()).As16()
	copy(out[pcpAddress:], outer[:])
	return out
}

func refuse(out []byte, result byte) []byte {
	out[pcpResult] = result
	binary.BigEndian.PutUint32(out[pcpLifetime:], pcpWhile)
	return out
}

// load makes the mappings rules of the router.
func (p *pcpRouter) load(ctx context.Context) error {
	var rules strings.Builder
	for port, m := range p.ports {
		fmt.Fprintf(&rules, "add rule inet filter prerouting_miniupnpd iifname \"wan\" udp dport %d dnat ip to %s:%d\n", port, m.host, port)
	}
	var s script
	s.add("nft -f - <<'RULES'\nflush chain inet filter prerouting_miniupnpd\nflush chain inet filter miniupnpd\n"+
		"add rule inet filter miniupnpd iifname \"wan\" ct status dnat accept\n%s\nRULES", rules.String())
	return p.home.sh(ctx, s)
}
