package tun

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// maxMulticast is the longest datagram taken from a group, in bytes.
const maxMulticast = 2048

// Multicast sends datagrams to all hosts of the LANs this one is in, and takes
// theirs: by IPv4 and IPv6, one hop far. Several processes of a host may have one
// on the same groups; all get everything, their own included. Safe for concurrent
// use.
type Multicast struct {
	to4, to6 *net.UDPAddr
	v4       *ipv4.PacketConn // nil: the host lacks the family
	v6       *ipv6.PacketConn

	mu    sync.Mutex
	links []net.Interface // joined
}

// OpenMulticast opens sockets for two groups with one port. Nothing is joined
// before Join. It looks at the network namespace of the calling thread.
func OpenMulticast(group4, group6 netip.Addr, port uint16) (*Multicast, error) {
	m := &Multicast{
		to4: net.UDPAddrFromAddrPort(netip.AddrPortFrom(group4, port)),
		to6: net.UDPAddrFromAddrPort(netip.AddrPortFrom(group6, port)),
	}
	var err4, err6 error
	m.v4, err4 = openGroup4(m.to4)
	m.v6, err6 = openGroup6(m.to6)
	if err4 != nil && err6 != nil {
		return nil, fmt.Errorf("open multicast: %w", errors.Join(err4, err6))
	}
	return m, nil
}

// openGroup4 opens a socket that tells where datagrams were sent to: one that does
// not is of no use in Run.
func openGroup4(group *net.UDPAddr) (*ipv4.PacketConn, error) {
	c, err := listenGroup("udp4", group)
	if err != nil {
		return nil, err
	}
	p := ipv4.NewPacketConn(c)
	if err := p.SetControlMessage(ipv4.FlagDst, true); err != nil {
		_ = p.Close()
		return nil, fmt.Errorf("ask for destinations: %w", err)
	}
	return p, nil
}

// openGroup6 is openGroup4 for IPv6.
func openGroup6(group *net.UDPAddr) (*ipv6.PacketConn, error) {
	c, err := listenGroup("udp6", group)
	if err != nil {
		return nil, err
	}
	p := ipv6.NewPacketConn(c)
	if err := p.SetControlMessage(ipv6.FlagDst, true); err != nil {
		_ = p.Close()
		return nil, fmt.Errorf("ask for destinations: %w", err)
	}
	return p, nil
}

// listenGroup binds to the port of a group. Go binds to all addresses instead of
// the group's, so what else arrives there is dropped in Run.
func listenGroup(network string, group *net.UDPAddr) (net.PacketConn, error) {
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
		return errors.Join(err, failed)
	}}
	return c.ListenPacket(context.Background(), network, group.String())
}

// Join joins the groups on the links that are up and are no tunnels, and leaves
// those on links that are gone. It is to be called when links or addresses change.
func (m *Multicast) Join() error {
	now, err := lanLinks()
	if err != nil {
		return fmt.Errorf("join multicast groups: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	same := func(x, y net.Interface) bool { return x.Index == y.Index && x.Name == y.Name }
	for _, l := range now {
		// A link that lost its addresses lost its membership; joining twice is no harm.
		if m.v4 != nil {
			_ = m.v4.JoinGroup(&l, &net.UDPAddr{IP: m.to4.IP})
		}
		if m.v6 != nil {
			_ = m.v6.JoinGroup(&l, &net.UDPAddr{IP: m.to6.IP})
		}
	}
	for _, l := range m.links {
		if slices.ContainsFunc(now, func(n net.Interface) bool { return same(n, l) }) {
			continue
		}
		if m.v4 != nil {
			_ = m.v4.LeaveGroup(&l, &net.UDPAddr{IP: m.to4.IP})
		}
		if m.v6 != nil {
			_ = m.v6.LeaveGroup(&l, &net.UDPAddr{IP: m.to6.IP})
		}
	}
	m.links = now
	return nil
}

// lanLinks lists the links with other hosts on them.
func lanLinks() ([]net.Interface, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var list []net.Interface
	for _, l := range links {
		at := l.Attrs()
		const not = unix.IFF_LOOPBACK | unix.IFF_POINTOPOINT
		if running(at.RawFlags) && at.RawFlags&unix.IFF_MULTICAST != 0 && at.RawFlags&not == 0 && !isTunnel(l) {
			list = append(list, net.Interface{Index: at.Index, Name: at.Name, MTU: at.MTU, Flags: at.Flags})
		}
	}
	return list, nil
}

// Send sends a datagram into every LAN joined. The error is that of those where it
// failed; a LAN without addresses of a family is none.
func (m *Multicast) Send(b []byte) error {
	m.mu.Lock()
	links := m.links
	m.mu.Unlock()
	var failed error
	for _, l := range links {
		var err4, err6 error
		if m.v4 != nil {
			_, err4 = m.v4.WriteTo(b, &ipv4.ControlMessage{IfIndex: l.Index}, m.to4)
		}
		if m.v6 != nil {
			_, err6 = m.v6.WriteTo(b, &ipv6.ControlMessage{IfIndex: l.Index}, m.to6)
		}
		if err4 != nil && err6 != nil {
			failed = errors.Join(failed, fmt.Errorf("send on %s: %w", l.Name, errors.Join(err4, err6)))
		}
	}
	return failed
}

// Run hands over what arrives until ctx ends; then the sockets are closed and it
// returns nil. receive is called from up to two goroutines; b is valid only during
// the call.
func (m *Multicast) Run(ctx context.Context, receive func(b []byte)) error {
	g, ctx := errgroup.WithContext(ctx)
	if m.v4 != nil {
		stop := context.AfterFunc(ctx, func() { _ = m.v4.Close() })
		defer stop()
		g.Go(func() error {
			return readGroup(ctx, receive, func(b []byte) (int, error) {
				n, about, _, err := m.v4.ReadFrom(b)
				if err == nil && (about == nil || !about.Dst.Equal(m.to4.IP)) {
					n = 0 // came to an address of ours, from wherever
				}
				return n, err
			})
		})
	}
	if m.v6 != nil {
		stop := context.AfterFunc(ctx, func() { _ = m.v6.Close() })
		defer stop()
		g.Go(func() error {
			return readGroup(ctx, receive, func(b []byte) (int, error) {
				n, about, _, err := m.v6.ReadFrom(b)
				if err == nil && (about == nil || !about.Dst.Equal(m.to6.IP)) {
					n = 0
				}
				return n, err
			})
		})
	}
	return g.Wait()
}

func readGroup(ctx context.Context, receive func([]byte), next func([]byte) (int, error)) error {
	b := make([]byte, maxMulticast)
	for {
		n, err := next(b)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("receive multicast: %w", err)
		}
		if n > 0 {
			receive(b[:n])
		}
	}
}
