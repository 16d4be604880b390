package tun

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// repairInterval is the shortest time between two repairs of the
	// interface, so that two managers that disagree do not fight.
	repairInterval = time.Second
	// minMTU6 is the smallest MTU with which the kernel keeps IPv6 on a link
	// (RFC 8200 section 5).
	minMTU6 = 1280
)

// A link is the interface's addresses and routes in the kernel. Its sockets
// stay in the network namespace in which it was opened.
type link struct {
	name   string
	index  int
	ipv6   bool // the kernel takes IPv6 addresses on this link
	addrs  []netip.Prefix
	routes []netip.Prefix
	log    *slog.Logger
	events *eventSocket
	isUp   bool // as guard last saw it

	mu     sync.Mutex
	handle *netlink.Handle
	hosts  map[netip.Prefix]int // peers with an MTU of their own
	ended  map[netip.Prefix]int // events to come of their routes that we removed
	closed bool
}

// openLink finds the interface and subscribes to its events; nothing is changed.
func openLink(c Config, log *slog.Logger) (*link, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	events, err := newEventSocket()
	if err != nil {
		handle.Close()
		return nil, err
	}
	l := &link{name: c.Name, addrs: c.Addrs, routes: c.Routes, log: log, handle: handle, events: events}
	dev, err := handle.LinkByName(c.Name)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("find interface %s: %w", c.Name, err)
	}
	l.index = dev.Attrs().Index
	l.ipv6 = c.MTU >= minMTU6 && ipv6Enabled(c.Name)
	return l, nil
}

func (l *link) close() {
	l.events.close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		l.handle.Close()
	}
}

// ipv6Enabled reads the switch that distributions and containers use to turn
// IPv6 off; the kernel then refuses addresses with a permission error.
func ipv6Enabled(name string) bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
	return err == nil && len(b) > 0 && b[0] == '0'
}

// up sets the link up, with all addresses and routes.
func (l *link) up() error {
	dev := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: l.index}}
	// Without an address of its own the kernel sends no router solicitations
	// into the tunnel. Kernels without IPv6 refuse.
	if err := l.handle.LinkSetIP6AddrGenMode(dev, nl.IN6_ADDR_GEN_MODE_NONE); err != nil {
		l.log.Debug("no address generation mode", "interface", l.name, "err", err)
	}
	if err := l.handle.LinkSetUp(dev); err != nil {
		return fmt.Errorf("set %s up: %w", l.name, err)
	}
	l.isUp = true
	if !l.ipv6 {
		l.log.Warn("IPv6 is off on this interface", "interface", l.name)
	}
	return l.ensure()
}

// ensure puts addresses and routes where they are missing, and nothing else.
func (l *link) ensure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	dev := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: l.index}}
	for _, p := range l.addrs {
		if p.Addr().Is6() && !l.ipv6 {
			continue
		}
		a := &netlink.Addr{
			IPNet:     ipNet(p),
			Broadcast: net.IPv4zero, // none
			// Usable at once; and what is routed is said by Routes alone.
			Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE,
		}
		if err := l.handle.AddrReplace(dev, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, l.name, err)
		}
	}
	for _, p := range l.routes {
		if p.Addr().Is6() && !l.ipv6 {
			continue
		}
		if err := l.route(p); err != nil {
			return fmt.Errorf("route %s into %s: %w", p, l.name, err)
		}
	}
	return l.ensureHosts()
}

// route adds a route behind those that exist: replacing could take away one of
// the user's own, with the same destination, on another interface.
func (l *link) route(p netip.Prefix) error {
	if err := l.handle.RouteAppend(l.routeTo(p)); !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func (l *link) routeTo(p netip.Prefix) *netlink.Route {
	r := &netlink.Route{LinkIndex: l.index, Dst: ipNet(p.Masked()), Protocol: unix.RTPROT_STATIC}
	if p.Addr().Is4() {
		r.Scope, r.Src = netlink.SCOPE_LINK, l.source(p)
	}
	return r
}

// source is the IPv4 address with which packets to p should leave: one inside p
// before others, nil without any. IPv6 prefers addresses of the interface by
// itself (RFC 6724 section 5, rule 5), and a hint would get lost with its
// address while the route stays.
func (l *link) source(p netip.Prefix) (best net.IP) {
	for _, a := range l.addrs {
		switch {
		case !a.Addr().Is4():
		case p.Contains(a.Addr()):
			return a.Addr().AsSlice()
		case best == nil:
			best = a.Addr().AsSlice()
		}
	}
	return best
}

// guard puts addresses and routes back that somebody else removed, until ctx
// ends. It fails with ErrInterfaceGone when the interface itself is deleted.
func (l *link) guard(ctx context.Context) error {
	var last, due time.Time // of repairs; due zero: nothing to repair
	for {
		if !due.IsZero() && !time.Now().Before(due) {
			last, due = time.Now(), time.Time{}
			l.repair()
		}
		events, err := l.events.receive(due)
		broken := errors.Is(err, unix.ENOBUFS) // messages lost: look
		switch {
		case ctx.Err() != nil, errors.Is(err, os.ErrClosed):
			return nil
		case err != nil && !broken && !errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("watch interface %s: %w", l.name, err)
		}
		for _, e := range events {
			if e.link == l.index && e.kind == unix.RTM_DELLINK {
				return fmt.Errorf("interface %s: %w", l.name, ErrInterfaceGone)
			}
			broken = broken || l.breaks(e)
		}
		if broken && due.IsZero() {
			due = last.Add(repairInterval)
		}
	}
}

func (l *link) repair() {
	switch err := l.ensure(); {
	case errors.Is(err, unix.ENETDOWN): // set down meanwhile: when it is up again
	case err != nil:
		l.log.Warn("cannot repair the interface", "interface", l.name, "err", err)
	default:
		l.log.Info("interface repaired", "interface", l.name)
	}
}

// breaks tells whether something of ours may be missing after e. A link that
// somebody sets down is left so, and loses its routes and IPv6 addresses: they
// come back when it is set up.
func (l *link) breaks(e event) bool {
	if e.link != l.index {
		return false
	}
	switch e.kind {
	case unix.RTM_DELROUTE:
		return l.isUp && l.misses(e.prefix)
	case unix.RTM_DELADDR:
		return l.isUp
	case unix.RTM_NEWLINK:
		before := l.isUp
		l.isUp = e.flags&unix.IFF_UP != 0
		return l.isUp && !before
	}
	return false
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
