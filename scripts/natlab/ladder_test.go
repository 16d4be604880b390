package natlab

import (
	"os"
	"slices"
	"testing"
	"time"
)

const (
	ladderShort, ladderEasy, ladderHard = 2, 20, 30
	// ladderAside is how many labs of the short form there are at a time; what is
	// measured beside each other is held to a wider bar.
	ladderAside = 3
	ladderSlack = 2
)

// TestNATLadder holds every pair of networks to its bar. The short form has some
// of them, a few times each.
func TestNATLadder(t *testing.T) {
	needLab(t)
	slots := make(chan struct{}, 1)
	if testing.Short() {
		slots = make(chan struct{}, ladderAside)
	}
	for _, c := range Cells() {
		if c.Chance || testing.Short() && !c.Short {
			continue
		}
		t.Run(c.Name(), func(t *testing.T) {
			if testing.Short() {
				t.Parallel()
			}
			slots <- struct{}{}
			defer func() { <-slots }()
			climb(t, c)
		})
	}
}

func climb(t *testing.T, c Cell) {
	if testing.Short() {
		c.Bar.Median, c.Bar.Worst = ladderSlack*c.Bar.Median, ladderSlack*c.Bar.Worst
	}
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
	if !o.Reached() {
		t.Errorf("%d of %d connected, %d direct, median %v, worst %v: the bar is %+v", o.Connected(), len(o.Runs), o.Direct(), median, worst, c.Bar)
	}
	t.Logf("a router had %+v at most, the limit is %+v", o.Routers(), c.Limit())
	if excess := o.Excess(); excess != "" {
		t.Error(excess)
	}
	if c.Bar.Relay && o.Direct() > 0 {
		t.Errorf("%d of %d became direct: the lab lets through what it should not, or the bar is too low", o.Direct(), len(o.Runs))
	}
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
	o := Outcome{Runs: []Run{{Direct: true, After: 3, Spent: 9, Routers: Tracked{4, 2, 1}}, {Direct: true, After: 5, Spent: 2}, {Spent: 7, Routers: Tracked{3, 3, 0}}}}
	median, worst := o.After()
	spent, most := o.Spent()
	if median != 3 || worst != 5 || spent != 7 || most != 9 || o.Routers() != (Tracked{4, 3, 1}) || o.Direct() != 2 {
		t.Errorf("%v %v %d %d %+v %d", median, worst, spent, most, o.Routers(), o.Direct())
	}
}
