package natlab

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sync/errgroup"
)

// maxProbePorts bounds how many mappings one look takes.
const maxProbePorts = 512

// Allocation is how a NAT chooses the ports of one socket's mappings towards
// many endpoints, one after the other.
type Allocation struct {
	// Ports are those seen, in their order.
	Ports []uint16
	// Step is the distance from each to the next, where it is the same for all,
	// and not zero.
	Step int
	// Low and High are the least and the greatest.
	Low, High uint16
}

// Allocations asks so many endpoints of the core, each once, from one socket of
// the host.
func (h *Host) Allocations(ctx context.Context, count int) (Allocation, error) {
	if count < 2 || count > maxProbePorts {
		return Allocation{}, fmt.Errorf("%d is no number of ports to look at", count)
	}
	p := &probe{host: h}
	defer p.close()
	conn, err := p.socket()
	if err != nil {
		return Allocation{}, err
	}
	servers, err := h.lab.mirrors(count)
	if err != nil {
		return Allocation{}, err
	}
	var g errgroup.Group
	for _, s := range servers {
		g.Go(func() error { return mirror(s) })
	}
	var a Allocation
	g.Go(func() error {
		defer closeAll(servers)
		for _, s := range servers {
			seen, err := p.must(ctx, conn, s.LocalAddr().(*net.UDPAddr).AddrPort())
			if err != nil {
				return err
			}
			a.Ports = append(a.Ports, seen.Port())
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return Allocation{}, fmt.Errorf("look at the ports of %s: %w", h.name, err)
	}
	return a.complete(), nil
}

func (a Allocation) complete() Allocation {
	a.Low, a.High = slices.Min(a.Ports), slices.Max(a.Ports)
	a.Step = int(a.Ports[1]) - int(a.Ports[0])
	for i := range a.Ports[1:] {
		if int(a.Ports[i+1])-int(a.Ports[i]) != a.Step {
			a.Step = 0
		}
	}
	return a
}

// mirrors are servers at ports of the core.
func (l *Lab) mirrors(count int) ([]*net.UDPConn, error) {
	var all []*net.UDPConn
	err := l.core.inside(func() error {
		for i := range count {
			at := netip.AddrPortFrom(echoAddrs()[i%2], 0)
			conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
			if err != nil {
				return fmt.Errorf("open probe server: %w", err)
			}
			all = append(all, conn)
		}
		return nil
	})
	if err != nil {
		closeAll(all)
	}
	return all, err
}

func closeAll(all []*net.UDPConn) {
	for _, c := range all {
		c.Close()
	}
}

// mirror answers requests with the address they came from.
func mirror(conn *net.UDPConn) error {
	buf := make([]byte, probeMaxLen)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return nil // closed
		}
		if n != 1+probeIDLen {
			continue
		}
		answer, err := from.AppendBinary(append([]byte(nil), buf[1:n]...))
		if err != nil {
			return fmt.Errorf("encode %s: %w", from, err)
		}
		conn.WriteToUDPAddrPort(answer, from)
	}
}

// Churn makes so many flows from the host that have to do with nothing: each is
// one packet to a port of the core where nobody listens.
func (h *Host) Churn(flows int) error {
	return h.inside(func() error {
		conn, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return fmt.Errorf("open socket for churn: %w", err)
		}
		defer conn.Close()
		const ports = 1 << 15
		first := rand.IntN(ports)
		for i := range flows {
			to := netip.AddrPortFrom(echoAddrs()[0], uint16(ports+(first+i)%ports))
			if _, err := conn.WriteToUDPAddrPort(probeRequest(0, 0), to); err != nil {
				return fmt.Errorf("send churn: %w", err)
			}
		}
		return nil
	})
}
