package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	soakEvery   = 10 * time.Second
	soakPing    = 100 * time.Millisecond
	soakTrickle = "1M"
	soakSize    = "200"
	minSamples  = 12

	// What memory may grow by between the second and the last quarter.
	growthShare = 1.1
	growthMB    = 4
)

// soakSample is what the daemons hold at a time, a first.
type soakSample struct {
	Seconds float64   `json:"seconds"`
	Memory  []float64 `json:"rssMB"`
	Threads []int     `json:"threads"`
	Files   []int     `json:"files"`
}

// soakResult is what a soak says. Stalls are the seconds, from the beginning,
// in which the TCP stream carried nothing, Gaps the times of 1 s or more
// without an answered ping.
type soakResult struct {
	Schema  int          `json:"schema"`
	Variant string       `json:"variant"`
	Minutes float64      `json:"minutes"`
	Mbps    int          `json:"mbps"` // pace of the TCP stream; 0: none
	Gbps    float64      `json:"tcpGbps"`
	Lost    float64      `json:"pingLostPercent"`
	Trickle float64      `json:"udpLostPercent"`
	Stalls  []float64    `json:"stalls"`
	Gaps    []float64    `json:"gaps"`
	Samples []soakSample `json:"samples"`
	Faults  []string     `json:"faults"`
}

// soak loads one tunnel for a long time and watches its daemons.
func soak(ctx context.Context, o *options) error {
	return inLab(ctx, o, func(b *bench) error {
		t, err := b.open(ctx, o.variant, layout{peers: 1, side: true})
		if err != nil {
			return err
		}
		r := &soakResult{Schema: 1, Variant: o.variant, Minutes: o.minutes, Mbps: o.mbps}
		if err := b.load(ctx, t, r); err != nil {
			return err
		}
		r.judge()
		if err := save(r, o.json); err != nil {
			return err
		}
		return r.verdict()
	})
}

// load runs everything at once until the time is over.
func (b *bench) load(ctx context.Context, t *tunnel, r *soakResult) error {
	during := time.Duration(b.opts.minutes * float64(time.Minute))
	g, ctx := errgroup.WithContext(ctx)
	way := b.stream(t, 1)
	way.seconds = int(during.Seconds())
	g.Go(func() error {
		args := []string{"-i", "1"}
		if r.Mbps > 0 {
			args = append(args, "-b", fmt.Sprintf("%dM", r.Mbps))
		}
		out, err := way.iperf(ctx, args...)
		if err != nil {
			return err
		}
		r.Gbps = out.End.SumReceived.BitsPerSecond / gigabyte
		for _, interval := range out.Intervals {
			if interval.Sum.Bytes == 0 {
				r.Stalls = append(r.Stalls, interval.Sum.Start)
			}
		}
		return nil
	})
	g.Go(func() error {
		side := way
		side.port = sidePort
		out, err := side.iperf(ctx, "-u", "-b", soakTrickle, "-l", soakSize, "-i", "10")
		if err != nil {
			return err
		}
		r.Trickle, _, err = out.arrived()
		return err
	})
	g.Go(func() error {
		p, err := t.ping(ctx, soakPing, during)
		r.Lost, r.Gaps = p.lostShare(), p.Gaps
		return err
	})
	g.Go(func() error { return b.watch(ctx, t, during, r) })
	return g.Wait()
}

// watch takes samples of the daemons.
func (b *bench) watch(ctx context.Context, t *tunnel, during time.Duration, r *soakResult) error {
	start := time.Now()
	tick := time.NewTicker(min(soakEvery, during/minSamples))
	defer tick.Stop()
	for time.Since(start) < during {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		s := soakSample{Seconds: time.Since(start).Seconds()}
		for _, pid := range t.pids {
			p, err := processOf(pid)
			if err != nil {
				return err
			}
			s.Memory, s.Threads, s.Files = append(s.Memory, p.memory), append(s.Threads, p.threads), append(s.Files, p.files)
		}
		r.Samples = append(r.Samples, s)
		b.say("%5.0f s: RSS %s MB, threads %v, files %v", s.Seconds, ends(s.Memory), s.Threads, s.Files)
	}
	return nil
}

// judge looks for what must not be.
func (r *soakResult) judge() {
	if n := len(r.Stalls); n > 0 {
		r.fault("the TCP stream stood still in %d seconds, first after %.0f s", n, r.Stalls[0])
	}
	if n := len(r.Gaps); n > 0 {
		r.fault("%d times no ping was answered for 1 s or more, first for %.1f s", n, r.Gaps[0])
	}
	quarter := len(r.Samples) / 4
	if quarter == 0 {
		r.fault("%d samples are too few to see memory grow", len(r.Samples))
		return
	}
	// The first quarter fills the pools.
	early, late := r.Samples[quarter:2*quarter], r.Samples[len(r.Samples)-quarter:]
	for i := range early[0].Memory {
		of := func(all []soakSample, what func(soakSample) float64) float64 {
			var column []float64
			for _, s := range all {
				column = append(column, what(s))
			}
			return median(column)
		}
		memory := func(s soakSample) float64 { return s.Memory[i] }
		if one, two := of(early, memory), of(late, memory); two > one*growthShare+growthMB {
			r.fault("memory of daemon %c grew from %.1f to %.1f MB", 'a'+i, one, two)
		}
		files := func(s soakSample) float64 { return float64(s.Files[i]) }
		if one, two := of(early, files), of(late, files); two > one*growthShare {
			r.fault("open files of daemon %c grew from %.0f to %.0f", 'a'+i, one, two)
		}
	}
}

func (r *soakResult) fault(format string, args ...any) {
	r.Faults = append(r.Faults, fmt.Sprintf(format, args...))
}

// verdict prints the outcome; faults are an error.
func (r *soakResult) verdict() error {
	fmt.Fprintf(os.Stdout, "%s, %v minutes: TCP %.2f Gbit/s, pings lost %.2f %%, UDP trickle lost %.2f %%\n",
		r.Variant, r.Minutes, r.Gbps, r.Lost, r.Trickle)
	if len(r.Faults) == 0 {
		fmt.Println("good: no gap, no stall, no growth")
		return nil
	}
	var errs []error
	for _, f := range r.Faults {
		errs = append(errs, errors.New(f))
	}
	return errors.Join(errs...)
}
