package natlab

import (
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	ladderShort, ladderEasy, ladderHard = 2, 20, 30
	// asideShort is how many labs of the short form there are at a time, for most of
	// the time they wait. What is measured beside each other is held to a wider bar.
	asideShort = 3
	asideSlack = 2
)

// aside runs a test of each of a list, in the short form several side by side.
func aside[T any](t *testing.T, list []T, name func(T) string, run func(*testing.T, T)) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(runs(asideShort, 1))
	for _, x := range list {
		g.Go(func() error {
			t.Run(name(x), func(t *testing.T) { run(t, x) })
			return nil
		})
	}
	_ = g.Wait() // what fails has said so
}

// namedTest is a test of a list that is not made of values.
type namedTest struct {
	name string
	run  func(*testing.T)
}

func asideNamed(t *testing.T, list []namedTest) {
	t.Helper()
	aside(t, list, func(n namedTest) string { return n.name }, func(t *testing.T, n namedTest) { n.run(t) })
}

// slack is a bar for what runs aside.
func slack(bar time.Duration) time.Duration { return time.Duration(runs(asideSlack, 1)) * bar }

// TestNATLadder holds every pair of networks to its bar. The short form has some
// of them, a few times each.
func TestNATLadder(t *testing.T) {
	needLab(t)
	cells := slices.DeleteFunc(Cells(), func(c Cell) bool { return c.Chance || testing.Short() && !c.Short })
	aside(t, cells, Cell.Name, climb)
}

// mustPair builds a cell that is closed with the test.
func mustPair(t *testing.T, c Cell) *Pair {
	t.Helper()
	p, err := c.Build(t.Context(), Options{Log: quiet(), Binary: os.Getenv(envBinary)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.explain(t)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func climb(t *testing.T, c Cell) {
	c.Bar.Median, c.Bar.Worst = slack(c.Bar.Median), slack(c.Bar.Worst)
	p := mustPair(t, c)
	count := ladderEasy
	if c.Bar.Share < 1 && !c.Bar.Relay {
		count = ladderHard
	}
	o := Outcome{Cell: c}
	for i := range runs(ladderShort, count) {
		r, err := p.Run(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("run %d: %+v", i, r)
		o.Runs = append(o.Runs, r)
	}
	median, worst := o.After()
	if !o.likely() {
		t.Errorf("%d of %d connected, %d direct, median %v, worst %v: the bar is %+v", o.Connected(), len(o.Runs), o.Direct(), median, worst, c.Bar)
	}
	t.Logf("a router had %+v at most, the limit is %+v", o.Routers(), c.Limit())
	if excess := o.Excess(); excess != "" {
		t.Error(excess)
	}
	if c.Together != SameLAN && o.Routers().Search == 0 {
		t.Error("no router had anything of the search: that none has too much proves nothing")
	}
	if c.Bar.Relay && o.Direct() > 0 {
		t.Errorf("%d of %d became direct: the lab lets through what it should not, or the bar is too low", o.Direct(), len(o.Runs))
	}
}

// likely is Reached for a test, which is not to fail by chance where some runs may
// miss: three standard deviations more of them may, and one in any case.
func (o Outcome) likely() bool {
	share, n := o.Cell.Bar.Share, float64(len(o.Runs))
	if share == 1 || o.Cell.Bar.Relay {
		return o.Reached()
	}
	least := math.Floor(n*share - 3*math.Sqrt(n*share*(1-share)))
	return o.reached(max(1, min(least, n-1)))
}

// explain shows the logs of the nodes when the test failed.
func (p *Pair) explain(t *testing.T) {
	if !t.Failed() {
		return
	}
	for _, e := range p.ends {
		text, err := os.ReadFile(e.state() + "/overlay.log")
		t.Logf("log of %s: %v\n%s", e.name, err, text[max(0, len(text)-maxShown):])
	}
}

func TestCellsHaveNames(t *testing.T) {
	var names []string
	for _, c := range Cells() {
		if name := c.Name(); slices.Contains(names, name) {
			t.Errorf("two cells are called %q", name)
		} else {
			names = append(names, name)
		}
		for _, p := range []Place{c.One, c.Two} {
			if _, err := p.NAT.rules(); err != nil {
				t.Errorf("%s: %v", c.Name(), err)
			}
			if _, err := p.prefix(); err != nil {
				t.Errorf("%s: %v", c.Name(), err)
			}
		}
		if b := c.Bar; !b.Relay && (b.Share <= 0 || b.Share > 1 || b.Worst == 0) {
			t.Errorf("%s has the bar %+v", c.Name(), b)
		}
	}
}

func TestOutcome(t *testing.T) {
	const ms = time.Millisecond
	ok := func(after time.Duration) Run { return Run{Connected: true, Direct: true, After: after, Via: "srflx"} }
	never := Run{Connected: true, Via: "relay-udp", After: time.Second}
	bar := Bar{Share: 0.75, Median: 100 * ms, Worst: 500 * ms}
	for name, c := range map[string]struct {
		bar     Bar
		runs    []Run
		reached bool
	}{
		"all in time":    {bar, []Run{ok(50 * ms), ok(90 * ms), ok(60 * ms), ok(400 * ms)}, true},
		"one never":      {bar, []Run{ok(50 * ms), ok(90 * ms), ok(60 * ms), never}, true},
		"one too late":   {bar, []Run{ok(50 * ms), ok(90 * ms), ok(600 * ms), never}, false},
		"slow median":    {bar, []Run{ok(200 * ms), ok(290 * ms), ok(60 * ms), ok(300 * ms)}, false},
		"not connected":  {bar, []Run{ok(50 * ms), ok(90 * ms), ok(60 * ms), {}}, false},
		"relay":          {Bar{Relay: true}, []Run{never, never}, true},
		"relay that not": {Bar{Relay: true}, []Run{never, {}}, false},
		"full router":    {bar, []Run{ok(50 * ms), ok(60 * ms), {Connected: true, Direct: true, After: 50 * ms, Excess: "too many"}}, false},
	} {
		if got := (Outcome{Cell{Bar: c.bar}, c.runs}).Reached(); got != c.reached {
			t.Errorf("%s: %v", name, got)
		}
	}
	for _, c := range []struct {
		share        float64
		direct, runs int
		likely       bool
	}{
		{1, 2, 2, true},
		{1, 1, 2, false},
		{0.95, 1, 2, true},
		{0.95, 0, 2, false},
		{0.9, 1, 2, true},
		{0.9, 0, 2, false},
		{0.99, 28, 30, true},
		{0.99, 27, 30, false},
		{0.95, 24, 30, true},
		{0.95, 23, 30, false},
	} {
		o := Outcome{Cell: Cell{Bar: Bar{Share: c.share, Worst: bar.Worst}}}
		for i := range c.runs {
			o.Runs = append(o.Runs, map[bool]Run{true: ok(50 * ms), false: never}[i < c.direct])
		}
		if got := o.likely(); got != c.likely {
			t.Errorf("%d of %d direct, of which %v may be: %v", c.direct, c.runs, c.share, got)
		}
	}
	o := Outcome{Runs: []Run{{Direct: true, After: 3, Spent: 9, Routers: Tracked{4, 2, 1, 1}}, {Direct: true, After: 5, Spent: 2}, {Spent: 7, Routers: Tracked{3, 3, 0, 2}}}}
	median, worst := o.After()
	spent, most := o.Spent()
	if median != 3 || worst != 5 || spent != 7 || most != 9 || o.Routers() != (Tracked{4, 3, 1, 2}) || o.Direct() != 2 {
		t.Errorf("%v %v %d %d %+v %d", median, worst, spent, most, o.Routers(), o.Direct())
	}
}
