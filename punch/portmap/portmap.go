// Package portmap asks the router of the network for a way in: a port on its
// outer address from which packets of anybody reach ours. It speaks PCP (RFC 6887),
// also for the firewalls of IPv6, NAT-PMP (RFC 6886) and UPnP IGD 1 and 2.
//
//	portmap.go   the Mapper: one site for each way to a router
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

// Mapping is a way in. External leads to our port at Local, as the router says.
// DoubleNAT says that External is an address of a carrier or of another home
// network: it is of use only for peers behind the same one.
type Mapping struct {
	External  netip.AddrPort
	Local     netip.Addr
	Protocol  string
	Lifetime  time.Duration
	DoubleNAT bool
}

// Config tells a Mapper what to map. OnMapping is called from Run whenever the
// mappings change, with all of them; it must not block.
type Config struct {
	Port uint16 // UDP, ours
	// Name is what people see in the router's list.
	Name string
	// Secret makes the nonces by which PCP knows who owns a mapping, so that a
	// program that was killed gets its mapping back. Empty: others at every start.
	Secret    []byte
	OnMapping func([]Mapping)
	Log       *slog.Logger // nil: silent
}

// MaxRoutes is how many routes are used; further ones are ignored.
const MaxRoutes = 4

var errNoPort = errors.New("no port to map")

// Mapper keeps mappings at the routers of the current network. Create it with
// New, give it goroutines with Run; its methods are safe for concurrent use.
type Mapper struct {
	cfg  Config
	log  *slog.Logger
	wake chan struct{}

	mu     sync.Mutex
	routes []Route
	sites  map[Route]*site // of those that run
	held   map[Route]Mapping
}

// New returns a Mapper that does nothing before Run. The error is a Config
// without a port.
func New(c Config) (*Mapper, error) {
	if c.Port == 0 {
		return nil, fmt.Errorf("new port mapper: %w", errNoPort)
	}
	m := &Mapper{
		cfg: c, log: c.Log, wake: make(chan struct{}, 1),
		sites: map[Route]*site{}, held: map[Route]Mapping{},
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

// Check has the mappings looked at now, because something seems to have changed.
func (m *Mapper) Check() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.sites {
		s.look()
	}
}

// Run keeps the mappings until ctx ends, then removes them, which takes at most
// a second, and returns nil.
func (m *Mapper) Run(ctx context.Context) error {
	var group errgroup.Group
	var told []Mapping
	running := map[Route]*run{}
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

// run is a site at work. A later one for the same route waits for its end, or
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

// adjust ends the sites of routes that are gone and starts those of new ones.
func (m *Mapper) adjust(ctx context.Context, running map[Route]*run, group *errgroup.Group) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for route, r := range running {
		if !slices.Contains(m.routes, route) && !r.ended {
			r.cancel()
			r.ended = true
			delete(m.sites, route)
		}
		if r.over() {
			delete(running, route)
		}
	}
	for _, route := range m.routes {
		before := running[route]
		if before != nil && !before.ended {
			continue
		}
		s := m.newSite(route)
		siteCtx, cancel := context.WithCancel(ctx)
		now := &run{cancel: cancel, done: make(chan struct{})}
		running[route], m.sites[route] = now, s
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

func (m *Mapper) newSite(r Route) *site {
	protocols := []protocol{newPCP(r, m.cfg.Port, m.cfg.Secret)}
	if r.Local.Is4() { // for IPv6 there is but PCP
		protocols = append(protocols, newNATPMP(r, m.cfg.Port), newUPnP(r, m.cfg.Port, m.cfg.Name))
	}
	s := newSite(protocols, want{port: m.cfg.Port, lifetime: lifetime}, m.log)
	s.report = func(got *Mapping) { m.set(r, got) }
	if r.Local.Is4() && r.Link != 0 {
		s.listen = func(ctx context.Context) { listen(ctx, r, s.look) }
	}
	return s
}

// set notes what a site has; nil: nothing.
func (m *Mapper) set(r Route, got *Mapping) {
	m.mu.Lock()
	if got == nil {
		delete(m.held, r)
	} else {
		got.Local = r.Local
		m.held[r] = *got
	}
	m.mu.Unlock()
	m.notify()
}

// Mappings gives the mappings there are now, in the order of their routes.
func (m *Mapper) Mappings() []Mapping {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []Mapping
	for _, r := range m.routes {
		if got, ok := m.held[r]; ok {
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
}
