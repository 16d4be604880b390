package portmap

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

// probed is what one router says to a probe, which leaves nothing there.
func probed(t *testing.T, r Route) Report {
	t.Helper()
	list, err := Probe(t.Context(), Config{Port: testPort, Name: "test"}, []Route{r})
	if err != nil || len(list) != 1 || !list[0].Settled {
		t.Fatalf("%+v, %v", list, err)
	}
	return list[0]
}

func TestProbeMaps(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pcp = true; r.external = netip.MustParseAddrPort("100.64.0.7:7000") })
	got := probed(t, r.route())
	if m := got.Mapping; m.Protocol != PCP || !m.DoubleNAT || m.External != r.external || got.Outer != r.external.Addr() || len(got.Refusals) != 0 {
		t.Errorf("%+v", got)
	}
	if r.has(testPort) != 0 {
		t.Error("left at the router")
	}
}

// A router that refuses says so, and may tell its address all the same.
func TestProbeRefused(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pcp, r.pmp, r.result = true, true, 2 })
	got := probed(t, r.route())
	want := Report{
		Gateway: r.addr, Port: testPort, Outer: outer(), Settled: true,
		Refusals: []Refusal{
			{PCP, "the router refuses: result 2, not authorized"},
			{NATPMP, "the router refuses: result 2, not authorized"},
			{UPnP, ""},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestProbeInSilence(t *testing.T) {
	got := probed(t, Route{Gateway: loopback(), Local: local()})
	if len(got.Refusals) != 3 || slices.ContainsFunc(got.Refusals, func(r Refusal) bool { return r.Words != "" }) || got.Outer.IsValid() {
		t.Errorf("%+v", got)
	}
	if list, err := Probe(t.Context(), Config{Port: testPort}, nil); len(list) != 0 || err != nil {
		t.Errorf("without a router: %+v, %v", list, err)
	}
	if _, err := Probe(t.Context(), Config{}, nil); !errors.Is(err, errNoPort) {
		t.Errorf("without a port: %v", err)
	}
}

// A router that told its address once, and says nothing when it is looked for anew,
// has none: there may be another one in its place.
func TestOuterIsForgotten(t *testing.T) {
	r, g := newRouter(t), newIGD(t)
	r.set(func() { r.pmp, r.result = true, 2 })
	for _, p := range []protocol{newNATPMP(r.route(), testPort), newUPnP(g.route(), testPort, "test")} {
		if err := p.find(timely(t)); err != nil {
			t.Fatal(err)
		}
		_, _ = p.ask(timely(t), wanted()) // UPnP tells then
		if got := outerOf([]protocol{p}); got != outer() {
			t.Fatalf("%s: told %v", p.name(), got)
		}
		over, cancel := context.WithCancel(t.Context())
		cancel()
		if err := p.find(over); err == nil {
			t.Fatalf("%s: found by nobody", p.name())
		}
		if got := outerOf([]protocol{p}); got.IsValid() {
			t.Errorf("%s: %v although nobody says so any more", p.name(), got)
		}
	}
}
