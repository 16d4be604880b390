package tun

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestGateways(t *testing.T) {
	s := newSpace(t)
	eth, other := cable("eth0"), cable("eth1")
	s.addLink(t, eth, "10.3.0.9/24", "192.168.7.2/24", "fe80::5/64", "2001:db8::5/64", "2001:db8::6/64", "2001:db8::7/64", "fd33::1/64")
	s.addLink(t, other, "10.4.0.2/24")
	s.do(t, func() error {
		if got, err := Gateways(); err != nil || len(got) != 0 {
			t.Errorf("without routes: %v, %v", got, err)
		}
		for _, r := range []*netlink.Route{
			{LinkIndex: other.Index, Gw: net.IPv4(10, 4, 0, 1), Priority: 600},
			{LinkIndex: eth.Index, Gw: net.IPv4(192, 168, 7, 1), Priority: 100},
			{LinkIndex: eth.Index, Gw: net.ParseIP("fe80::1"), Priority: 100},
			{LinkIndex: eth.Index, Gw: net.IPv4(10, 3, 0, 1), Dst: ipNet(netip.MustParsePrefix("0.0.0.0/1"))},
		} {
			if err := netlink.RouteAdd(r); err != nil {
				return err
			}
		}
		return nil
	})
	six := Gateway{netip.MustParseAddr("fe80::1%eth0"), []netip.Addr{netip.MustParseAddr("2001:db8::5"), netip.MustParseAddr("2001:db8::6")}, eth.Index}
	s.wantGateways(t, Gateway{netip.MustParseAddr("192.168.7.1"), []netip.Addr{netip.MustParseAddr("192.168.7.2")}, eth.Index}, six)
	s.do(t, func() error { return netlink.LinkSetDown(eth) })
	s.wantGateways(t, Gateway{netip.MustParseAddr("10.4.0.1"), []netip.Addr{netip.MustParseAddr("10.4.0.2")}, other.Index})
}

func (s *space) wantGateways(t *testing.T, want ...Gateway) {
	t.Helper()
	s.do(t, func() error {
		got, err := Gateways()
		for i := range got {
			slices.SortFunc(got[i].Local, netip.Addr.Compare)
		}
		same := slices.EqualFunc(got, want, func(x, y Gateway) bool {
			return x.Router == y.Router && x.Link == y.Link && len(x.Local) == len(y.Local)
		})
		if !same || len(got) > 0 && !slices.Equal(got[0].Local, want[0].Local) {
			t.Errorf("got %v, want %v", got, want)
		}
		return err
	})
}
