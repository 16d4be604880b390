package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

// netcheckWait bounds a netcheck without a lifetime.
const netcheckWait = 20 * time.Second

// NetcheckRequest asks for a look at the network. Lifetime measures how long
// mappings live, which takes up to five minutes.
type NetcheckRequest struct {
	Lifetime bool `json:"lifetime,omitempty"`
}

// Netcheck is what a node found out of its network, from fresh sockets. Null and
// empty strings are what is not known. Only root is told addresses.
type Netcheck struct {
	Schema int    `json:"schema"`
	Name   string `json:"name"`
	// Server is the coordination server; Trouble says why it is not reached, and
	// Proxy, host:port, what TCP goes through.
	Server  string `json:"server,omitempty"`
	Online  bool   `json:"online"`
	Trouble string `json:"trouble,omitempty"`
	Proxy   string `json:"proxy,omitempty"`
	// UDP is passes, blocked, or empty: nothing was asked.
	UDP       string     `json:"udp"`
	Asked     int        `json:"asked"`    // STUN server ports
	Answered  int        `json:"answered"` // of them
	Addresses []string   `json:"addresses,omitempty"`
	Observed  []Observed `json:"observed"` // what servers saw of the WireGuard port
	IPv4      FamilyLook `json:"ipv4"`
	IPv6      FamilyLook `json:"ipv6"`
	NAT       NATStatus  `json:"nat"` // of IPv4
	Lifetime  *Lifetime  `json:"lifetime"`
	// PortMapping names the protocols by which the router forwards ports.
	PortMapping []string `json:"portMapping"`
	// DoubleNAT says that there is more than one NAT in the way; CarrierGrade that
	// the outer one is the provider's.
	DoubleNAT    *bool         `json:"doubleNAT"`
	CarrierGrade *bool         `json:"carrierGrade"`
	MTU          *int          `json:"mtu"` // of the path to the server
	Relays       []RelayStatus `json:"relays"`
	Verdict      string        `json:"verdict"`
	Help         []string      `json:"help"`
}

// Observed is what a server saw of the WireGuard port.
type Observed struct {
	Server string     `json:"server,omitempty"`
	Mapped string     `json:"mapped,omitempty"`
	Port   uint16     `json:"serverPort"`
	OK     bool       `json:"ok"` // it has answered since the network changed
	At     *time.Time `json:"at"`
}

// FamilyLook is IPv4 or IPv6: whether this machine has addresses of it that lead
// out, how many servers were asked over it and answered, and the shortest round
// trip.
type FamilyLook struct {
	Own      bool     `json:"own"`
	Asked    int      `json:"asked"`
	Answered int      `json:"answered"`
	RTTms    *float64 `json:"rttMs"`
}

// netcheck looks at the network; full is for root: with addresses.
func (s *session) netcheck(ctx context.Context, q NetcheckRequest, full bool) (Netcheck, error) {
	if !s.checking.CompareAndSwap(false, true) {
		return Netcheck{}, fail(Failure, "wait for it to end", "another netcheck is running")
	}
	defer s.checking.Store(false)
	n, servers := s.netcheckBase(full), s.stunServers()
	if err := n.look(ctx, s.agent.Network(), servers); err != nil {
		return n, fmt.Errorf("look at the network: %w", err)
	}
	if q.Lifetime && n.IPv4.Answered > 0 {
		if err := n.live(ctx, newLifetimeTest("udp4", ofFamily(servers, true)[0])); err != nil {
			return n, fmt.Errorf("measure the lifetime of mappings: %w", err)
		}
	}
	s.mu.Lock()
	mute := s.mute()
	s.mu.Unlock()
	n.conclude(mute)
	return n, nil
}

// live measures how long mappings live.
func (n *Netcheck) live(ctx context.Context, test lifetimeTest) error {
	ctx, cancel := context.WithTimeout(ctx, test.length())
	defer cancel()
	least, below, err := test.run(ctx)
	n.Lifetime = newLifetime(least, below)
	return err
}

// look asks servers over both families.
func (n *Netcheck) look(ctx context.Context, net punch.Network, servers []punch.Server) error {
	ctx, cancel := context.WithTimeout(ctx, netcheckWait)
	defer cancel()
	var four, six look
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		four, err = lookAround(gctx, "udp4", ofFamily(servers, true), hosts(net.Local))
		return err
	})
	g.Go(func() (err error) {
		six, err = lookAround(gctx, "udp6", ofFamily(servers, false), hosts(net.Local))
		if err != nil && !n.IPv6.Own {
			six, err = look{}, nil // a machine may have no such sockets at all
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	n.take(four, six, net)
	return nil
}

// netcheckBase is what is known without asking.
func (s *session) netcheckBase(full bool) Netcheck {
	s.mu.Lock()
	defer s.mu.Unlock()
	self := s.selfStatus(full)
	n := Netcheck{
		Schema: 1, Name: self.Name, Online: self.Online, Trouble: self.Trouble,
		Observed: []Observed{}, PortMapping: []string{}, Help: []string{}, Relays: s.links.status(full),
	}
	if full {
		n.Server = s.control.connected()
		for _, p := range s.local {
			n.Addresses = append(n.Addresses, p.Addr().String())
		}
		if p := s.control.proxy; p != nil {
			n.Proxy = p.Host // never with its password
		}
	}
	for _, p := range s.local {
		n.IPv4.Own = n.IPv4.Own || p.Addr().Is4()
		n.IPv6.Own = n.IPv6.Own || globalIPv6(p.Addr())
	}
	for _, r := range s.agent.Network().Servers {
		o := Observed{Port: r.Server.Port(), OK: r.Fresh, At: moment(r.At)}
		if full {
			o.Server = r.Server.String()
			if r.Mapped.IsValid() {
				o.Mapped = r.Mapped.String()
			}
		}
		n.Observed = append(n.Observed, o)
	}
	return n
}

// stunServers are those of the coordination server, then relays.
func (s *session) stunServers() []punch.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return stunServers(s.serverSTUN, s.relaySTUN)
}

func ofFamily(list []punch.Server, four bool) []punch.Server {
	return slices.DeleteFunc(slices.Clone(list), func(s punch.Server) bool { return s.Addr.Addr().Unmap().Is4() != four })
}

// take notes what the spare sockets saw.
func (n *Netcheck) take(four, six look, net punch.Network) {
	four.into(&n.IPv4)
	six.into(&n.IPv6)
	n.Asked, n.Answered = n.IPv4.Asked+n.IPv6.Asked, n.IPv4.Answered+n.IPv6.Answered
	over := func(transport string) bool {
		return slices.ContainsFunc(n.Relays, func(r RelayStatus) bool { return r.Transport == transport })
	}
	switch {
	case n.Answered > 0 || over("udp"):
		n.UDP = udpPasses
	case n.Asked > 0 && (n.Online || over("tls")): // else nothing tells UDP from no network
		n.UDP = udpBlocked
	}
	n.NAT = four.nat
	own := slices.DeleteFunc(hosts(net.Local), func(a netip.Addr) bool { return !a.Is4() })
	n.DoubleNAT, n.CarrierGrade = behindMore(n.NAT.Mapping, own, four.samples)
}

func (l *look) into(f *FamilyLook) {
	f.Asked = len(l.asked)
	for _, server := range l.asked {
		if slices.ContainsFunc(l.replies, func(r reply) bool { return r.server == server }) {
			f.Answered++
		}
	}
	for _, r := range l.replies {
		if r.rtt > 0 && (f.RTTms == nil || *milliseconds(r.rtt) < *f.RTTms) {
			f.RTTms = milliseconds(r.rtt)
		}
	}
}

// behindMore tells whether there is a second NAT, as far as addresses show it: the
// machine's own are the carrier's, or what the server sees is. Without the router's
// own address, which port mapping tells, nothing speaks against one.
func behindMore(mapping string, own []netip.Addr, samples []punch.Sample) (double, carrier *bool) {
	yes, no := true, false
	if mapping == noNAT {
		return &no, &no
	}
	seen := func(s punch.Sample) bool { return punch.CarrierGrade(s.Mapped.Addr()) }
	if slices.ContainsFunc(own, punch.CarrierGrade) || slices.ContainsFunc(samples, seen) {
		return nil, &yes
	}
	return nil, nil
}
