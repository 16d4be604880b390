package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
	"overlay/punch/portmap"
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
	Asked     int        `json:"asked"`               // STUN server ports
	Answered  int        `json:"answered"`            // of them
	Addresses []string   `json:"addresses,omitempty"` // this machine's
	Public    []string   `json:"public,omitempty"`    // at which servers see it
	Observed  []Observed `json:"observed"`            // what servers saw of the WireGuard port
	IPv4      FamilyLook `json:"ipv4"`
	IPv6      FamilyLook `json:"ipv6"`
	NAT       NATStatus  `json:"nat"` // of IPv4
	Lifetime  *Lifetime  `json:"lifetime"`
	// PortMapping names the protocols by which the router forwards ports, Routers
	// what each said. MappingOff: they are not asked, because the user wants it so;
	// MappingTrouble is why they could not be asked.
	PortMapping    []string     `json:"portMapping"`
	Routers        []RouterLook `json:"routers"`
	MappingOff     bool         `json:"portMappingOff,omitempty"`
	MappingTrouble string       `json:"portMappingTrouble,omitempty"`
	// DoubleNAT says that there is more than one NAT in the way; CarrierGrade that
	// the outer one is the provider's.
	DoubleNAT    *bool         `json:"doubleNAT"`
	CarrierGrade *bool         `json:"carrierGrade"`
	MTU          *int          `json:"mtu"`     // of the path to the server, packets of at most 1500 bytes
	LinkMTU      *int          `json:"linkMTU"` // of the interface that leads out
	Relays       []RelayStatus `json:"relays"`
	Verdict      string        `json:"verdict"`
	Help         []string      `json:"help"`

	sights   sights
	answered []punch.Server // those of IPv4 first
	full     bool           // with addresses
	alone    bool           // no daemon runs
	tcp      bool           // and the server is reached over TCP
	lost     bool           // a relay answered over UDP a moment ago, and nothing does now
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
	if len(servers) == 0 { // not connected since the start
		servers = readSaved(s.store).servers(ctx)
	}
	if err := n.examine(ctx, s.agent.Network().Local, servers); err != nil {
		return n, err
	}
	if err := n.live(ctx, q); err != nil {
		return n, err
	}
	list := s.reports()
	n.takeRouters(list, full)
	n.judgeNATs(list)
	s.mu.Lock()
	mute := s.mute()
	s.mu.Unlock()
	n.conclude(mute)
	return n, nil
}

// examine looks at the network from fresh sockets.
func (n *Netcheck) examine(ctx context.Context, local []netip.Prefix, servers []punch.Server) error {
	ctx, cancel := context.WithTimeout(ctx, netcheckWait)
	defer cancel()
	if err := n.look(ctx, local, servers); err != nil {
		return fmt.Errorf("look at the network: %w", err)
	}
	n.LinkMTU = linkMTU()
	if err := n.measureMTU(ctx); err != nil {
		return fmt.Errorf("measure the path to the server: %w", err)
	}
	return nil
}

// measureMTU measures the way to a server that has answered.
func (n *Netcheck) measureMTU(ctx context.Context) error {
	if n.Answered == 0 {
		return nil
	}
	network := "udp4"
	if n.IPv4.Answered == 0 {
		network = "udp6"
	}
	mtu, err := pathMTU(ctx, network, n.answered[0])
	if mtu > 0 {
		n.MTU = &mtu
	}
	return err
}

// judgeNATs tells how many NATs there are, as far as it shows.
func (n *Netcheck) judgeNATs(list []portmap.Report) {
	n.sights.outer = outers(list)
	n.DoubleNAT, n.CarrierGrade = n.sights.behindMore(n.NAT.Mapping)
}

// live measures how long mappings live, if that is wanted.
func (n *Netcheck) live(ctx context.Context, q NetcheckRequest) error {
	if !q.Lifetime || n.IPv4.Answered == 0 {
		return nil
	}
	test := newLifetimeTest("udp4", n.answered[0])
	ctx, cancel := context.WithTimeout(ctx, test.length())
	defer cancel()
	least, below, err := test.run(ctx)
	n.Lifetime = newLifetime(least, below)
	if err != nil {
		return fmt.Errorf("measure the lifetime of mappings: %w", err)
	}
	return nil
}

// look asks servers over both families.
func (n *Netcheck) look(ctx context.Context, local []netip.Prefix, servers []punch.Server) error {
	var four, six look
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		four, err = lookAround(gctx, "udp4", ofFamily(servers, true), hosts(local))
		return err
	})
	g.Go(func() (err error) {
		six, err = lookAround(gctx, "udp6", ofFamily(servers, false), hosts(local))
		if err != nil && !n.IPv6.Own {
			six, err = look{}, nil // a machine may have no such sockets at all
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	n.take(four, six, local)
	return nil
}

// netcheckBase is what is known without asking.
func (s *session) netcheckBase(full bool) Netcheck {
	s.mu.Lock()
	defer s.mu.Unlock()
	self := s.selfStatus(full)
	n := Netcheck{
		Schema: 1, Name: self.Name, Online: self.Online, Trouble: self.Trouble,
		Observed: []Observed{}, PortMapping: []string{}, Routers: []RouterLook{}, Help: []string{}, Relays: s.links.status(full),
		MappingOff: s.mapper == nil,
	}
	n.takeLocal(s.local, full)
	if full {
		n.Server = s.control.connected()
		if p := s.control.proxy; p != nil {
			n.Proxy = p.Host // never with its password
		}
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

// takeLocal notes this machine's addresses.
func (n *Netcheck) takeLocal(local []netip.Prefix, full bool) {
	n.full = full
	for _, p := range local {
		n.IPv4.Own = n.IPv4.Own || p.Addr().Is4()
		n.IPv6.Own = n.IPv6.Own || globalIPv6(p.Addr())
		if full {
			n.Addresses = append(n.Addresses, p.Addr().String())
		}
	}
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
func (n *Netcheck) take(four, six look, local []netip.Prefix) {
	four.into(&n.IPv4)
	six.into(&n.IPv6)
	n.Asked, n.Answered = n.IPv4.Asked+n.IPv6.Asked, n.IPv4.Answered+n.IPv6.Answered
	n.answered = slices.Concat(four.answered, six.answered)
	over := func(transport string) bool {
		return slices.ContainsFunc(n.Relays, func(r RelayStatus) bool { return r.Transport == transport })
	}
	switch {
	case n.Answered > 0, n.Asked == 0 && over("udp"):
		n.UDP = udpPasses
	case over("udp"): // which nobody has noticed yet
		n.lost = true
	case n.Asked > 0 && (n.Online || n.tcp || over("tls")): // else nothing tells UDP from no network
		n.UDP = udpBlocked
	}
	n.NAT = four.nat
	n.sights.own = slices.DeleteFunc(hosts(local), func(a netip.Addr) bool { return !a.Is4() })
	n.sights.seen = four.public()
	if n.full {
		for _, a := range append(four.public(), six.public()...) {
			n.Public = append(n.Public, a.String())
		}
	}
}

// public are the addresses at which servers saw the sockets.
func (l *look) public() (list []netip.Addr) {
	for _, s := range l.samples {
		if a := s.Mapped.Addr(); !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	return list
}

func (l *look) into(f *FamilyLook) {
	f.Asked, f.Answered = l.asked, len(l.answered)
	for _, r := range l.replies {
		if r.rtt > 0 && (f.RTTms == nil || *milliseconds(r.rtt) < *f.RTTms) {
			f.RTTms = milliseconds(r.rtt)
		}
	}
}
