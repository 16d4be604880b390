package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// figures is all of one tunnel. Memory is resident, in megabytes, of the
// daemon on a, which sent, and of those on the others; the peak is since its
// start. Ratios are against the first tunnel.
type figures struct {
	Name         string    `json:"name"`
	Samples      []sample  `json:"samples"`
	Medians      sample    `json:"medians"`
	Ratios       sample    `json:"ratios,omitempty"`
	MemoryBefore []float64 `json:"rssBeforeMB"`
	MemoryAfter  []float64 `json:"rssAfterMB"`
	MemoryPeak   []float64 `json:"rssPeakMB"`
}

// results is what a run says. Every tunnel is compared with the base: raw
// where it is among them, otherwise the first. A ratio is the median of the
// rounds' ratios, which a machine that gets slower during the run does not
// move. Ratios are those of the last tunnel.
type results struct {
	Schema  int        `json:"schema"`
	Time    time.Time  `json:"time"`
	Machine string     `json:"machine"`
	Setting string     `json:"setting,omitempty"`
	Pairs   int        `json:"pairs"`
	Seconds int        `json:"seconds"`
	MTU     int        `json:"mtu"`
	Tunnels []*figures `json:"tunnels"`
	Ratios  sample     `json:"ratios"`

	cases [][]row
}

// complete computes medians and ratios.
func (r *results) complete() {
	base := r.Tunnels[0]
	for _, f := range r.Tunnels {
		if f.Name == variantRaw {
			base = f
		}
	}
	for _, f := range r.Tunnels {
		f.Medians = sample{}
		for _, m := range f.metrics() {
			f.Medians[m] = median(f.column(m))
		}
		if f == base {
			continue
		}
		f.Ratios = sample{}
		for m := range f.Medians {
			if ratio, ok := f.ratio(base, m); ok {
				f.Ratios[m] = ratio
			}
		}
		r.Ratios = f.Ratios
	}
}

// ratio is that of two tunnels in a metric, where base is not always 0.
func (f *figures) ratio(base *figures, m metric) (float64, bool) {
	var all []float64
	one, two := f.column(m), base.column(m)
	for i := range min(len(one), len(two)) {
		if two[i] > 0 {
			all = append(all, one[i]/two[i])
		}
	}
	return median(all), len(all) > 0
}

func (f *figures) metrics() []metric {
	var all []metric
	for _, s := range f.Samples {
		for m := range s {
			if !slices.Contains(all, m) {
				all = append(all, m)
			}
		}
	}
	return all
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

// show prints the medians side by side, of brief runs only the main figure of
// every case and the segments of its messages.
func show(to io.Writer, o *options, brief bool, runs ...*results) error {
	if len(runs) == 0 {
		return nil
	}
	r := runs[0]
	var text bytes.Buffer
	fmt.Fprintf(&text, "\n%s; medians of %d interleaved rounds, %d s each, MTU %d; ratios are medians of the rounds' ratios\n\n",
		r.Machine, r.Pairs, r.Seconds, r.MTU)
	render := columns
	if o.markdown {
		render = markdown
	}
	cells := [][]string{r.head()}
	for _, r := range runs {
		cells = append(cells, r.cells(brief)...)
	}
	render(&text, cells)
	if _, err := to.Write(text.Bytes()); err != nil {
		return fmt.Errorf("print table: %w", err)
	}
	return nil
}

// head and cells are the table: a label, a figure of every tunnel, and the
// ratios of all but the base.
func (r *results) head() []string {
	var names, ratios []string
	for _, f := range r.Tunnels {
		names = append(names, f.Name)
		if f.Ratios != nil {
			ratios = append(ratios, "× "+f.Name)
		}
	}
	return slices.Concat([]string{""}, names, ratios)
}

func (r *results) cells(brief bool) [][]string {
	var all [][]string
	for _, rows := range r.cases {
		for i, w := range rows {
			switch {
			case brief && i == 0 && r.Setting != "":
				w.label = r.Setting + ": " + w.label
			case brief && i > 0 && !w.counts():
				continue
			}
			all = append(all, r.line(w))
		}
	}
	if brief {
		return all
	}
	memory := func(label string, of func(*figures) []float64) {
		line := []string{label}
		for _, f := range r.Tunnels {
			line = append(line, ends(of(f)))
		}
		all = append(all, line)
	}
	memory("RSS before, a/b, MB", func(f *figures) []float64 { return f.MemoryBefore })
	memory("RSS after, a/b, MB", func(f *figures) []float64 { return f.MemoryAfter })
	memory("RSS peak, a/b, MB", func(f *figures) []float64 { return f.MemoryPeak })
	return all
}

// counts reports whether a row is of segments per message.
func (w row) counts() bool { return strings.HasSuffix(string(w.metric), segmentsSuffix) }

// line is a dash where a tunnel has no such figure.
func (r *results) line(w row) []string {
	line, ratios := []string{w.label}, []string(nil)
	for _, f := range r.Tunnels {
		cell := "-"
		if x, ok := f.Medians[w.metric]; ok && w.counts() {
			cell = fmt.Sprint(x)
		} else if ok {
			cell = figure(x)
		}
		line = append(line, cell)
		if f.Ratios == nil {
			continue
		}
		ratio := ""
		if x, ok := f.Ratios[w.metric]; ok && !w.counts() && !strings.HasSuffix(string(w.metric), "Percent") {
			ratio = fmt.Sprintf("%.2f", x)
		}
		ratios = append(ratios, ratio)
	}
	return append(line, ratios...)
}

// columns prints a table for a terminal.
func columns(to *bytes.Buffer, cells [][]string) {
	widths := make([]int, len(cells[0]))
	for _, line := range cells {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range cells {
		fmt.Fprintf(to, "%-*s", widths[0], line[0])
		for i, cell := range line[1:] {
			fmt.Fprintf(to, "  %*s", max(widths[i+1], 8), cell)
		}
		fmt.Fprintln(to)
	}
}

// markdown prints a table for the readme.
func markdown(to *bytes.Buffer, cells [][]string) {
	for i, line := range cells {
		line = append(slices.Clone(line), make([]string, len(cells[0])-len(line))...)
		line[0] = strings.ReplaceAll(line[0], "  ", "· ")
		fmt.Fprintf(to, "| %s |\n", strings.Join(line, " | "))
		if i == 0 {
			fmt.Fprintln(to, strings.Repeat("|---", len(line))+"|")
		}
	}
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

func ends(mb []float64) string {
	var all []string
	for _, x := range mb {
		all = append(all, fmt.Sprintf("%.0f", x))
	}
	return strings.Join(all, "/")
}

// machine says what the figures are of.
func machine() string {
	text := []string{fmt.Sprintf("%d CPUs", runtime.NumCPU())}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, model, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				text = append(text, strings.TrimSpace(model))
				break
			}
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		text = append(text, "Linux "+unix.ByteSliceToString(u.Release[:]))
	}
	return strings.Join(text, ", ")
}
