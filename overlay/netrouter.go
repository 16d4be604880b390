package overlay

import (
	"net/netip"
	"slices"

	"overlay/punch"
	"overlay/punch/portmap"
	"overlay/tun"
)

// RouterLook is what a router says when it is asked to forward a port to this
// machine. Protocol is how it does, empty where it does not.
type RouterLook struct {
	Router   string `json:"router,omitempty"`
	Protocol string `json:"protocol,omitempty"`
	External string `json:"external,omitempty"` // where it lets peers in
	// Outer is the router's own outer address, as it says, and OuterKind tells what
	// it is worth: public, private, carrier (100.64.0.0/10), or empty: not known.
	Outer     string `json:"outer,omitempty"`
	OuterKind string `json:"outerKind,omitempty"`
	// Refused are the router's words by protocol, Silent the protocols by which it
	// does not answer. Settled is false while it is still asked.
	Refused []RouterRefusal `json:"refused"`
	Silent  []string        `json:"silent"`
	Settled bool            `json:"settled"`

	four bool // of IPv4
}

// RouterRefusal is a protocol by which a router answers, and maps nothing.
type RouterRefusal struct {
	Protocol string `json:"protocol"`
	Words    string `json:"words"`
}

// The kinds of a router's outer address.
const (
	outerPublic  = "public"
	outerPrivate = "private"
	outerCarrier = "carrier"
)

func outerKind(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return ""
	case punch.CarrierGrade(a):
		return outerCarrier
	case a.IsPrivate():
		return outerPrivate
	}
	return outerPublic
}

// routes are the ways to the routers that there are now.
func routes() ([]portmap.Route, error) {
	list, err := tun.Gateways()
	if err != nil {
		return nil, err
	}
	var all []portmap.Route
	for _, g := range list {
		for _, local := range g.Local {
			all = append(all, portmap.Route{Gateway: g.Router, Local: local, Link: g.Link})
		}
	}
	return all, nil
}

// reports are what routers said of the WireGuard port; nil: they are not asked.
func (s *session) reports() []portmap.Report {
	if s.mapper == nil {
		return nil
	}
	port := s.dev.Load().Port()
	return slices.DeleteFunc(s.mapper.Reports(), func(r portmap.Report) bool { return r.Port != port })
}

// takeRouters notes what routers said.
func (n *Netcheck) takeRouters(list []portmap.Report, full bool) {
	for _, r := range list {
		x := RouterLook{
			Settled: r.Settled, OuterKind: outerKind(r.Outer), Protocol: r.Mapping.Protocol,
			Refused: []RouterRefusal{}, Silent: []string{}, four: r.Gateway.Is4(),
		}
		for _, f := range r.Refusals {
			if f.Words == "" {
				x.Silent = append(x.Silent, f.Protocol)
			} else {
				x.Refused = append(x.Refused, RouterRefusal{f.Protocol, f.Words})
			}
		}
		if full {
			x.Router = r.Gateway.WithZone("").String()
			if r.Outer.IsValid() {
				x.Outer = r.Outer.String()
			}
			if r.Mapping.External.IsValid() {
				x.External = r.Mapping.External.String()
			}
		}
		if x.Protocol != "" && !slices.Contains(n.PortMapping, x.Protocol) {
			n.PortMapping = append(n.PortMapping, x.Protocol)
		}
		n.Routers = append(n.Routers, x)
	}
}

// outers are the outer addresses of routers, of IPv4.
func outers(list []portmap.Report) []netip.Addr {
	var all []netip.Addr
	for _, r := range list {
		if r.Outer.Is4() {
			all = append(all, r.Outer)
		}
	}
	return all
}

// sights are the addresses of IPv4 by which something knows this machine: its
// own, those that servers see, and the outer ones of its routers.
type sights struct{ own, seen, outer []netip.Addr }

// behindMore tells whether there is a second NAT, and whether it is the provider's,
// as far as addresses show it. Without the router's own word nothing speaks against
// a second one.
func (s sights) behindMore(mapping string) (double, carrier *bool) {
	yes, no := true, false
	if mapping == noNAT {
		return &no, &no
	}
	shared := punch.CarrierGrade
	for _, a := range s.outer {
		switch {
		case shared(a):
			return &yes, &yes
		case a.IsPrivate(), len(s.seen) > 0 && !slices.Contains(s.seen, a):
			return &yes, nil
		case len(s.seen) > 0:
			return &no, &no
		}
	}
	if slices.ContainsFunc(s.own, shared) || slices.ContainsFunc(s.seen, shared) {
		return nil, &yes
	}
	return nil, nil
}
