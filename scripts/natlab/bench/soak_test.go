package main

import (
	"strings"
	"testing"
)

func TestJudge(t *testing.T) {
	samples := func(memory func(i int) float64, files func(i int) int) (all []soakSample) {
		for i := range 16 {
			all = append(all, soakSample{Memory: []float64{20, memory(i)}, Threads: []int{9, 9}, Files: []int{20, files(i)}})
		}
		return all
	}
	steady := func(int) int { return 20 }
	fills := func(i int) float64 { return min(20+4*float64(i), 36) }
	leaks := func(i int) float64 { return 20 + 4*float64(i) }
	for name, c := range map[string]struct {
		r    soakResult
		want string
	}{
		"good":   {soakResult{Samples: samples(fills, steady)}, ""},
		"memory": {soakResult{Samples: samples(leaks, steady)}, "memory of daemon b grew from 42.0 to 74.0 MB"},
		"files":  {soakResult{Samples: samples(fills, func(i int) int { return 20 + i })}, "open files of daemon b grew"},
		"gap":    {soakResult{Samples: samples(fills, steady), Gaps: []float64{2.5}}, "1 times no ping was answered"},
		"stall":  {soakResult{Samples: samples(fills, steady), Stalls: []float64{7, 8}}, "in 2 seconds, first after 7 s"},
		"short":  {soakResult{}, "too few"},
	} {
		t.Run(name, func(t *testing.T) {
			c.r.judge()
			got := strings.Join(c.r.Faults, "; ")
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("faults %q, want %q", got, c.want)
			}
		})
	}
}

func TestSettings(t *testing.T) {
	all := settings()
	if len(all) != 6 {
		t.Fatalf("%d settings", len(all))
	}
	for i, s := range all {
		if s.line.Delay != oneWay || i > 0 && s.line.Loss < all[i-1].line.Loss {
			t.Errorf("setting %q: %+v after %+v", s.name, s.line, all[max(i-1, 0)].line)
		}
	}
	if all[0].line.Loss != 0 || all[0].line.Reorder != 0 || all[1].line.Reorder == 0 || all[5].line.Loss != 0.01 {
		t.Errorf("%+v", all)
	}
}
