package natlab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	probeWait   = 500 * time.Millisecond
	probeResend = 3
	// A request asks for its answer from another address or port.
	changeAddr byte = 1
	changePort byte = 2

	probeIDLen  = 8
	probeMaxLen = 64
)

// Dependence says on what of a remote endpoint a NAT's mapping or filtering
// depends (RFC 4787 sections 4.1 and 5).
type Dependence string

const (
	// EndpointIndependent depends on nothing of it.
	EndpointIndependent Dependence = "endpoint-independent"
	// AddressDependent depends on its address.
	AddressDependent Dependence = "address-dependent"
	// AddressAndPortDependent depends on its address and port.
	AddressAndPortDependent Dependence = "address-and-port-dependent"
)

// Behaviour is what Probe saw of a NAT.
type Behaviour struct {
	// Public is the address the world sees.
	Public netip.Addr
	// Mapping and Filtering are those of RFC 4787.
	Mapping, Filtering Dependence
	// Preserves says that the mapping has the host's own port.
	Preserves bool
	// Hairpin says that hosts behind the NAT reach each other by their
	// mappings.
	Hairpin bool
	// Poisoned says that a packet from an endpoint which the host sends to
	// only afterwards changes the mapping towards that endpoint.
	Poisoned bool
}

// Probe finds out how the network treats this host's UDP, after the method of
// RFC 5780: servers on two addresses and two ports of the core, asked from
// sockets in the host. It shares no code with the overlay.
func (h *Host) Probe(ctx context.Context) (Behaviour, error) {
	p := &probe{host: h}
	defer p.close()
	if err := p.listen(); err != nil {
		return Behaviour{}, fmt.Errorf("probe %s: %w", h.name, err)
	}
	g, ctx := errgroup.WithContext(ctx)
	for i := range p.servers {
		for j := range p.servers[i] {
			g.Go(func() error { return p.serve(i, j) })
		}
	}
	var seen Behaviour
	g.Go(func() (err error) {
		defer p.closeServers()
		seen, err = p.measure(ctx)
		return err
	})
	if err := g.Wait(); err != nil {
		return Behaviour{}, fmt.Errorf("probe %s: %w", h.name, err)
	}
	return seen, nil
}

// probe is one run of Probe: servers by address and port, and the host's
// sockets.
type probe struct {
	host    *Host
	servers [2][2]*net.UDPConn
	clients []*net.UDPConn
}

func (p *probe) listen() error {
	return p.host.lab.core.inside(func() error {
		for j := range 2 {
			port := uint16(0)
			for i, addr := range echoAddrs() {
				conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
				if err != nil {
					return fmt.Errorf("open probe server: %w", err)
				}
				p.servers[i][j] = conn
				port = localPort(conn)
			}
		}
		return nil
	})
}

func localPort(c *net.UDPConn) uint16 {
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func (p *probe) server(i, j int) netip.AddrPort {
	return p.servers[i][j].LocalAddr().(*net.UDPAddr).AddrPort()
}

// serve answers requests. A request is one byte of change bits and an id; its
// answer is the id and the address and port the request came from.
func (p *probe) serve(i, j int) error {
	buf := make([]byte, probeMaxLen)
	for {
		n, from, err := p.servers[i][j].ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive probe: %w", err)
		}
		if n != 1+probeIDLen {
			continue
		}
		answer, err := from.AppendBinary(append([]byte(nil), buf[1:n]...))
		if err != nil {
			return fmt.Errorf("encode %s: %w", from, err)
		}
		via := p.servers[i^int(buf[0]&changeAddr)][j^int(buf[0]&changePort>>1)]
		// A full socket or an unreachable host is a lost packet; the
		// asker sends again.
		via.WriteToUDPAddrPort(answer, from)
	}
}

func (p *probe) close() {
	p.closeServers()
	for _, c := range p.clients {
		c.Close()
	}
}

func (p *probe) closeServers() {
	for i := range p.servers {
		for _, c := range p.servers[i] {
			if c != nil {
				c.Close()
			}
		}
	}
}

func (p *probe) socket() (*net.UDPConn, error) {
	var conn *net.UDPConn
	err := p.host.inside(func() (err error) {
		conn, err = net.ListenUDP("udp4", nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open probe socket: %w", err)
	}
	p.clients = append(p.clients, conn)
	return conn, nil
}

func (p *probe) measure(ctx context.Context) (Behaviour, error) {
	var b Behaviour
	for _, step := range []func(context.Context, *Behaviour) error{
		p.mapping, p.filtering, p.hairpin, p.poisoned,
	} {
		if err := step(ctx, &b); err != nil {
			return Behaviour{}, err
		}
	}
	return b, nil
}

// mapping compares the mappings of one socket towards four endpoints.
func (p *probe) mapping(ctx context.Context, b *Behaviour) error {
	conn, err := p.socket()
	if err != nil {
		return err
	}
	var seen [2][2]netip.AddrPort
	for i := range seen {
		for j := range seen[i] {
			if seen[i][j], err = p.must(ctx, conn, p.server(i, j)); err != nil {
				return err
			}
		}
	}
	b.Public = seen[0][0].Addr()
	b.Preserves = seen[0][0].Port() == localPort(conn)
	switch {
	case seen[0][0] != seen[0][1]:
		b.Mapping = AddressAndPortDependent
	case seen[0][0] != seen[1][0]:
		b.Mapping = AddressDependent
	default:
		b.Mapping = EndpointIndependent
	}
	return nil
}

// filtering asks one endpoint to let others answer. The socket is fresh: it
// must not have sent to them.
func (p *probe) filtering(ctx context.Context, b *Behaviour) error {
	conn, err := p.socket()
	if err != nil {
		return err
	}
	if _, err := p.must(ctx, conn, p.server(0, 0)); err != nil {
		return err
	}
	b.Filtering = AddressAndPortDependent
	for _, try := range []struct {
		change byte
		means  Dependence
	}{{changePort, AddressDependent}, {changeAddr | changePort, EndpointIndependent}} {
		_, ok, err := p.ask(ctx, conn, p.server(0, 0), try.change)
		if err != nil {
			return err
		}
		if ok {
			b.Filtering = try.means
		}
	}
	return nil
}

// hairpin sends from one socket to the mapping of another of the same host.
func (p *probe) hairpin(ctx context.Context, b *Behaviour) error {
	first, err := p.socket()
	if err != nil {
		return err
	}
	second, err := p.socket()
	if err != nil {
		return err
	}
	mapped, err := p.must(ctx, first, p.server(0, 0))
	if err != nil {
		return err
	}
	if _, err := p.must(ctx, second, p.server(0, 0)); err != nil {
		return err
	}
	if _, err := second.WriteToUDPAddrPort(probeRequest(0, 0), mapped); err != nil {
		return fmt.Errorf("send hairpin probe: %w", err)
	}
	_, b.Hairpin, err = receive(first)
	return err
}

// poisoned lets an endpoint send first and compares the mapping towards it
// with the one the others see.
func (p *probe) poisoned(ctx context.Context, b *Behaviour) error {
	conn, err := p.socket()
	if err != nil {
		return err
	}
	before, err := p.must(ctx, conn, p.server(0, 0))
	if err != nil {
		return err
	}
	if _, _, err := p.ask(ctx, conn, p.server(0, 0), changeAddr|changePort); err != nil {
		return err
	}
	after, err := p.must(ctx, conn, p.server(1, 1))
	b.Poisoned = before != after && b.Mapping == EndpointIndependent
	return err
}

func (p *probe) must(ctx context.Context, conn *net.UDPConn, to netip.AddrPort) (netip.AddrPort, error) {
	for range probeResend {
		seen, ok, err := p.ask(ctx, conn, to, 0)
		if err != nil || ok {
			return seen, err
		}
	}
	return netip.AddrPort{}, fmt.Errorf("no answer from %s", to)
}

// ask sends one request and waits for its answer.
func (p *probe) ask(ctx context.Context, conn *net.UDPConn, to netip.AddrPort, change byte) (netip.AddrPort, bool, error) {
	if err := ctx.Err(); err != nil {
		return netip.AddrPort{}, false, err
	}
	id := rand.Uint64()
	if _, err := conn.WriteToUDPAddrPort(probeRequest(change, id), to); err != nil {
		return netip.AddrPort{}, false, fmt.Errorf("send probe to %s: %w", to, err)
	}
	for {
		data, ok, err := receive(conn)
		if err != nil || !ok {
			return netip.AddrPort{}, false, err
		}
		if len(data) <= probeIDLen || binary.BigEndian.Uint64(data) != id {
			continue
		}
		var seen netip.AddrPort
		if err := seen.UnmarshalBinary(data[probeIDLen:]); err != nil {
			return netip.AddrPort{}, false, fmt.Errorf("decode probe answer: %w", err)
		}
		return seen, true, nil
	}
}

func probeRequest(change byte, id uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{change}, id)
}

func receive(conn *net.UDPConn) ([]byte, bool, error) {
	if err := conn.SetReadDeadline(time.Now().Add(probeWait)); err != nil {
		return nil, false, fmt.Errorf("set deadline: %w", err)
	}
	buf := make([]byte, probeMaxLen)
	n, err := conn.Read(buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("receive probe answer: %w", err)
	}
	return buf[:n], true, nil
}
