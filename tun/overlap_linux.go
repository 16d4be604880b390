package tun

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Overlaps lists the local networks that share addresses with prefix, as
// "eth0 10.0.0.12/24": the networks of the host's addresses, and what is routed
// in any table, except over the interface named except (empty: none). Default
// routes and their halves overlap with everything and are not counted. It looks
// at the network namespace of the calling thread.
func Overlaps(prefix netip.Prefix, except string) ([]string, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	names := make(map[int]string)
	for _, l := range links {
		if a := l.Attrs(); a.Name != except {
			names[a.Index] = a.Name
		}
	}
	networks, err := localNetworks(prefix.Addr())
	if err != nil {
		return nil, err
	}
	var list []string
	var seen []linkNetwork
	for _, n := range networks {
		name, ok := names[n.link]
		known := slices.ContainsFunc(seen, func(s linkNetwork) bool {
			return s.link == n.link && s.prefix.Masked() == n.prefix.Masked()
		})
		if ok && !known && n.prefix.Overlaps(prefix) {
			seen = append(seen, n)
			list = append(list, name+" "+n.prefix.String())
		}
	}
	return list, nil
}

// A linkNetwork is a network behind a link: the one of an address (with host
// bits), or a routed one.
type linkNetwork struct {
	link   int
	prefix netip.Prefix
}

// localNetworks lists the networks of the family of a, those of addresses first.
func localNetworks(a netip.Addr) ([]linkNetwork, error) {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, family) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var list []linkNetwork
	for _, a := range addrs {
		if p, ok := netipPrefix(a.IPNet); ok {
			list = append(list, linkNetwork{a.LinkIndex, p})
		}
	}
	anyTable := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Type: unix.RTN_UNICAST}
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, anyTable, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if p, ok := netipPrefix(r.Dst); ok && p.Bits() > defaultRoute {
			list = append(list, linkNetwork{r.LinkIndex, p})
		}
	}
	return list, nil
}
