package tun

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestHostAddrs(t *testing.T) {
	s := newSpace(t)
	s.addLink(t, cable("eth0"), "10.3.0.1/24", "fd33::1/64", "fe80::5/64", "169.254.7.7/16")
	down := cable("eth1")
	s.addLink(t, down, "10.4.0.1/24")
	s.do(t, func() error { return netlink.LinkSetDown(down) })
	tap := netlink.NewLinkAttrs()
	tap.Name = "tap7"
	s.addLink(t, &netlink.Tuntap{LinkAttrs: tap, Mode: netlink.TUNTAP_MODE_TUN}, "10.5.0.1/24")
	newNode(t, s, 1)
	s.do(t, func() error {
		got, err := HostAddrs()
		want := []netip.Prefix{netip.MustParsePrefix("10.3.0.1/24"), netip.MustParsePrefix("fd33::1/64")}
		if !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		return err
	})
}

func TestOverlaps(t *testing.T) {
	s := newSpace(t)
	eth := cable("eth0")
	s.addLink(t, eth, "100.99.0.12/24", "10.3.0.1/24")
	d := newNode(t, s, 1)
	s.do(t, func() error {
		for _, r := range []struct {
			to    string
			table int
		}{{"100.64.0.0/10", 52}, {"0.0.0.0/0", 0}, {"0.0.0.0/1", 0}, {"10.77.0.0/16", 0}} {
			route := &netlink.Route{LinkIndex: eth.Index, Dst: ipNet(netip.MustParsePrefix(r.to)), Table: r.table}
			if err := netlink.RouteAdd(route); err != nil {
				return err
			}
		}
		got, err := Overlaps(mesh()[0], d.Name())
		if want := []string{"eth0 100.99.0.12/24", "eth0 100.64.0.0/10"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		if err != nil {
			return err
		}
		if got, err = Overlaps(mesh()[1], d.Name()); len(got) != 0 {
			t.Errorf("ipv6: got %q, want none", got)
		}
		if err != nil {
			return err
		}
		if got, err = Overlaps(mesh()[1], ""); len(got) != 1 {
			t.Errorf("without exception: got %q, want our own", got)
		}
		return err
	})
}

// The clock of the system goes on, whatever else it does.
func TestSinceBoot(t *testing.T) {
	before := SinceBoot()
	time.Sleep(time.Millisecond)
	if after := SinceBoot(); before <= 0 || after-before < time.Millisecond {
		t.Errorf("%v, and a millisecond later %v", before, after)
	}
}
