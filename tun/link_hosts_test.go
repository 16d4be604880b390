package tun

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// hostRoutes lists the routes of an interface with an MTU of their own.
func hostRoutes(t *testing.T, s *space, name string) (list []string) {
	t.Helper()
	s.do(t, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
		for _, r := range routes {
			if r.MTU > 0 {
				list = append(list, fmt.Sprintf("%s mtu %d %v", r.Dst, r.MTU, r.MTULock))
			}
		}
		return err
	})
	slices.Sort(list)
	return list
}

// A peer that takes no fragments gets routes with the MTU of its path, as long as
// it needs them.
func TestPathMTURoutes(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	k := newKey(t).PublicKey()
	peer := Peer{
		Key: k, Handle: netip.MustParseAddr("fd99::2"),
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("100.99.0.2/32"), netip.MustParsePrefix("fd99::2/128")},
	}
	path, other := netip.MustParseAddrPort("192.0.2.9:5"), netip.MustParseAddrPort("192.0.2.9:6")
	narrow := []string{"100.99.0.2/32 mtu 1216 true", "fd99::2/128 mtu 1216 true"}
	large := peer
	large.Capabilities = Large
	set := func(list ...Peer) func() { return func() { check(t, d.SetPeers(list)) } }
	to := func(path netip.AddrPort, size int) func() {
		return func() {
			check(t, d.SetEndpoint(k, path, netip.AddrPort{}))
			d.SetPathMTU(k, path, size)
		}
	}
	for i, step := range []struct {
		do   func()
		want []string
	}{
		{set(peer), nil},
		{to(path, 1432), nil},
		{func() { d.SetPathMTU(k, path, 1252) }, narrow},
		{to(other, 0), nil},
		{to(path, 1252), narrow},
		{func() { d.SetPathMTU(k, other, 1432) }, narrow}, // not the path in use
		{set(large), nil},
		{set(peer), narrow},
		{func() { d.SetPathMTU(k, path, 996) }, []string{"100.99.0.2/32 mtu 960 true", "fd99::2/128 mtu 960 true"}},
		{func() { d.SetPathMTU(k, path, 1472) }, nil},
		{func() { d.SetPathMTU(k, path, 1252) }, narrow},
		{set(), nil},
	} {
		step.do()
		if got := hostRoutes(t, s, d.Name()); !slices.Equal(got, step.want) {
			t.Fatalf("step %d: %q, want %q", i, got, step.want)
		}
	}
	if got := kernelState(t, s, d.Name()); !slices.Equal(got, wholeState()) {
		t.Errorf("left behind: %q", got)
	}
	eventually(t, 5*time.Second, "our own changes are known as such", func() bool {
		d.link.mu.Lock()
		defer d.link.mu.Unlock()
		return len(d.link.ended) == 0
	})
	set(peer)()
	to(path, 1252)()
	s.do(t, func() error {
		return netlink.RouteDel(&netlink.Route{LinkIndex: d.link.index, Dst: ipNet(peer.AllowedIPs[0]), Scope: netlink.SCOPE_LINK})
	})
	eventually(t, 5*time.Second, "a route that somebody removed", func() bool {
		return slices.Equal(hostRoutes(t, s, d.Name()), narrow)
	})
}
