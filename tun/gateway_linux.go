package tun

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxLocal is how many addresses of a link a Gateway names.
const maxLocal = 2

// Gateway is the router behind a default route, IPv6 link-local ones with their
// zone; Local are the addresses of this host from which it is reached, at most two
// and of the router's family: for IPv4 one, in its network if there is any, for IPv6
// those that the Internet routes. Link is the index of the interface.
type Gateway struct {
	Router netip.Addr
	Local  []netip.Addr
	Link   int
}

// Gateways lists the routers that the host's traffic takes, one per family, IPv4
// first. Routes over tunnels do not count. It looks at the main table and at the
// network namespace of the calling thread.
func Gateways() ([]Gateway, error) {
	var list []Gateway
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		g, err := gateway(family)
		if err != nil {
			return nil, err
		}
		if len(g.Local) > 0 {
			list = append(list, g)
		}
	}
	return list, nil
}

// gateway finds the router of one family; without Local: there is none.
func gateway(family int) (Gateway, error) {
	main := &netlink.Route{Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST}
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, main, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
	if err != nil {
		return Gateway{}, fmt.Errorf("list routes: %w", err)
	}
	var best Gateway
	metric := 0
	for _, r := range routes {
		router, link := nextHop(r)
		if p, ok := netipPrefix(r.Dst); r.Dst != nil && (!ok || p.Bits() > 0) || !router.IsValid() {
			continue
		}
		if len(best.Local) > 0 && r.Priority >= metric {
			continue
		}
		g, err := gatewayOver(link, router)
		if err != nil {
			return Gateway{}, err
		}
		if len(g.Local) > 0 {
			best, metric = g, r.Priority
		}
	}
	return best, nil
}

// nextHop is where a route leads, the first of several ways.
func nextHop(r netlink.Route) (netip.Addr, int) {
	via, link := r.Gw, r.LinkIndex
	if len(r.MultiPath) > 0 {
		via, link = r.MultiPath[0].Gw, r.MultiPath[0].LinkIndex
	}
	router, _ := netip.AddrFromSlice(via)
	return router.Unmap(), link
}

// gatewayOver completes a router with our addresses on its link; none where the
// link is a tunnel, down, or gone meanwhile.
func gatewayOver(index int, router netip.Addr) (Gateway, error) {
	link, err := netlink.LinkByIndex(index)
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return Gateway{}, nil
	}
	if err != nil {
		return Gateway{}, fmt.Errorf("find link %d: %w", index, err)
	}
	if !running(link.Attrs().RawFlags) || isTunnel(link) {
		return Gateway{}, nil
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, familyOf(router)) })
	if err != nil {
		return Gateway{}, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	var usable []netip.Prefix
	for _, a := range addrs {
		p, ok := netipPrefix(a.IPNet)
		if ok && a.Flags&addrStates == 0 && pathAddr(p.Addr()) {
			usable = append(usable, p)
		}
	}
	g := Gateway{Router: router, Local: ownAddrs(usable, router), Link: index}
	if router.IsLinkLocalUnicast() && router.Is6() {
		g.Router = router.WithZone(link.Attrs().Name)
	}
	return g, nil
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// ownAddrs chooses Gateway.Local from the addresses of a link.
func ownAddrs(addrs []netip.Prefix, router netip.Addr) []netip.Addr {
	var list []netip.Addr
	for _, p := range addrs {
		switch {
		case router.Is4() && p.Contains(router):
			return []netip.Addr{p.Addr()}
		case router.Is4() && len(list) == 0, router.Is6() && !p.Addr().IsPrivate() && len(list) < maxLocal:
			list = append(list, p.Addr())
		}
	}
	return list
}
