package natlab

import (
	"cmp"
	"slices"
	"time"
)

// Outcome is what all runs of a cell say together.
type Outcome struct {
	Cell Cell
	Runs []Run
}

// Direct is how many runs became direct.
func (o Outcome) Direct() int { return o.count(func(r Run) bool { return r.Direct }) }

// Connected is in how many runs packets passed at all.
func (o Outcome) Connected() int { return o.count(func(r Run) bool { return r.Connected }) }

func (o Outcome) count(ok func(Run) bool) (n int) {
	for _, r := range o.Runs {
		if ok(r) {
			n++
		}
	}
	return n
}

// After is the median and the worst time of the runs that became direct; zero
// where none did.
func (o Outcome) After() (median, worst time.Duration) {
	var all []time.Duration
	for _, r := range o.Runs {
		if r.Direct {
			all = append(all, r.After)
		}
	}
	return middle(all)
}

// Spent is the median and the most of the packets that looked for a path.
func (o Outcome) Spent() (median, most int) {
	var all []int
	for _, r := range o.Runs {
		all = append(all, r.Spent)
	}
	return middle(all)
}

// Routers is the most that a router had in its table in any run.
func (o Outcome) Routers() (most Tracked) {
	for _, r := range o.Runs {
		most = most.most(r.Routers)
	}
	return most
}

// Excess says of the first run that left more in a router than may be; empty: none.
func (o Outcome) Excess() string {
	for _, r := range o.Runs {
		if r.Excess != "" {
			return r.Excess
		}
	}
	return ""
}

// Via are the ways by which it was connected in the end, those of both sides when
// they differ.
func (o Outcome) Via() (all []string) {
	for _, r := range o.Runs {
		if r.Via != "" && !slices.Contains(all, r.Via) {
			all = append(all, r.Via)
		}
	}
	return all
}

// Reached says that the runs reach the bar, and left no more in the routers than
// may be. A run that is direct too late counts as none.
func (o Outcome) Reached() bool {
	return o.reached(o.Cell.Bar.Share * float64(len(o.Runs)))
}

// reached is Reached where so many runs have to be direct in time.
func (o Outcome) reached(least float64) bool {
	bar := o.Cell.Bar
	if o.Excess() != "" {
		return false
	}
	if bar.Relay {
		return o.Connected() == len(o.Runs)
	}
	inTime := o.count(func(r Run) bool { return r.Direct && r.After <= bar.Worst })
	median, _ := o.After()
	return float64(inTime) >= least && o.Connected() == len(o.Runs) && (bar.Median == 0 || median <= bar.Median)
}

// middle is the median, the lower of two, and the greatest.
func middle[T cmp.Ordered](all []T) (median, greatest T) {
	if len(all) == 0 {
		return median, greatest
	}
	slices.Sort(all)
	return all[(len(all)-1)/2], all[len(all)-1]
}
