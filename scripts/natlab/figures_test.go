package natlab

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

// envJSON names a file that gets every figure as a line of JSON.
const envJSON = "OVERLAY_LAB_JSON"

// figure is a measured duration of one cell of a test, in seconds.
type figure struct {
	Test    string    `json:"test"`
	Cell    string    `json:"cell"`
	What    string    `json:"what"`
	Median  float64   `json:"median"`
	Worst   float64   `json:"worst"`
	Seconds []float64 `json:"seconds"`
}

// figures collects the durations of one test, in the order of their cells. Several
// of them may add at the same time.
type figures struct {
	mu   sync.Mutex
	list []*figure
}

func (f *figures) add(cell, what string, d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.list, func(g *figure) bool { return g.Cell == cell && g.What == what })
	if i < 0 {
		i = len(f.list)
		f.list = append(f.list, &figure{Cell: cell, What: what})
	}
	f.list[i].Seconds = append(f.list[i].Seconds, d.Round(time.Millisecond/10).Seconds())
}

// of is everything measured of one thing, over all cells.
func (f *figures) of(what string) *figure {
	all := &figure{Cell: "all", What: what}
	for _, g := range f.list {
		if g.What == what {
			all.Seconds = append(all.Seconds, g.Seconds...)
		}
	}
	all.summarise()
	return all
}

func (g *figure) summarise() {
	g.Median, g.Worst = 0, 0
	if len(g.Seconds) == 0 {
		return
	}
	sorted := slices.Sorted(slices.Values(g.Seconds))
	g.Median = (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
	g.Worst = sorted[len(sorted)-1]
}

// report prints the table and appends it to the file of envJSON.
func (f *figures) report(t *testing.T) {
	t.Helper()
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\ncell\twhat\truns\tmedian s\tworst s")
	for _, g := range f.list {
		g.Test = t.Name()
		g.summarise()
		fmt.Fprintf(w, "%s\t%s\t%d\t%.3f\t%.3f\n", g.Cell, g.What, len(g.Seconds), g.Median, g.Worst)
	}
	w.Flush()
	t.Log(text.String())
	f.save(t)
}

func (f *figures) save(t *testing.T) {
	t.Helper()
	path := os.Getenv(envJSON)
	if path == "" {
		return
	}
	out, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	for _, g := range f.list {
		if err := json.NewEncoder(out).Encode(g); err != nil {
			t.Fatal(err)
		}
	}
}

// atMost holds a figure against the bar of the issue; zero is no bar. What was never
// measured reaches none.
func (g *figure) atMost(t *testing.T, median, worst time.Duration) {
	t.Helper()
	if len(g.Seconds) == 0 {
		t.Errorf("%s of %s was never measured", g.What, g.Cell)
	}
	if median > 0 && g.Median > median.Seconds() {
		t.Errorf("%s of %s: median %.3f s of %d runs is over %v", g.What, g.Cell, g.Median, len(g.Seconds), median)
	}
	if worst > 0 && g.Worst > worst.Seconds() {
		t.Errorf("%s of %s: worst %.3f s of %d runs is over %v", g.What, g.Cell, g.Worst, len(g.Seconds), worst)
	}
}

func TestFigures(t *testing.T) {
	var f figures
	for _, ms := range []int{30, 10, 20, 100} {
		f.add("one", "reply", time.Duration(ms)*time.Millisecond)
	}
	f.add("two", "reply", time.Second)
	f.add("two", "up", time.Minute)
	if g := f.of("reply"); g.Median != 0.03 || g.Worst != 1 {
		t.Errorf("all: median %v, worst %v", g.Median, g.Worst)
	}
	f.list[0].summarise()
	if g := f.list[0]; g.Median != 0.025 || g.Worst != 0.1 {
		t.Errorf("cell one: median %v, worst %v", g.Median, g.Worst)
	}
}
