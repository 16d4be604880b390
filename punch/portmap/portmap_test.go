package portmap

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// mapper is a Mapper at work.
type mapper struct {
	*Mapper
	end func()

	mu   sync.Mutex
	last []Mapping
	told int
}

func startMapper(t *testing.T) *mapper {
	t.Helper()
	m := &mapper{}
	var err error
	m.Mapper, err = New(Config{Port: testPort, Name: "test", OnMapping: func(list []Mapping) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.last, m.told = list, m.told+1
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := m.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	m.end = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(m.end)
	return m
}

func (m *mapper) has(want ...Mapping) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return slices.Equal(m.last, want)
	}
}

func TestMapper(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pcp, r.pmp = true, true })
	m := startMapper(t)
	m.SetRoutes([]Route{r.route()})
	got := Mapping{External: netip.AddrPortFrom(outer(), testPort), Local: local(), Port: testPort, Protocol: PCP, Lifetime: lifetime}
	eventually(t, "mapped", m.has(got))
	// The router starts anew, behind another one.
	r.reboot()
	r.set(func() { r.external = netip.MustParseAddrPort("100.64.0.7:7000") })
	time.Sleep(lookPause)
	m.Check()
	other := Mapping{External: netip.MustParseAddrPort("100.64.0.7:7000"), Local: local(), Port: testPort, Protocol: PCP, Lifetime: lifetime, DoubleNAT: true}
	eventually(t, "mapped anew", m.has(other))
	// Another network, and back.
	m.SetRoutes(nil)
	eventually(t, "removed", func() bool { return m.has()() && r.has(testPort) == 0 })
	m.SetRoutes([]Route{r.route(), r.route(), {}, {Gateway: netip.MustParseAddr("fe80::1"), Local: local()}})
	eventually(t, "mapped again", m.has(other))
	start := time.Now()
	m.end()
	if took := time.Since(start); took > removeTimeout || r.has(testPort) != 0 || !m.has()() {
		t.Errorf("after the end, which took %v: %d mapped, %v", took, r.has(testPort), m.last)
	}
}

func TestMapperFallsBack(t *testing.T) {
	g := newIGD(t)
	m := startMapper(t)
	m.SetRoutes([]Route{g.route()})
	got := Mapping{External: netip.AddrPortFrom(outer(), testPort), Local: local(), Port: testPort, Protocol: UPnP, Lifetime: lifetime}
	eventually(t, "mapped by UPnP", m.has(got))
	m.end()
	if len(g.entries) > 0 {
		t.Errorf("left at the router: %v", g.entries)
	}
}

// A route that goes and comes back at once keeps its mapping, or gets it back:
// what its end removes is not what its beginning has made.
func TestMapperFlaps(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pcp = true })
	m := startMapper(t)
	got := Mapping{External: netip.AddrPortFrom(outer(), testPort), Local: local(), Port: testPort, Protocol: PCP, Lifetime: lifetime}
	for range 5 {
		m.SetRoutes([]Route{r.route()})
		eventually(t, "mapped", m.has(got))
		m.SetRoutes(nil)
		time.Sleep(time.Millisecond)
	}
	m.SetRoutes([]Route{r.route()})
	eventually(t, "mapped at last", func() bool { return m.has(got)() && r.has(testPort) != 0 })
	time.Sleep(50 * time.Millisecond)
	if r.has(testPort) == 0 {
		t.Error("removed by the site that ended")
	}
}

func TestMapperNeedsAPort(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a mapper without a port")
	}
}

// Removing is given up at a router that does not answer.
func TestEndIsBounded(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pmp = true })
	m := startMapper(t)
	m.SetRoutes([]Route{r.route()})
	eventually(t, "mapped", func() bool { return r.has(testPort) != 0 })
	r.set(func() { r.lost = 1 << 20 })
	start := time.Now()
	m.end()
	if took := time.Since(start); took > removeTimeout+500*time.Millisecond {
		t.Errorf("the end took %v", took)
	}
}

// Another port of ours takes the place of the one before, at the router too.
func TestMapperChangesPorts(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pmp = true })
	m := startMapper(t)
	of := func(port uint16) Mapping {
		return Mapping{External: netip.AddrPortFrom(outer(), port), Local: local(), Port: port, Protocol: NATPMP, Lifetime: lifetime}
	}
	m.SetRoutes([]Route{r.route()})
	eventually(t, "mapped", m.has(of(testPort)))
	m.SetPorts(testPort+1, 0, testPort+1)
	eventually(t, "moved", func() bool {
		return m.has(of(testPort+1))() && r.has(testPort) == 0 && r.has(testPort+1) != 0
	})
	m.SetPorts(testPort+1, testPort+2)
	eventually(t, "both mapped", m.has(of(testPort+1), of(testPort+2)))
	m.end()
	if r.has(testPort+1) != 0 || r.has(testPort+2) != 0 {
		t.Errorf("left: %v", r.mapped)
	}
}
