package main

import (
	"math"
	"slices"
	"strings"
	"testing"
)

const (
	speed metric = "tcp1Gbps"
	gone  metric = "pingLoadLostPercent"
	size  metric = "tcp1Segments"
)

func testResults() *results {
	r := &results{
		Pairs: 3, Seconds: 10, MTU: 1400, Machine: "2 CPUs",
		Tunnels: []*figures{
			{Name: "plain", Samples: []sample{{speed: 4, gone: 1, size: 1}, {speed: 9, gone: 1, size: 1}, {speed: 2, gone: 1, size: 1}}, MemoryAfter: []float64{10, 20.4}},
			{Name: "raw", Samples: []sample{{speed: 2, gone: 0}, {speed: 3, gone: 2}, {speed: 1, gone: 0}}},
			{Name: "overlay", Samples: []sample{{speed: 8, size: 4}, {speed: 9, size: 64}, {speed: 5, size: 4}}},
		},
		cases: [][]row{{{speed, "TCP, Gbit/s"}, {gone, "  lost, %"}, {size, "  segments"}}},
	}
	r.complete()
	return r
}

func TestComplete(t *testing.T) {
	r := testResults()
	for i, want := range []struct{ median, ratio float64 }{{4, 2}, {2, 0}, {8, 4}} {
		f := r.Tunnels[i]
		if f.Medians[speed] != want.median || f.Ratios[speed] != want.ratio {
			t.Errorf("%s: median %v, ratio %v, want %+v", f.Name, f.Medians[speed], f.Ratios[speed], want)
		}
	}
	if r.Ratios[speed] != 4 {
		t.Errorf("ratio of the last is %v", r.Ratios[speed])
	}
	if got, ok := r.Tunnels[0].Ratios[gone]; !ok || got != 0.5 {
		t.Errorf("ratio of losses is %v, %v, want that of the one round that has one", got, ok)
	}
	if _, ok := r.Tunnels[0].ratio(&figures{Samples: []sample{{}, {}, {}}}, speed); ok {
		t.Error("something through nothing has a ratio")
	}
}

// TestShow compares whole lines, without the spaces that align them.
func TestShow(t *testing.T) {
	one, two := testResults(), testResults()
	one.Setting, two.Setting = "lost 1 %", "clean"
	for name, c := range map[string]struct {
		o     options
		brief bool
		runs  []*results
		want  []string
	}{
		"whole": {options{}, false, []*results{one}, []string{
			"2 CPUs; medians of 3 interleaved rounds, 10 s each, MTU 1400; ratios are medians of the rounds' ratios",
			"plain raw overlay × plain × overlay", "TCP, Gbit/s 4.00 2.00 8.00 2.00 4.00", "lost, % 1.00 0 -", "segments 1 - 4", "RSS after, a/b, MB 10/20",
		}},
		"markdown": {options{markdown: true}, false, []*results{one}, []string{
			"| | plain | raw | overlay | × plain | × overlay |", "|---|---|---|---|---|---|",
			"| TCP, Gbit/s | 4.00 | 2.00 | 8.00 | 2.00 | 4.00 |", "| · lost, % | 1.00 | 0 | - | | |", "| RSS after, a/b, MB | 10/20 | | | | |",
		}},
		"brief": {options{}, true, []*results{one, two}, []string{
			"lost 1 %: TCP, Gbit/s 4.00 2.00 8.00 2.00 4.00", "segments 1 - 4", "clean: TCP, Gbit/s 4.00 2.00 8.00 2.00 4.00",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			if err := show(&out, &c.o, c.brief, c.runs...); err != nil {
				t.Fatal(err)
			}
			var lines []string
			for line := range strings.Lines(out.String()) {
				lines = append(lines, strings.Join(strings.Fields(line), " "))
			}
			for _, want := range c.want {
				found := false
				for _, line := range lines {
					found = found || line == want
				}
				if !found {
					t.Errorf("no line %q in\n%s", want, &out)
				}
			}
		})
	}
}

func TestMedian(t *testing.T) {
	all := []float64{3, 1, 2, 10}
	if got := median(all); got != 2.5 || all[0] != 3 {
		t.Errorf("%v of %v", got, all)
	}
	if got := median(nil); got != 0 {
		t.Errorf("median of nothing is %v", got)
	}
}

// TestRowsAreFilled has every case's rows come from a prefix of its own, so
// that no figure takes the place of another.
func TestRowsAreFilled(t *testing.T) {
	b := &bench{}
	all := slices.Concat(b.cases(), b.lossCases(), b.relayCases())
	for _, p := range b.places() {
		all = append(all, p.cases...)
	}
	owner := map[metric]string{}
	for _, c := range all {
		if len(c.rows) == 0 || c.name == "" || c.run == nil {
			t.Errorf("case %q has nothing to show or to do", c.name)
		}
		for _, r := range c.rows {
			if by, ok := owner[r.metric]; ok && by != c.name {
				t.Errorf("%s is of %s and of %s", r.metric, by, c.name)
			}
			owner[r.metric] = c.name
		}
	}
}

func TestFlowNote(t *testing.T) {
	f := flowCase{name: "both", prefix: "tcpBoth"}
	s := sample{}
	used := work{daemons: []float64{3, 5}, machine: 12}
	if err := f.note(s, used, iperfSum{Bytes: 1e9, BitsPerSecond: 8e9}, iperfSum{Bytes: 3e9, BitsPerSecond: 2e9}); err != nil {
		t.Fatal(err)
	}
	want := sample{"tcpBothGbps": 10, "tcpBothDaemonSecondsPerGB": 2, "tcpBothMachineSecondsPerGB": 3}
	for m, x := range want {
		if math.Abs(s[m]-x) > 1e-9 {
			t.Errorf("%s is %v, not %v", m, s[m], x)
		}
	}
	f.server, used.server = true, 1
	if err := f.note(s, used, iperfSum{Bytes: 2e9}); err != nil || s["tcpBothServerSecondsPerGB"] != 0.5 {
		t.Errorf("the server used %v s/GB, %v", s["tcpBothServerSecondsPerGB"], err)
	}
	if err := f.note(s, used, iperfSum{}); err == nil {
		t.Error("nothing arrived, and nobody complains")
	}
}

func TestArrived(t *testing.T) {
	var r iperfResult
	if _, _, err := r.arrived(); err == nil {
		t.Error("no packets have a share")
	}
	r.End.Sum.Packets, r.End.Sum.LostPackets, r.End.Sum.Seconds = 200, 50, 2
	if lost, packets, err := r.arrived(); lost != 25 || packets != 150 || err != nil {
		t.Errorf("%v %% lost, %v arrived, %v", lost, packets, err)
	}
}
