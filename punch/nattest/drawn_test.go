package nattest_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"overlay/punch/nattest"
)

var drawnWorlds = flag.Uint64("drawn", 100, "how many seeded worlds with hard NATs to run")

// drawnCell sorts drawn worlds for the report.
type drawnCell struct {
	pair  string
	lossy bool
}

// drawn is a world with ports that nobody knows, on lines as TestWorlds draws them,
// and unrelated flows through both NATs.
type drawn struct {
	spec
	cell
	names [2]string
}

// hardNATs are NATs that give each destination another port.
func hardNATs() map[string]nattest.NAT {
	hard := func(n nattest.NAT) nattest.NAT {
		n.Mapping, n.Filtering = apdm, apdm
		return n
	}
	return map[string]nattest.NAT{
		"sequential": hard(nattest.NAT{Sequential: 1}), "sequential -2": hard(nattest.NAT{Sequential: -2}),
		"random": hard(nattest.NAT{}), "block 512": hard(nattest.NAT{Block: 512}),
		"block 1024": hard(nattest.NAT{Block: 1024}), "block 2048": hard(nattest.NAT{Block: 2048}),
	}
}

func drawHard(seed uint64) drawn {
	d := drawn{spec: drawSpec(seed)}
	r := rand.New(rand.NewPCG(seed, 5))
	nats := hardNATs()
	var names []string
	for name := range nats {
		names = append(names, name)
	}
	slices.Sort(names)
	for i := range 2 {
		d.names[i] = names[r.IntN(len(names))]
		d.nats[i] = nats[d.names[i]]
	}
	if easy := kinds()[1:6]; r.IntN(3) > 0 { // a third is hard on both sides
		k := easy[r.IntN(len(easy))]
		d.names[1], d.nats[1] = k.name, *k.nat
	}
	d.churn = []float64{0, 10, 100}[r.IntN(3)]
	if d.nats[0].Block+d.nats[1].Block > 0 {
		d.churn /= 100 // or the block is full
	}
	return d
}

func (d drawn) String() string {
	return fmt.Sprintf("seed %d: %s and %s, path %v, loss %.2f, server %v, skew %v, churn %.0f/s", d.seed,
		d.names[0], d.names[1], d.rtt()/2, d.spec.loss(), d.server.Delay, d.skew, d.churn)
}

// TestHardWorlds draws worlds with hard NATs. There is a path in all of them, over
// a relay until a direct one is found, and every limit holds; how often one is
// found is reported, and judged where it is sure, or out of the question.
//
// go test ./punch/nattest -run TestHardWorlds -seed 7
func TestHardWorlds(t *testing.T) {
	found, all := map[drawnCell]int{}, map[drawnCell]int{}
	judged, direct := map[chance]int{}, map[chance]int{}
	eachWorld(t, *drawnWorlds, func(t *testing.T, seed uint64) {
		d := drawHard(seed)
		k := drawnCell{d.names[0] + " and " + d.names[1], d.spec.loss() > 0}
		all[k]++
		judged[d.chance()]++
		if d.meet(t) {
			found[k]++
			direct[d.chance()]++
		}
	})
	var lines []string
	for k, n := range all {
		lines = append(lines, fmt.Sprintf("%s, loss %v: direct in %d of %d", k.pair, k.lossy, found[k], n))
	}
	slices.Sort(lines)
	for _, line := range lines {
		t.Log(line)
	}
	t.Logf("ports can be guessed: direct in %d of %d", direct[likely], judged[likely])
	if float64(direct[likely]) < least(float64(judged[likely]), 0.8) { // of too few nothing is wanted
		t.Errorf("direct in %d of %d worlds whose ports can be guessed, want 0.8", direct[likely], judged[likely])
	}
	if direct[none] > 0 {
		t.Errorf("direct in %d of %d worlds whose ports nobody can guess", direct[none], judged[none])
	}
}

// chance is that of a direct path.
type chance int

const (
	some   chance = iota
	likely        // one side gives out ports that can be guessed, the other takes only these
	none          // neither can be guessed
)

func (d drawn) chance() chance {
	hard, random := hardNATs(), d.names[0] == "random"
	_, both := hard[d.names[1]]
	switch {
	case random && d.names[1] == "random":
		return none
	case !random && !both && d.nats[1].Filtering == apdm:
		return likely
	}
	return some
}

// meet runs the world, and reports whether there is a direct path within 30 s.
func (d drawn) meet(t *testing.T) bool {
	w := nattest.NewWorld(d.seed, d.server)
	defer w.Stop()
	w.NewRelay(d.server)
	var nodes []*nattest.Node
	for i := range 2 {
		nat := d.nats[i]
		n, router := laptop(w, i, kind{nat: &nat}, d.links[i], fmt.Sprintf("192.168.%d.2/24", i+1))
		nodes = append(nodes, n)
		if d.churn > 0 {
			disturb(w, router, d.churn, d.seed+uint64(i))
		}
	}
	a, b := nodes[0], nodes[1]
	start(t, a)
	time.Sleep(d.skew)
	start(t, b)
	if _, ok := met(a, b, d.patience()); !ok {
		t.Errorf("%v: no path: %v, %v", d, a.Path(b), b.Path(a))
	}
	stops := []func(){a.Stream(b, time.Second), b.Stream(a, time.Second)}
	_, direct := metDirect(a, b, 30*time.Second)
	settled := time.Now()
	time.Sleep(time.Minute)
	for _, stop := range stops {
		stop()
	}
	// Over the relay each packet crosses four lossy links; less three deviations.
	const sent, slack = 60, 12
	least := sent*(1-d.spec.loss())*(1-d.spec.loss()) - slack
	for _, pair := range bothWays(a, b) {
		if n := len(pair[0].Arrivals(pair[1], settled)); float64(n) < least {
			t.Errorf("%v: %d packets of 60 arrived", d, n)
		}
	}
	for _, f := range w.Faults() {
		t.Errorf("%v: %s", d, f)
	}
	return direct
}
