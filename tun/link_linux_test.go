package tun

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// kernelState lists the addresses and routes of an interface as the kernel has
// them, IPv6 multicast and link-local left out.
func kernelState(t *testing.T, s *space, name string) (list []string) {
	t.Helper()
	s.do(t, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			list = append(list, "addr "+a.IPNet.String())
		}
		routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, r := range routes {
			list = append(list, "route "+r.Dst.String()+" src "+r.Src.String())
		}
		return nil
	})
	slices.Sort(list)
	return list
}

// wholeState is kernelState of node 1 when nothing is missing.
func wholeState() []string {
	return []string{
		"addr 100.99.0.1/16", "addr fd99::1/48",
		"route 100.99.0.0/16 src 100.99.0.1", "route fd99::/48 src <nil>",
	}
}

func TestInterface(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	if got := kernelState(t, s, d.Name()); !slices.Equal(got, wholeState()) {
		t.Errorf("got %q, want %q", got, wholeState())
	}
	s.do(t, func() error {
		l, err := netlink.LinkByName(d.Name())
		if err != nil {
			return err
		}
		if l.Attrs().MTU != 1400 {
			t.Errorf("mtu %d, want 1400", l.Attrs().MTU)
		}
		return nil
	})
	// Usable at once: no duplicate address detection.
	c := listenIn(t, s, "[fd99::1]:0")
	check(t, c.Close())
}

func TestInterfaceIsRepaired(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	l := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: d.link.index}}
	del := func(a string) func() error {
		return func() error { return netlink.AddrDel(l, mustAddr(t, a)) }
	}
	for _, step := range []struct {
		what string
		do   []func() error
	}{
		{"ipv4 address removed", []func() error{del("100.99.0.1/16")}},
		{"ipv6 address removed", []func() error{del("fd99::1/48")}},
		{"route removed", []func() error{func() error {
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Index, Dst: ipNet(mesh()[0]), Scope: netlink.SCOPE_LINK})
		}}},
		{"down and up", []func() error{
			func() error { return netlink.LinkSetDown(l) },
			func() error { return netlink.LinkSetUp(l) },
		}},
	} {
		for _, f := range step.do {
			s.do(t, f)
		}
		if len(step.do) == 1 && slices.Equal(kernelState(t, s, d.Name()), wholeState()) {
			t.Logf("%s: repaired before we could look", step.what)
		}
		eventually(t, 5*time.Second, step.what, func() bool {
			return slices.Equal(kernelState(t, s, d.Name()), wholeState())
		})
	}
	if d.Port() == 0 {
		t.Error("a link that went down closed the sockets")
	}
}

// Somebody who keeps removing the address is not fought.
func TestRepairsAreRare(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	l := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: d.link.index}}
	removed := 0
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		s.do(t, func() error {
			if netlink.AddrDel(l, mustAddr(t, "100.99.0.1/16")) == nil {
				removed++
			}
			return nil
		})
	}
	if removed < 2 || removed > 4 { // the first one, and one per second
		t.Errorf("the address was there to remove %d times in 1.5 s, want 2 or 3", removed)
	}
}

func TestDeletedInterfaceEndsRun(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	s.do(t, func() error {
		return netlink.LinkDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: d.link.index}})
	})
	select {
	case err := <-d.ran:
		if !errors.Is(err, ErrInterfaceGone) {
			t.Errorf("Run: %v, want %v", err, ErrInterfaceGone)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Run goes on without an interface")
	}
}

// The user's own route to the same network stays as it is.
func TestForeignRouteStays(t *testing.T) {
	s := newSpace(t)
	eth := cable("eth5")
	s.addLink(t, eth, "10.7.0.1/24")
	foreign := &netlink.Route{Dst: ipNet(mesh()[0]), Scope: netlink.SCOPE_LINK}
	s.do(t, func() error {
		foreign.LinkIndex = eth.Index
		return netlink.RouteAdd(foreign)
	})
	newNode(t, s, 1)
	s.do(t, func() error {
		r, err := netlink.RouteGet(foreign.Dst.IP.To4())
		if err == nil && r[0].LinkIndex != eth.Index {
			t.Errorf("%v goes over link %d, want %d as before", foreign.Dst, r[0].LinkIndex, eth.Index)
		}
		return err
	})
}

func TestWithoutIPv6(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1, func(c *Config) { c.MTU = 1200 })
	want := []string{wholeState()[0], wholeState()[2]}
	if got := kernelState(t, s, d.Name()); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSource(t *testing.T) {
	l := &link{addrs: []netip.Prefix{
		netip.MustParsePrefix("10.1.0.1/16"), netip.MustParsePrefix("fd01::1/48"), netip.MustParsePrefix("10.2.0.1/16"),
	}}
	for route, want := range map[string]string{
		"10.1.0.0/16": "10.1.0.1", "10.2.0.0/16": "10.2.0.1", "10.3.0.0/16": "10.1.0.1",
	} {
		if got := l.source(netip.MustParsePrefix(route)); got.String() != want {
			t.Errorf("source for %s: %v, want %s", route, got, want)
		}
	}
	l.addrs = l.addrs[1:2]
	if got := l.source(netip.MustParsePrefix("10.1.0.0/16")); got != nil {
		t.Errorf("source of the other family: %v", got)
	}
}
