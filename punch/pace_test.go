package punch

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	var c pace
	now := time.Now()
	for _, step := range []struct {
		gap   time.Duration
		times int
		want  time.Duration
	}{
		{time.Hour, 1, hush},
		{20 * time.Millisecond, 50, minHush},
		{100 * time.Millisecond, 50, 400 * time.Millisecond},
		{time.Hour, 1, hush},
		{100 * time.Millisecond, 50, 400 * time.Millisecond},
		{time.Second, 50, hush},
	} {
		for range step.times {
			now = now.Add(step.gap)
			c.note(now)
		}
		if got := c.hush(); (got - step.want).Abs() > 5*time.Millisecond {
			t.Errorf("%d gaps of %v: a silence is questioned after %v, want %v", step.times, step.gap, got, step.want)
		}
	}
}

// A side that only answers steady data misses it soon, and asks once.
func TestSteadyDataIsMissed(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		a.talk(b, 4*time.Second, true)
		begin := time.Now()
		rest(minHush + 2*tick)
		if n := requests(w.between(a.outer, b.outer, begin)); n != 1 {
			t.Errorf("%d checks", n)
		}
		rest(hush)
		if n := requests(w.between(a.outer, b.outer, begin)); n > 2 { // one may be for consent
			t.Errorf("%d checks in the end", n)
		}
	})
}
