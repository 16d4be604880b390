package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"overlay/scripts/natlab"
)

const (
	oneWay   = 10 * time.Millisecond // 20 ms there and back
	lateness = 3 * time.Millisecond
	lineSeed = 20
)

// setting is a state of the line between the hosts.
type setting struct {
	name string
	line natlab.Line
}

// settings come in the order of the harm they do: what a tunnel has learned
// of a worse line does not go into the figures of a better one.
func settings() []setting {
	all := []setting{
		{"clean", natlab.Line{}},
		{"reordered 1 %", natlab.Line{Reorder: 0.01, Late: lateness}},
	}
	for _, percent := range []float64{0.05, 0.1, 0.5, 1} {
		all = append(all, setting{fmt.Sprintf("lost %v %%", percent), natlab.Line{Loss: percent / 100}})
	}
	for i := range all {
		all[i].line.Delay, all[i].line.Seed = oneWay, lineSeed
	}
	return all
}

// compareUnderLoss is TCP over a line with a round trip of 20 ms that loses
// and reorders datagrams, in both directions.
func compareUnderLoss(ctx context.Context, o *options) error {
	s := &series{}
	err := inLab(ctx, o, func(b *bench) (err error) {
		cases, err := b.choose(b.lossCases())
		if err != nil || len(cases) == 0 {
			return err
		}
		if err := b.build(ctx, layout{peers: 1}); err != nil {
			return err
		}
		line, err := b.lab.StartLine(ctx, natlab.Line{Delay: oneWay})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, line.Close()) }()
		for _, one := range settings() {
			b.say("%s, round trip %v", one.name, 2*oneWay)
			line.Set(one.line)
			r, err := b.measure(ctx, cases)
			if err != nil {
				return err
			}
			r.Setting = one.name
			s.Runs = append(s.Runs, r)
		}
		return nil
	})
	return errors.Join(err, s.finish(o))
}
