package tun

import (
	"context"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// watch counts the calls of Watch in the namespace until the test ends.
func watch(t *testing.T, s *space) *atomic.Int64 {
	t.Helper()
	calls := new(atomic.Int64)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(s.fd, unix.CLONE_NEWNET)
		if err == nil {
			err = Watch(ctx, func(bool) { calls.Add(1) })
		}
		done <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
	// Watch is ready when it sees a change.
	probe := cable("probe")
	s.addLink(t, probe)
	for i := 1; calls.Load() == 0; i++ {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200, 0, byte(i)}), 32))}
		s.do(t, func() error { return netlink.AddrAdd(probe, addr) })
		time.Sleep(20 * time.Millisecond)
		if i == 200 {
			t.Fatal("Watch tells nothing")
		}
	}
	settle(calls)
	return calls
}

// settle waits until nothing was told for ten bursts.
func settle(calls *atomic.Int64) {
	for {
		before := calls.Load()
		time.Sleep(10 * burst)
		if calls.Load() == before {
			return
		}
	}
}

func TestWatch(t *testing.T) {
	s := newSpace(t)
	eth := cable("eth0")
	s.addLink(t, eth, "10.3.0.1/24", "fd33::1/64")
	gateway := &netlink.Route{Gw: netip.MustParseAddr("10.3.0.254").AsSlice()}
	s.do(t, func() error { return netlink.RouteAdd(gateway) })
	calls := watch(t, s)
	steps := []struct {
		what string
		told bool
		do   func() error
	}{
		{"address added", true, func() error { return netlink.AddrAdd(eth, mustAddr(t, "10.4.0.1/24")) }},
		{"address removed", true, func() error { return netlink.AddrDel(eth, mustAddr(t, "10.4.0.1/24")) }},
		{"ipv6 address renewed", false, func() error { return netlink.AddrReplace(eth, mustAddr(t, "fd33::1/64")) }},
		{"link-local address", false, func() error { return netlink.AddrAdd(eth, mustAddr(t, "fe80::77/64")) }},
		{"small route", false, func() error {
			return netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Index, Dst: ipNet(netip.MustParsePrefix("10.8.0.0/24"))})
		}},
		{"default route removed", true, func() error { return netlink.RouteDel(gateway) }},
		{"default route added", true, func() error { return netlink.RouteAdd(gateway) }},
		{"link without addresses", false, func() error {
			l := cable("eth9")
			if err := netlink.LinkAdd(l); err != nil {
				return err
			}
			return netlink.LinkSetUp(l)
		}},
		{"link down", true, func() error { return netlink.LinkSetDown(eth) }},
		{"link up", true, func() error { return netlink.LinkSetUp(eth) }},
		{"link deleted", true, func() error { return netlink.LinkDel(eth) }},
	}
	for _, step := range steps {
		before := calls.Load()
		s.do(t, step.do)
		if step.told {
			eventually(t, 2*time.Second, step.what, func() bool { return calls.Load() > before })
		}
		settle(calls)
		if n := calls.Load() - before; !step.told && n != 0 || n > 4 {
			t.Errorf("%s: told %d times", step.what, n)
		}
	}
}

// Our own interface comes, is repaired and goes: that is no change of the host.
func TestWatchIgnoresOwnInterface(t *testing.T) {
	s := newSpace(t)
	calls := watch(t, s)
	before := calls.Load()
	d := newNode(t, s, 1, func(c *Config) {
		c.Routes = append(c.Routes, netip.MustParsePrefix("0.0.0.0/1"))
	})
	s.do(t, func() error {
		return netlink.AddrDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: d.link.index}}, mustAddr(t, "100.99.0.1/16"))
	})
	eventually(t, 3*time.Second, "the repair", func() bool { return slices.Contains(kernelState(t, s, d.Name()), wholeState()[0]) })
	d.stop()
	check(t, d.Close())
	settle(calls)
	if n := calls.Load() - before; n != 0 {
		t.Errorf("told %d times of our own interface", n)
	}
}

func TestJudge(t *testing.T) {
	const eth, own = 2, 3
	addr := netip.MustParsePrefix("192.0.2.1/24")
	start := func() *watcher {
		return &watcher{
			links: map[int]linkState{eth: {running: true}, own: {running: true, own: true}},
			addrs: map[addrKey]uint32{{eth, addr}: 0},
		}
	}
	prefix := netip.MustParsePrefix
	for what, c := range map[string]struct {
		e    event
		want verdict
	}{
		"default route lost":        {event{kind: unix.RTM_DELROUTE, link: eth, prefix: prefix("0.0.0.0/0")}, lost},
		"half of the default lost":  {event{kind: unix.RTM_DELROUTE, link: eth, prefix: prefix("128.0.0.0/1")}, lost},
		"ipv6 default route lost":   {event{kind: unix.RTM_DELROUTE, prefix: prefix("::/0")}, lost},
		"default route":             {event{kind: unix.RTM_NEWROUTE, link: eth, prefix: prefix("::/0")}, routed},
		"wide route":                {event{kind: unix.RTM_NEWROUTE, link: eth, prefix: prefix("10.0.0.0/8")}, routed},
		"small route":               {event{kind: unix.RTM_DELROUTE, link: eth, prefix: prefix("10.0.0.0/9")}, ignored},
		"our default route":         {event{kind: unix.RTM_DELROUTE, link: own, prefix: prefix("0.0.0.0/0")}, ignored},
		"link lost":                 {event{kind: unix.RTM_NEWLINK, link: eth, flags: unix.IFF_UP}, lost},
		"link deleted":              {event{kind: unix.RTM_DELLINK, link: eth, flags: unix.IFF_UP | unix.IFF_RUNNING}, lost},
		"link as before":            {event{kind: unix.RTM_NEWLINK, link: eth, flags: unix.IFF_UP | unix.IFF_RUNNING}, ignored},
		"our link":                  {event{kind: unix.RTM_DELLINK, link: own}, ignored},
		"address as before":         {event{kind: unix.RTM_NEWADDR, link: eth, prefix: addr}, ignored},
		"address out of date":       {event{kind: unix.RTM_NEWADDR, link: eth, prefix: addr, flags: unix.IFA_F_DEPRECATED}, moved},
		"address of another length": {event{kind: unix.RTM_NEWADDR, link: eth, prefix: prefix("192.0.2.1/25")}, moved},
		"our address":               {event{kind: unix.RTM_NEWADDR, link: own, prefix: prefix("100.99.0.1/16")}, ignored},
		"link-local address":        {event{kind: unix.RTM_DELADDR, link: eth, prefix: prefix("fe80::1/64")}, ignored},
		"address removed":           {event{kind: unix.RTM_DELADDR, link: eth, prefix: addr}, moved},
	} {
		if got := start().judge(c.e); got != c.want {
			t.Errorf("%s: verdict %d, want %d", what, got, c.want)
		}
	}
}
