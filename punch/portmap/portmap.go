// Package portmap asks the router of the network for a way in: a port on its
// outer address from which packets of anybody reach ours. It speaks PCP (RFC 6887),
// also for the firewalls of IPv6, NAT-PMP (RFC 6886) and UPnP IGD 1 and 2.
//
//	portmap.go   the Mapper: one site for each way to a router and port of ours
//	report.go    what routers said, also where they map nothing
//	site.go      what happens at a site: find a protocol, map, renew, remove
//	race.go      all protocols are looked for at once; the best that answers wins
//	pcp.go, natpmp.go, upnp.go   the protocols
//	exchange.go  requests over UDP; epoch.go tells from the answers that a router forgot
//	ssdp.go, device.go   where a UPnP router is, and what it offers
//	announce.go  what routers say unasked after a restart
//
// A mapping is worth a candidate and no more: whoever forges one sends a check of
// the peer astray, and nothing else. Answers count only from the router's address.
package portmap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Route is a way to a router, which is asked for mappings. Gateway is its
// address, with a zone if it is link-local; Local is ours, of the same family, from
// which it is asked and to which it shall map. Link is the index of the interface,
// where announcements are listened to; 0: nowhere.
type Route struct {
	Gateway netip.Addr
	Local   netip.Addr
	Link    int
}

// The protocols of Mapping.Protocol.
const (
	PCP    = "pcp"
	NATPMP = "nat-pmp"
	UPnP   = "upnp"
)

// Mapping is a way in. External leads to our Port at Local, as the router says.
// DoubleNAT says that External is an address of a carrier or of another home
// network: it is of use only for peers behind the same one.
type Mapping struct {
	External  netip.AddrPort
	Local     netip.Addr
	Port      uint16
	Protocol  string
	Lifetime  time.Duration
	DoubleNAT bool
}

// Config tells a Mapper what to map. OnMapping is called from Run whenever the
// mappings change, with all of them; it must not block.
type Config struct {
	Port uint16 // UDP, ours, at first: see SetPorts
	// Name is what people see in the router's list.
	Name string
	// Secret makes the nonces by which PCP knows who owns a mapping, so that a
	// program that was killed gets its mapping back. Empty: others at every start.
	Secret    []byte
	OnMapping func([]Mapping)
	Log       *slog.Logger // nil: silent
}

// MaxRoutes is how many routes are used, and MaxPorts how many ports of ours are
// mapped at each; further ones are ignored.
const (
	MaxRoutes = 4
	MaxPorts  = 4
)

var errNoPort = errors.New("no port to map")

// Mapper keeps mappings at the routers of the current network. Create it with
// New, give it goroutines with Run; its methods are safe for concurrent use.
type Mapper struct {
	cfg  Config
	log  *slog.Logger
	wake chan struct{}
	told func() // of every change; nil: nobody

	mu     sync.Mutex
	routes []Route
	ports  []uint16
	sites  map[place]*site // of those that run
	held   map[place]Mapping
	said   map[place]said
}

// place is where a mapping is held: one port of ours at one router.
type place struct {
	Route
	port uint16
}

// New returns a Mapper that does nothing before Run. The error is a Config
// without a port.
func New(c Config) (*Mapper, error) {
	if c.Port == 0 {
		return nil, fmt.Errorf("new port mapper: %w", errNoPort)
	}
	m := &Mapper{
		cfg: c, log: c.Log, wake: make(chan struct{}, 1), ports: []uint16{c.Port},
		sites: map[place]*site{}, held: map[place]Mapping{}, said: map[place]said{},
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if len(c.Secret) == 0 {
		m.cfg.Secret = randomSecret()
	}
	return m, nil
}

// SetRoutes says which routers there are now. Call it at every change of the
// network: routers that stay are asked whether they are still the same.
func (m *Mapper) SetRoutes(routes []Route) {
	m.mu.Lock()
	m.routes = nil
	for _, r := range routes {
		if r.usable() && !slices.Contains(m.routes, r) && len(m.routes) < MaxRoutes {
			m.routes = append(m.routes, r)
		}
	}
	m.mu.Unlock()
	m.notify()
	m.Check()
}

// SetPorts says which of our UDP ports are to be mapped from now on, in the place
// of Config.Port and of earlier ones: those that are not among them are closed.
func (m *Mapper) SetPorts(ports ...uint16) {
	m.mu.Lock()
	m.ports = nil
	for _, p := range ports {
		if p != 0 && !slices.Contains(m.ports, p) && len(m.ports) < MaxPorts {
			m.ports = append(m.ports, p)
		}
	}
	m.mu.Unlock()
	m.notify()
}

// places lists what is to be held; mu is held.
func (m *Mapper) places() []place {
	var list []place
	for _, r := range m.routes {
		for _, p := range m.ports {
			list = append(list, place{r, p})
		}
	}
	return list
}

// Check has the mappings looked at now, because something seems to have changed.
func (m *Mapper) Check() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.sites {
		s.look()
	}
}

// Run keeps the mappings until ctx ends, then removes them, which takes little
// more than a second at most, and returns nil.
func (m *Mapper) Run(ctx context.Context) error {
	var group errgroup.Group
	var told []Mapping
	running := map[place]*run{}
	for ctx.Err() == nil {
		m.adjust(ctx, running, &group)
		if now := m.Mappings(); !slices.Equal(now, told) {
			told = now
			m.tell(now)
		}
		select {
		case <-ctx.Done():
		case <-m.wake:
		}
	}
	err := group.Wait()
	if len(told) > 0 {
		m.tell(nil)
	}
	return err
}

// run is a site at work. A later one for the same place waits for its end, or
// the one would remove what the other has just mapped.
type run struct {
	cancel context.CancelFunc
	done   chan struct{}
	ended  bool // told to end
}

func (r *run) over() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// adjust ends the sites of places that are gone and starts those of new ones.
func (m *Mapper) adjust(ctx context.Context, running map[place]*run, group *errgroup.Group) {
	m.mu.Lock()
	defer m.mu.Unlock()
	places := m.places()
	for at, r := range running {
		if !slices.Contains(places, at) && !r.ended {
			r.cancel()
			r.ended = true
			delete(m.sites, at)
			delete(m.said, at)
		}
		if r.over() {
			delete(running, at)
		}
	}
	for _, at := range places {
		before := running[at]
		if before != nil && !before.ended {
			continue
		}
		s := m.newSite(at)
		siteCtx, cancel := context.WithCancel(ctx)
		now := &run{cancel: cancel, done: make(chan struct{})}
		running[at], m.sites[at] = now, s
		group.Go(func() error {
			defer close(now.done)
			defer cancel()
			if before != nil {
				<-before.done
			}
			s.run(siteCtx)
			return nil
		})
	}
}

func (r Route) usable() bool {
	return r.Gateway.IsValid() && r.Local.IsValid() && r.Gateway.Is4() == r.Local.Is4() && !r.Local.Is4In6()
}

func (m *Mapper) newSite(at place) *site {
	r := at.Route
	protocols := []protocol{newPCP(r, at.port, m.cfg.Secret)}
	if r.Local.Is4() { // for IPv6 there is but PCP
		protocols = append(protocols, newNATPMP(r, at.port), newUPnP(r, at.port, m.cfg.Name))
	}
	s := newSite(protocols, want{port: at.port, lifetime: lifetime}, m.log)
	s.report = func(got *Mapping) { m.set(at, got) }
	s.failed = func(what said) { m.note(at, what) }
	if r.Local.Is4() && r.Link != 0 {
		s.listen = func(ctx context.Context) { listen(ctx, r, s.look) }
	}
	return s
}

// set notes what a site has; nil: nothing.
func (m *Mapper) set(at place, got *Mapping) {
	m.mu.Lock()
	if got == nil {
		delete(m.held, at)
	} else {
		got.Local, got.Port = at.Local, at.port
		m.held[at] = *got
		delete(m.said, at)
	}
	m.mu.Unlock()
	m.notify()
}

// Mappings gives the mappings there are now, in the order of their routes.
func (m *Mapper) Mappings() []Mapping {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []Mapping
	for _, at := range m.places() {
		if got, ok := m.held[at]; ok {
			list = append(list, got)
		}
	}
	return list
}

func (m *Mapper) tell(list []Mapping) {
	if m.cfg.OnMapping != nil {
		m.cfg.OnMapping(list)
	}
}

func (m *Mapper) notify() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
	if m.told != nil {
		m.told()
	}
}
