package tun

import (
	"log/slog"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	type sample struct {
		own, idle float64
		times     int
		want      int // after all of them
	}
	for name, c := range map[string]struct {
		most    int
		samples []sample
	}{
		"idle":                 {4, []sample{{0, 4, 100, 1}}},
		"busy, others idle":    {4, []sample{{0.95, 3, 1, 1}, {0.95, 3, 1, 2}}},
		"busy once":            {4, []sample{{0.95, 3, 1, 1}, {0.85, 3, 1, 1}, {0.95, 3, 1, 1}}},
		"busy, others too":     {4, []sample{{0.99, 0.4, 50, 1}}},
		"more and more":        {4, []sample{{0.95, 3, 2, 2}, {1.75, 2, 9, 2}, {1.95, 2, 2, 3}, {2.9, 1, 2, 4}, {3.9, 0.6, 9, 4}}},
		"no more than there":   {2, []sample{{0.95, 3, 2, 2}, {2, 2, 9, 2}}},
		"enough for less":      {4, []sample{{0.95, 3, 2, 2}, {0.85, 3, 9, 2}, {0.75, 3, 1, 2}, {0.75, 3, 1, 1}, {0, 4, 9, 1}}},
		"less, then more":      {4, []sample{{0.95, 3, 2, 2}, {0.5, 3, 2, 1}, {0.95, 3, 2, 2}}},
		"full":                 {2, []sample{{0.95, 1, 2, 2}, {1.5, 0.05, 1, 2}, {1.5, 0.05, 1, 1}}},
		"full, not at once":    {2, []sample{{0.95, 1, 2, 2}, {1.5, 0, 2, 1}, {0.95, 1, procsHold, 1}, {0.95, 1, 1, 2}}},
		"full once":            {2, []sample{{0.95, 1, 2, 2}, {1.5, 0.05, 1, 2}, {1.5, 0.2, 1, 2}, {1.5, 0.05, 1, 2}}},
		"full with one":        {2, []sample{{1, 0, 50, 1}, {1, 1, 2, 2}}},
		"strangely much":       {2, []sample{{1e9, 1e9, 9, 2}}},
		"time that went wrong": {2, []sample{{-1, -1, 9, 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			p := pace{now: 1, most: c.most}
			for i, s := range c.samples {
				n := 0
				for range s.times {
					n = p.step(s.own, s.idle)
				}
				if n != s.want {
					t.Fatalf("after %d: %d processors, want %d", i, n, s.want)
				}
			}
		})
	}
}

func TestParseIdle(t *testing.T) {
	for line, want := range map[string]time.Duration{
		"cpu  79242 0 74306 842486413 756859 6140 67701 0 0 0\ncpu0 1": (842486413 + 756859) * 10 * time.Millisecond,
		"cpu 1 2 3 4 5\n": 90 * time.Millisecond,
		"cpu 1 2 3 0 0\n": 0,
	} {
		if got, err := parseIdle([]byte(line)); err != nil || got != want {
			t.Errorf("%q: %v, %v", line, got, err)
		}
	}
	for _, line := range []string{
		"", "\n", "cpu", "cpu 1 2 3 4\n", "cpu 1 2 3 4 5", "cpu0 1 2 3 4 5\n", "cpu 1 2 3 x 5\n", "cpu 1 2 3 4 -5\n",
		"cpu 1 2 3 4 281474976710656\n", "intr 1 2 3 4 5 6\n", "cpu 1 2 3 " + strings.Repeat("9", 400) + " 5\n",
	} {
		if got, err := parseIdle([]byte(line)); err == nil {
			t.Errorf("%q: %v", line, got)
		}
	}
}

func FuzzParseIdle(f *testing.F) {
	f.Add([]byte("cpu  1 2 3 4 5 6\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := parseIdle(b); err == nil && d < 0 {
			t.Fatalf("%v", d)
		}
	})
}

// openProcs makes the test's procs on at least two processors.
func openProcs(t *testing.T) *procs {
	t.Helper()
	t.Setenv("GOMAXPROCS", "")
	before := runtime.GOMAXPROCS(3)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	p := newProcs(slog.New(slog.DiscardHandler))
	if p == nil {
		t.Fatal("nothing to adapt")
	}
	t.Cleanup(p.close)
	return p
}

func TestProcsRestores(t *testing.T) {
	p := openProcs(t)
	if n := runtime.GOMAXPROCS(0); n != 1 {
		t.Fatalf("starts with %d processors", n)
	}
	p.close()
	if n := runtime.GOMAXPROCS(0); n != 3 {
		t.Fatalf("%d processors after closing", n)
	}
	runtime.GOMAXPROCS(2) // somebody else's now
	p.close()
	p.last.at -= procsInterval
	p.next.Store(0)
	p.sample()
	if n := runtime.GOMAXPROCS(0); n != 2 {
		t.Fatalf("%d processors although closed", n)
	}
}

func TestProcsLeavesAlone(t *testing.T) {
	before := runtime.GOMAXPROCS(3)
	defer runtime.GOMAXPROCS(before)
	t.Setenv("GOMAXPROCS", "3")
	p := newProcs(slog.New(slog.DiscardHandler))
	p.sample()
	p.close()
	if n := runtime.GOMAXPROCS(0); p != nil || n != 3 {
		t.Fatalf("%d processors", n)
	}
	t.Setenv("GOMAXPROCS", "")
	runtime.GOMAXPROCS(1)
	if p := newProcs(slog.New(slog.DiscardHandler)); p != nil {
		t.Fatal("adapts a single processor")
	}
}

func TestDeviceProcessors(t *testing.T) {
	s := newSpace(t)
	t.Setenv("GOMAXPROCS", "")
	before := runtime.GOMAXPROCS(3)
	defer runtime.GOMAXPROCS(before)
	d := newNode(t, s, 1, func(c *Config) { c.Processors = true })
	if n := runtime.GOMAXPROCS(0); n != 1 {
		t.Errorf("starts with %d processors", n)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := runtime.GOMAXPROCS(0); n != 3 {
		t.Errorf("%d processors after closing", n)
	}
}

// Real clocks: a sample a quarter of a second apart, and what it says is
// possible on this machine.
func TestProcsSamples(t *testing.T) {
	p := openProcs(t)
	first := p.last
	for next, last := range map[time.Duration]time.Duration{time.Hour: 0, 0: time.Hour} { // not yet; too soon after another
		p.next.Store(int64(next))
		p.last.at = last
		if p.sample(); p.last.at != last {
			t.Fatalf("sampled at %v", p.last.at)
		}
	}
	p.last = first
	p.next.Store(int64(first.at + procsInterval))
	for begin := time.Now(); p.last == first && time.Since(begin) < 10*time.Second; {
		p.sample()
	}
	own, idle := p.last.own-first.own, p.last.idle-first.idle
	took := p.last.at - first.at
	cores := time.Duration(strings.Count(readStat(t), "\ncpu"))
	const tick = 4 * time.Second / statTicks // each processor's clock is as coarse
	if took < procsInterval || own <= 0 || own > cores*(took+tick) || idle < 0 || idle > cores*(took+tick) {
		t.Fatalf("in %v: own %v, idle %v, of %d processors", took, own, idle, cores)
	}
	if next := time.Duration(p.next.Load()); next < p.last.at || next > p.last.at+procsInterval {
		t.Fatalf("sampled at %v, next at %v", p.last.at, next)
	}
}

func readStat(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(statPath)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestProcsAllocateNothing(t *testing.T) {
	p := openProcs(t)
	if n := testing.AllocsPerRun(100, func() { p.next.Store(1 << 60); p.sample() }); n > 0 {
		t.Errorf("%v allocations between samples", n)
	}
}
