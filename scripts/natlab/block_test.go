package natlab

import (
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// TestBlockRounds lets many pairs of networks that draw their ports from blocks
// try for four rounds, of which there is one in a minute. Most of the time they
// wait, so several labs do so side by side.
func TestBlockRounds(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("four rounds take more than three minutes")
	}
	const (
		labs, each  = 5, 4
		first, four = 30 * time.Second, 215 * time.Second
		// Of so many runs that become direct one time in five, and three in five, fewer
		// do once in 90 and once in 600 times.
		leastFirst, leastFour = 1, 6
	)
	cell := Cell{Group: "block-block", One: at(Block), Two: at(Block), Bar: within(four, 0.6)}
	runs := make(chan Run, labs*each)
	var g errgroup.Group
	var pairs []*Pair
	for range labs {
		pairs = append(pairs, mustPair(t, cell))
	}
	for _, p := range pairs {
		g.Go(func() error {
			for i := range each {
				r, err := p.Run(t.Context(), i)
				if err != nil {
					return err
				}
				t.Logf("%+v", r)
				if r.Fits > 0 && !r.Direct {
					t.Error("ports fitted, and no path was found")
				}
				runs <- r
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	close(runs)
	early, late := 0, 0
	for r := range runs {
		if r.Excess != "" {
			t.Error(r.Excess)
		}
		switch {
		case r.Direct && r.After <= first:
			early++
		case r.Direct && r.After <= four:
			late++
		}
	}
	t.Logf("of %d runs %d were direct in the first round, %d within four", labs*each, early, early+late)
	if early < leastFirst || early+late < leastFour {
		t.Errorf("%d and %d of %d runs", early, early+late, labs*each)
	}
}
