package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"time"
)

// metric names a figure, as in JSON.
type metric string

const (
	tcp1     metric = "tcp1Gbps"
	daemons1 metric = "tcp1DaemonSecondsPerGB"
	machine1 metric = "tcp1MachineSecondsPerGB"
	resent   metric = "tcp1Retransmits"
	tcp4     metric = "tcp4Gbps"
	daemons4 metric = "tcp4DaemonSecondsPerGB"
	machine4 metric = "tcp4MachineSecondsPerGB"
	idle50   metric = "pingIdleP50ms"
	idle99   metric = "pingIdleP99ms"
	idleBusy metric = "idleMachineBusyPercent"
	load50   metric = "pingLoadP50ms"
	load99   metric = "pingLoadP99ms"
	loadLost metric = "pingLoadLostPercent"
	flood    metric = "udp64Kpps"
)

// row is a metric as the table shows it.
type row struct {
	metric metric
	label  string
}

func rows() []row {
	return []row{
		{tcp1, "TCP 1 stream, Gbit/s"},
		{daemons1, "  daemons, CPU s/GB"},
		{machine1, "  machine, CPU s/GB"},
		{resent, "  segments sent again"},
		{tcp4, "TCP 4 streams, Gbit/s"},
		{daemons4, "  daemons, CPU s/GB"},
		{machine4, "  machine, CPU s/GB"},
		{idle50, "ping idle p50, ms"},
		{idle99, "ping idle p99, ms"},
		{idleBusy, "  machine busy meanwhile, %"},
		{load50, "ping under load p50, ms"},
		{load99, "ping under load p99, ms"},
		{loadLost, "  lost, %"},
		{flood, "UDP 64 B received, kpps"},
	}
}

// sample is every figure of one tunnel, taken once.
type sample map[metric]float64

// figures is all of one tunnel. Memory is resident, in megabytes, of the
// daemon on a, which sent, and on b.
type figures struct {
	Name         string     `json:"name"`
	Samples      []sample   `json:"samples"`
	Medians      sample     `json:"medians"`
	MemoryBefore [2]float64 `json:"rssBeforeMB"`
	MemoryAfter  [2]float64 `json:"rssAfterMB"`
}

// results is what a run says. Ratios are the first tunnel's figures through
// the second's: the median of the pairs' ratios, which a machine that gets
// slower during the run does not move.
type results struct {
	Schema  int        `json:"schema"`
	Time    time.Time  `json:"time"`
	Pairs   int        `json:"pairs"`
	Seconds int        `json:"seconds"`
	MTU     int        `json:"mtu"`
	Tunnels []*figures `json:"tunnels"`
	Ratios  sample     `json:"ratios"`
}

// complete computes medians and ratios.
func (r *results) complete() {
	r.Ratios = sample{}
	for _, f := range r.Tunnels {
		f.Medians = sample{}
	}
	for _, row := range rows() {
		m := row.metric
		for _, f := range r.Tunnels {
			f.Medians[m] = median(f.column(m))
		}
		var ratios []float64
		first, second := r.Tunnels[0].column(m), r.Tunnels[1].column(m)
		for i := range first {
			if second[i] > 0 {
				ratios = append(ratios, first[i]/second[i])
			}
		}
		if len(ratios) > 0 {
			r.Ratios[m] = median(ratios)
		}
	}
}

func (f *figures) column(m metric) []float64 {
	all := make([]float64, len(f.Samples))
	for i, s := range f.Samples {
		all[i] = s[m]
	}
	return all
}

// median leaves its argument as it is; that of nothing is 0.
func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return (sorted[half-1] + sorted[half]) / 2
}

// lostShare is in percent.
func (p pings) lostShare() float64 {
	all := len(p.RoundTrips) + p.Lost
	if all == 0 {
		return 0
	}
	return 100 * float64(p.Lost) / float64(all)
}

// table prints the medians side by side.
func (r *results) table(to io.Writer) error {
	first, second := r.Tunnels[0], r.Tunnels[1]
	var text bytes.Buffer
	line := func(label, one, two, ratio string) {
		fmt.Fprintf(&text, "%-28s %12s %12s %8s\n", label, one, two, ratio)
	}
	fmt.Fprintf(&text, "\nmedians of %d interleaved pairs, %d s each, MTU %d; ratio is the median of the pairs' ratios\n\n", r.Pairs, r.Seconds, r.MTU)
	line("", first.Name, second.Name, "ratio")
	for _, row := range rows() {
		ratio := ""
		if x, ok := r.Ratios[row.metric]; ok {
			ratio = fmt.Sprintf("%.2f", x)
		}
		line(row.label, figure(first.Medians[row.metric]), figure(second.Medians[row.metric]), ratio)
	}
	line("RSS before, a/b, MB", ends(first.MemoryBefore), ends(second.MemoryBefore), "")
	line("RSS after, a/b, MB", ends(first.MemoryAfter), ends(second.MemoryAfter), "")
	if _, err := to.Write(text.Bytes()); err != nil {
		return fmt.Errorf("print table: %w", err)
	}
	return nil
}

// figure shows what a measurement of this kind can tell: two digits or three.
func figure(x float64) string {
	switch {
	case x >= 100 || x == 0:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	default:
		return fmt.Sprintf("%.2f", x)
	}
}

func ends(mb [2]float64) string { return fmt.Sprintf("%.0f/%.0f", mb[0], mb[1]) }
