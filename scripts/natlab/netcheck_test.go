package natlab

import (
	"strings"
	"testing"

	"overlay/overlay"
)

// checked is the netcheck of a new member in a home.
func (m *mesh) checked(t *testing.T, name string, h *Home) overlay.Netcheck {
	t.Helper()
	return m.join(t, mustLaptop(t, h, name)).netcheck(t)
}

func mustCarrier(t *testing.T, l *Lab, name string, nat NAT) *Home {
	t.Helper()
	h, err := l.Carrier(t.Context(), name, nat)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestNetcheckRouters has netcheck tell by which protocol the router forwards a
// port, and what that is worth, or why it does not.
func TestNetcheckRouters(t *testing.T) {
	m := newMesh(t)
	const forwards = "the router forwards a port ("
	list := []struct {
		kind            PortMapping
		carrier         bool
		protocol, outer string
		double, shared  string
		verdict         string
	}{
		{MapPCP, false, "pcp", "public", "no", "no", forwards + "pcp)"},
		{MapShared, true, "pcp", "carrier", "yes", "yes", "hard NAT: ports chosen per destination at random"},
		{MapRefused, true, "", "", "", "", "hard NAT: ports chosen per destination at random"},
		{MapNATPMP, false, "nat-pmp", "public", "no", "no", forwards + "nat-pmp)"},
		{MapUPnP1, false, "upnp", "public", "no", "no", forwards + "upnp)"},
		{MapPCP, true, "pcp", "public", "yes", "", "hard NAT: ports chosen per destination at random"},
		{MapNone, false, "", "", "", "", "hard NAT: ports chosen per destination at random"},
	}
	for _, x := range list[:runs(2, len(list))] {
		name := string(x.kind)
		var carrier *Home
		if x.carrier {
			name += "-c"
			carrier = mustCarrier(t, m.Lab, "carrier-"+name, Masquerade)
		}
		t.Run(name, func(t *testing.T) {
			c := m.checked(t, "n-"+name, mustHardHome(t, m.Lab, "h-"+name, x.kind, carrier))
			if len(c.Routers) != 1 {
				t.Fatalf("routers: %+v", c.Routers)
			}
			r := c.Routers[0]
			if r.Protocol != x.protocol || r.OuterKind != x.outer || (r.External != "") != (x.protocol != "") {
				t.Errorf("router: %+v", r)
			}
			if said(c.DoubleNAT) != x.double || said(c.CarrierGrade) != x.shared || !strings.HasPrefix(c.Verdict, x.verdict) {
				t.Errorf("double NAT %q, carrier's %q, %q", said(c.DoubleNAT), said(c.CarrierGrade), c.Verdict)
			}
			if refused := len(r.Refused) > 0; refused != (x.kind == MapRefused) {
				t.Errorf("refused: %+v", r)
			}
		})
	}
}

// said is what is known: yes, no, or nothing.
func said(b *bool) string {
	switch {
	case b == nil:
		return ""
	case *b:
		return "yes"
	}
	return "no"
}

// TestNetcheckHairpin has a router whose hosts reach each other by their mappings,
// and one where they do not.
func TestNetcheckHairpin(t *testing.T) {
	m := newMesh(t)
	for nat, want := range map[NAT]string{Hairpin: "yes", Masquerade: "no", FullCone: "no"} {
		c := m.checked(t, string(nat), mustHome(t, m.Lab, "home-"+string(nat), nat))
		if got := said(c.NAT.Hairpin); got != want || c.NAT.Mapping != "endpoint-independent" {
			t.Errorf("%s: hairpin %q, want %q: %+v", nat, got, want, c.NAT)
		}
	}
}

// TestNetcheckMTU measures a line that carries less than the LAN, and says nothing.
func TestNetcheckMTU(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("overlay has the short form")
	}
	m := newMesh(t)
	for nat, want := range map[NAT]int{SmallMTU: smallMTU, Masquerade: 1500} {
		c := m.checked(t, string(nat), mustHome(t, m.Lab, "home-"+string(nat), nat))
		if c.MTU == nil || *c.MTU != want || c.LinkMTU == nil || *c.LinkMTU != 1500 {
			t.Errorf("%s: mtu %v, of the link %v; want %d", nat, c.MTU, c.LinkMTU, want)
		}
	}
}

// TestNetcheckFiltering tells filtering by ports from one server alone, and by
// addresses when there is a relay with another address.
func TestNetcheckFiltering(t *testing.T) {
	m := newMesh(t)
	list := []struct {
		nat        NAT
		alone, two string
	}{
		{Restricted, "at-most-address-dependent", "address-dependent"},
		{FullCone, "at-most-address-dependent", "endpoint-independent"},
		{Masquerade, "address-and-port-dependent", "address-and-port-dependent"},
	}
	list = list[:runs(1, len(list))]
	var nodes []*member
	for _, x := range list {
		n := m.join(t, mustLaptop(t, mustHome(t, m.Lab, "home-"+string(x.nat), x.nat), string(x.nat)))
		if c := n.netcheck(t); c.NAT.Filtering != x.alone {
			t.Errorf("%s, one server: %q, want %q", x.nat, c.NAT.Filtering, x.alone)
		}
		nodes = append(nodes, n)
	}
	m.addRelay(t, "relay")
	for i, x := range list {
		if _, err := nodes[i].awaitRelay(t.Context(), "relay", true); err != nil {
			t.Fatal(err)
		}
		if c := nodes[i].netcheck(t); c.NAT.Filtering != x.two {
			t.Errorf("%s, and a relay: %q, want %q", x.nat, c.NAT.Filtering, x.two)
		}
	}
}

// TestNetcheckAlone has the same found out without a daemon, and nothing left on
// the router.
func TestNetcheckAlone(t *testing.T) {
	m := newMesh(t)
	a := m.join(t, mustLaptop(t, mustHardHome(t, m.Lab, "home-a", MapPCP, nil), "a"))
	b := m.join(t, m.laptopAt(t, "b", UDPBlocked))
	for _, n := range []*member{a, b} {
		if err := n.down(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	c := a.netcheck(t)
	if c.Online || c.Trouble == "" || c.UDP != "passes" || c.Name != "a" || c.Server == "" || c.MTU == nil {
		t.Errorf("%+v", c)
	}
	if !strings.HasPrefix(c.Verdict, "the router forwards a port (pcp)") || c.NAT.Allocation != "random" || said(c.DoubleNAT) != "no" {
		t.Errorf("%q, %+v", c.Verdict, c.NAT)
	}
	wantMapped(t, a.home, 0)
	if c := b.netcheck(t); c.UDP != "blocked" || !strings.HasPrefix(c.Verdict, "UDP is blocked") {
		t.Errorf("%q: %+v", c.UDP, c.Verdict)
	}
}
