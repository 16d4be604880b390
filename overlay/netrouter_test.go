package overlay

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"overlay/punch/portmap"
)

func addrs(list ...string) (all []netip.Addr) {
	for _, a := range list {
		all = append(all, netip.MustParseAddr(a))
	}
	return all
}

// TestBehindMore counts NATs by what the router says of itself.
func TestBehindMore(t *testing.T) {
	yes, no := true, false
	home, seen := addrs("192.168.1.2"), addrs("203.0.113.1")
	for name, x := range map[string]struct {
		sights
		mapping         string
		double, carrier *bool
	}{
		"no word of the router": {sights{home, seen, nil}, endpointIndependent, nil, nil},
		"one":                   {sights{home, seen, seen}, endpointIndependent, &no, &no},
		"a carrier's":           {sights{home, seen, addrs("100.64.0.9")}, endpointIndependent, &yes, &yes},
		"another home router":   {sights{home, seen, addrs("192.168.178.20")}, addressPortDependent, &yes, nil},
		"another public one":    {sights{home, seen, addrs("44.7.7.1")}, endpointIndependent, &yes, nil},
		"nobody to see":         {sights{home, nil, addrs("44.7.7.1")}, "", nil, nil},
		"phone of a carrier":    {sights{addrs("100.64.0.9"), seen, nil}, endpointIndependent, nil, &yes},
		"none":                  {sights{seen, seen, nil}, noNAT, &no, &no},
	} {
		double, carrier := x.behindMore(x.mapping)
		same := func(x, y *bool) bool { return (x == nil) == (y == nil) && (x == nil || *x == *y) }
		if !same(double, x.double) || !same(carrier, x.carrier) {
			t.Errorf("%s: double %v, carrier %v", name, double, carrier)
		}
	}
}

// TestRouterLooks has the words of routers taken over, and addresses kept from
// those who may not see them.
func TestRouterLooks(t *testing.T) {
	list := []portmap.Report{
		{
			Gateway: netip.MustParseAddr("192.168.1.1"), Settled: true, Outer: netip.MustParseAddr("100.64.0.9"),
			Mapping: portmap.Mapping{Protocol: portmap.PCP, External: netip.MustParseAddrPort("100.64.0.9:7000"), DoubleNAT: true},
		},
		{
			Gateway: netip.MustParseAddr("fe80::1%eth0"), Settled: true,
			Refusals: []portmap.Refusal{{Protocol: portmap.PCP, Words: "the router refuses: result 2, not authorized"}, {Protocol: portmap.UPnP}},
		},
	}
	var n Netcheck
	n.takeRouters(list, true)
	a, b := n.Routers[0], n.Routers[1]
	if a.Router != "192.168.1.1" || a.External != "100.64.0.9:7000" || a.OuterKind != outerCarrier || !slices.Equal(n.PortMapping, []string{"pcp"}) {
		t.Errorf("%+v", n)
	}
	if b.Router != "fe80::1" || b.Protocol != "" || len(b.Refused) != 1 || !slices.Equal(b.Silent, []string{"upnp"}) || b.OuterKind != "" {
		t.Errorf("%+v", b)
	}
	n = Netcheck{}
	n.takeRouters(list, false)
	if a := n.Routers[0]; a.Router+a.External+a.Outer != "" || a.Protocol != "pcp" || a.OuterKind != outerCarrier {
		t.Errorf("others than root are told %+v", a)
	}
}

// TestVerdictWithRouters has a forwarded port be what counts, unless it is behind
// another NAT.
func TestVerdictWithRouters(t *testing.T) {
	hard := NATStatus{Mapping: addressPortDependent, Allocation: "random"}
	seen := netip.MustParseAddr("203.0.113.1")
	for name, x := range map[string]struct {
		outer, verdict, help string
	}{
		"public":   {"203.0.113.1", "the router forwards a port (pcp): direct paths work with every network that passes UDP", ""},
		"carrier":  {"100.64.0.9", "hard NAT: ports chosen per destination at random; direct with easy NATs by trying many, else over relays; behind the provider's NAT, too", "ask the provider"},
		"private":  {"192.168.178.2", "hard NAT: ports chosen per destination at random; direct with easy NATs by trying many, else over relays; behind two NATs", "ask the provider"},
		"no words": {"", "hard NAT: ports chosen per destination at random; direct with easy NATs by trying many, else over relays", "switch PCP"},
	} {
		n := Netcheck{Asked: 3, Answered: 3, UDP: udpPasses, Online: true, NAT: hard}
		n.sights.seen = []netip.Addr{seen}
		var list []portmap.Report
		if x.outer != "" {
			outer := netip.MustParseAddr(x.outer)
			list = append(list, portmap.Report{
				Gateway: netip.MustParseAddr("192.168.1.1"), Outer: outer,
				Mapping: portmap.Mapping{Protocol: portmap.PCP, External: netip.AddrPortFrom(outer, 7)},
			})
		}
		n.takeRouters(list, true)
		n.judgeNATs(list)
		n.conclude(false)
		if n.Verdict != x.verdict || !strings.HasPrefix(strings.Join(n.Help, "\n"), x.help) || (x.help == "") != (len(n.Help) == 0) {
			t.Errorf("%s: %q, help %q", name, n.Verdict, n.Help)
		}
	}
}
