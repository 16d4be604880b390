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
	pcpTooOld   = 1 // unsupported version
	pcpLeast    = 4
	pcpLifetime = 4 // where it is, as nonce, port and address are
	pcpProtocol = 36
	pcpInner    = 40
	pcpOuter    = 42
	pcpAddress  = 44
)

// pcpRouter maps ports on any outer address, also a carrier's: miniupnpd maps on
// public ones only.
type pcpRouter struct {
	home  *Home
	conn  *net.UDPConn
	began time.Time
	ports map[uint16]netip.Addr
}

// startPCP has the home's router map ports, in the chains of hardRules.
func (h *Home) startPCP() error {
	p := &pcpRouter{home: h, began: time.Now(), ports: map[uint16]netip.Addr{}}
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
		out, err := p.answer(ctx, b[:n], from.Addr().Unmap())
		if err != nil {
			return err
		}
		if out != nil {
			if _, err := p.conn.WriteToUDPAddrPort(out, from); err != nil && ctx.Err() == nil {
				return fmt.Errorf("answer PCP: %w", err)
			}
		}
	}
}

// answer does what a request wants.
func (p *pcpRouter) answer(ctx context.Context, b []byte, from netip.Addr) ([]byte, error) {
	if len(b) < pcpHead || b[0] != pcpVersion || b[1]&pcpAnswer != 0 {
		return nil, nil
	}
	out := make([]byte, pcpHead, pcpMapSize)
	out[0], out[1] = pcpVersion, b[1]|pcpAnswer
	copy(out[pcpLifetime:], b[pcpLifetime:pcpLifetime+4])
	binary.BigEndian.PutUint32(out[8:], uint32(time.Since(p.began)/time.Second))
	if b[1] != pcpMap {
		return out, nil
	}
	if len(b) < pcpMapSize || b[pcpProtocol] != pcpUDP {
		return nil, nil
	}
	out = append(out, b[pcpHead:pcpMapSize]...)
	port := binary.BigEndian.Uint16(b[pcpInner:])
	if binary.BigEndian.Uint32(b[pcpLifetime:]) == 0 {
		delete(p.ports, port)
	} else {
		p.ports[port] = from
	}
	binary.BigEndian.PutUint16(out[pcpOuter:], port)
	outer := netip.AddrFrom16(p.home.WAN().As16()).As16()
	copy(out[pcpAddress:], outer[:])
	return out, p.load(ctx)
}

// load makes the mappings rules of the router.
func (p *pcpRouter) load(ctx context.Context) error {
	var rules strings.Builder
	for port, to := range p.ports {
		fmt.Fprintf(&rules, "add rule inet filter prerouting_miniupnpd iifname \"wan\" udp dport %d dnat ip to %s:%d\n", port, to, port)
	}
	var s script
	s.add("nft -f - <<'RULES'\nflush chain inet filter prerouting_miniupnpd\nflush chain inet filter miniupnpd\n"+
		"add rule inet filter miniupnpd iifname \"wan\" ct status dnat accept\n%s\nRULES", rules.String())
	return p.home.sh(ctx, s)
}
