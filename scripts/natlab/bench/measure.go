package main

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// measure runs the rounds. Every case is measured on all tunnels in a row,
// so that what is compared lies close together in time; who begins changes
// from round to round, so that nobody always gets the warmer machine.
func (b *bench) measure(ctx context.Context, cases []testCase) (*results, error) {
	r := &results{
		Schema: 1, Time: time.Now().UTC().Truncate(time.Second), Machine: machine(),
		Pairs: b.opts.pairs, Seconds: b.opts.seconds, MTU: b.opts.mtu,
	}
	for _, c := range cases {
		r.cases = append(r.cases, c.rows)
	}
	for _, t := range b.tunnels {
		f := &figures{Name: t.name}
		for range b.opts.pairs {
			f.Samples = append(f.Samples, sample{})
		}
		r.Tunnels = append(r.Tunnels, f)
	}
	if err := b.memory(r, func(f *figures) (now, peak *[]float64) { return &f.MemoryBefore, nil }); err != nil {
		return nil, err
	}
	for round := range b.opts.pairs {
		for _, c := range cases {
			if err := b.round(ctx, r, c, round); err != nil {
				return nil, err
			}
		}
	}
	if err := b.memory(r, func(f *figures) (now, peak *[]float64) { return &f.MemoryAfter, &f.MemoryPeak }); err != nil {
		return nil, err
	}
	r.complete()
	return r, nil
}

// round measures one case once on every tunnel.
func (b *bench) round(ctx context.Context, r *results, c testCase, round int) error {
	var said []string
	for turn := range b.tunnels {
		i := (round + turn) % len(b.tunnels)
		s := r.Tunnels[i].Samples[round]
		if err := c.run(ctx, b.tunnels[i], s); err != nil {
			return fmt.Errorf("measure %s of %s: %w", c.name, b.tunnels[i].name, err)
		}
		said = append(said, b.tunnels[i].name+" "+figure(s[c.rows[0].metric]))
	}
	b.say("round %d of %d, %-10s  %s", round+1, b.opts.pairs, c.name, strings.Join(said, "  "))
	return nil
}

// memory notes what all daemons have, where the caller wants it.
func (b *bench) memory(r *results, where func(*figures) (now, peak *[]float64)) error {
	for i, t := range b.tunnels {
		now, peak := where(r.Tunnels[i])
		for _, pid := range t.pids {
			p, err := processOf(pid)
			if err != nil {
				return err
			}
			*now = append(*now, p.memory)
			if peak != nil {
				*peak = append(*peak, p.peak)
			}
		}
	}
	return nil
}
