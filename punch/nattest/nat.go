package nattest

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"time"
)

// Behavior says on what a NAT's decision depends (RFC 4787 sections 4.1 and 5).
// The zero Behavior is EndpointIndependent.
type Behavior uint8

// The behaviours of mapping and filtering.
const (
	EndpointIndependent     Behavior = iota // on nothing of the remote side
	AddressDependent                        // on its address
	AddressAndPortDependent                 // on its address and port
)

const (
	// Linux's nf_conntrack_udp_timeout and nf_conntrack_udp_timeout_stream.
	defaultLifetime       = 30 * time.Second
	defaultLifetimeStream = 120 * time.Second

	firstPort = 1024
)

// NAT describes a translator. The zero NAT is endpoint-independent in both
// respects, with random ports: a full cone.
type NAT struct {
	Mapping, Filtering Behavior

	Preserve   bool // the inner port is kept when it is free
	Sequential int  // else the step between ports; 0: random ports
	Block      int  // how many ports random ones are drawn from; 0: all above 1023

	Lifetime       time.Duration // of a flow without reply; 0: 30 s
	LifetimeStream time.Duration // of a flow with two-way traffic; 0: 120 s

	Hairpin bool // LAN hosts reach each other through the outer address

	// OpenInput is Linux masquerade whose INPUT chain drops nothing. A packet
	// that belongs to no flow is delivered to the router itself, and its
	// conntrack entry, which lives for Lifetime after the last such packet, owns
	// the tuple: an own later flow to that remote address clashes with it and is
	// renumbered to a random port. What the host begins after that has the new
	// port, too, because Linux looks at a source's newest flow first.
	OpenInput bool
}

// Masquerade is the Linux home router: endpoint-independent and port-preserving
// mapping, address-and-port-dependent filtering, input dropped.
func Masquerade() NAT {
	return NAT{Filtering: AddressAndPortDependent, Preserve: true}
}

// table is the state of a NAT: its mappings and the flows within them.
type table struct {
	nat      NAT
	rng      *rand.Rand
	next     uint16 // sequential allocation
	low      int    // lowest port of the block
	ports    int    // how many there are
	byInside map[mappingKey]*mapping
	byPort   map[netip.AddrPort]*mapping // by outer address and port
	newest   map[netip.AddrPort]*mapping // by inner address and port: that of its newest flow
	router   map[flowKey]time.Time       // OpenInput: the router's own entries, until when
}

// mappingKey is what shares a mapping. The remote part is zero as far as the
// mapping does not depend on it.
type mappingKey struct{ inside, remote netip.AddrPort }

type flowKey struct{ outside, remote netip.AddrPort }

type mapping struct {
	inside, outside netip.AddrPort
	flows           map[netip.AddrPort]*flow // by remote address and port
}

type flow struct {
	expires time.Time
	replied bool
}

func newTable(nat NAT, rng *rand.Rand) *table {
	if nat.Lifetime == 0 {
		nat.Lifetime = defaultLifetime
	}
	if nat.LifetimeStream == 0 {
		nat.LifetimeStream = defaultLifetimeStream
	}
	t := &table{nat: nat, rng: rng, next: uint16(20000 + rng.IntN(10000)), low: firstPort, ports: 1<<16 - firstPort}
	if nat.Block != 0 {
		t.low += nat.Block * rng.IntN(t.ports/nat.Block)
		t.ports = nat.Block
	}
	t.flush()
	return t
}

func (t *table) flush() {
	t.byInside = map[mappingKey]*mapping{}
	t.byPort = map[netip.AddrPort]*mapping{}
	t.newest = map[netip.AddrPort]*mapping{}
	t.router = map[flowKey]time.Time{}
}

// outbound returns the source that a packet from inside to remote leaves with.
// An invalid wan means that nothing is translated, only filtered (IPv6). The
// result is invalid when all ports are taken.
func (t *table) outbound(inside, remote netip.AddrPort, wan netip.Addr) netip.AddrPort {
	own := mappingKey{inside, remote}
	m := t.live(own)
	if m == nil {
		m = t.shared(inside, remote, wan)
	}
	f := m.flows[remote]
	if f == nil && t.nat.OpenInput {
		m = t.unclashed(m, own, wan)
		f = m.flows[remote]
	}
	if m.outside.Port() == 0 {
		return netip.AddrPort{}
	}
	if f == nil {
		f = &flow{}
		m.flows[remote] = f
	}
	t.touch(f)
	return m.outside
}

// unclashed is the mapping of a new flow where the router may have taken ports for
// itself: that of the newest flow of the same source, or else m, or else another.
func (t *table) unclashed(m *mapping, own mappingKey, wan netip.Addr) *mapping {
	if last := t.newest[own.inside]; last != nil && t.held(last) && !t.clashes(last.outside, own.remote) {
		m = last
	}
	if t.clashes(m.outside, own.remote) {
		m = t.add(own, netip.AddrPortFrom(wan, t.freePort(wan)))
	}
	t.byInside[own], t.newest[own.inside] = m, m
	return m
}

// shared finds or makes the mapping that the NAT's behaviour gives a flow.
func (t *table) shared(inside, remote netip.AddrPort, wan netip.Addr) *mapping {
	key := mappingKey{inside: inside}
	switch {
	case !wan.IsValid():
		wan = inside.Addr()
	case t.nat.Mapping == AddressDependent:
		key.remote = netip.AddrPortFrom(remote.Addr(), 0)
	case t.nat.Mapping == AddressAndPortDependent:
		key.remote = remote
	}
	if m := t.live(key); m != nil {
		return m
	}
	outside := netip.AddrPortFrom(wan, inside.Port())
	if wan != inside.Addr() && (!t.nat.Preserve || !t.free(outside)) {
		outside = netip.AddrPortFrom(wan, t.freePort(wan))
	}
	return t.add(key, outside)
}

func (t *table) add(key mappingKey, outside netip.AddrPort) *mapping {
	m := &mapping{inside: key.inside, outside: outside, flows: map[netip.AddrPort]*flow{}}
	t.byInside[key] = m
	t.byPort[outside] = m
	return m
}

// live returns the mapping of key if a flow still holds it.
func (t *table) live(key mappingKey) *mapping {
	m := t.byInside[key]
	if m == nil || !t.held(m) {
		return nil
	}
	return m
}

// held drops the expired flows of m and reports whether one is left. A mapping
// whose port was given to another after it had expired stays dead.
func (t *table) held(m *mapping) bool {
	now := time.Now()
	maps.DeleteFunc(m.flows, func(_ netip.AddrPort, f *flow) bool { return !now.Before(f.expires) })
	return len(m.flows) > 0 && t.byPort[m.outside] == m
}

func (t *table) touch(f *flow) {
	life := t.nat.Lifetime
	if f.replied {
		life = t.nat.LifetimeStream
	}
	f.expires = time.Now().Add(life)
}

func (t *table) free(outside netip.AddrPort) bool {
	m := t.byPort[outside]
	return m == nil || !t.held(m)
}

// freePort chooses a port for a mapping; 0: all are taken.
func (t *table) freePort(wan netip.Addr) uint16 {
	for range 16 * t.ports {
		port := uint16(t.low + t.rng.IntN(t.ports))
		if t.nat.Sequential != 0 {
			t.next += uint16(t.nat.Sequential)
			port = max(t.next, firstPort)
		}
		if t.free(netip.AddrPortFrom(wan, port)) {
			return port
		}
	}
	return 0
}

// clashes reports whether the router's own entry owns the tuple of a new flow.
func (t *table) clashes(outside, remote netip.AddrPort) bool {
	return time.Now().Before(t.router[flowKey{outside, remote}])
}

// inbound returns the inner destination of a packet from remote to outside, and
// whether it passes.
func (t *table) inbound(remote, outside netip.AddrPort) (netip.AddrPort, bool) {
	m := t.byPort[outside]
	if m == nil || !t.held(m) || !t.passes(m, remote) {
		if t.nat.OpenInput && outside.Addr().Is4() {
			t.router[flowKey{outside, remote}] = time.Now().Add(t.nat.Lifetime)
		}
		return netip.AddrPort{}, false
	}
	if f := m.flows[remote]; f != nil {
		f.replied = true
		t.touch(f)
	}
	return m.inside, true
}

func (t *table) passes(m *mapping, remote netip.AddrPort) bool {
	switch t.nat.Filtering {
	case EndpointIndependent:
		return true
	case AddressDependent:
		for r := range m.flows {
			if r.Addr() == remote.Addr() {
				return true
			}
		}
		return false
	default:
		return m.flows[remote] != nil
	}
}
