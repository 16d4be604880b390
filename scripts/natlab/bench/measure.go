package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	idlePings  = 2 * time.Second
	loadSettle = 500 * time.Millisecond
	iperfGrace = 20 * time.Second
	gigabyte   = 1e9
	smallSize  = 64
)

// measure runs the pairs. Who begins alternates, so that neither always gets
// the warmer machine.
func (b *bench) measure(ctx context.Context) (*results, error) {
	r := &results{
		Schema: 1, Time: time.Now().UTC().Truncate(time.Second),
		Pairs: b.opts.pairs, Seconds: b.opts.seconds, MTU: b.opts.mtu,
	}
	for _, t := range b.tunnels {
		before, err := memoryOf(t.pids)
		if err != nil {
			return nil, err
		}
		r.Tunnels = append(r.Tunnels, &figures{Name: t.name, MemoryBefore: before})
	}
	for pair := range b.opts.pairs {
		for turn := range b.tunnels {
			i := (pair + turn) % len(b.tunnels)
			s, err := b.sample(ctx, b.tunnels[i])
			if err != nil {
				return nil, fmt.Errorf("measure %s: %w", b.tunnels[i].name, err)
			}
			b.say("pair %d of %d, %-8s %5.2f Gbit/s, 4 streams %5.2f", pair+1, b.opts.pairs, b.tunnels[i].name, s[tcp1], s[tcp4])
			r.Tunnels[i].Samples = append(r.Tunnels[i].Samples, s)
		}
	}
	for i, t := range b.tunnels {
		after, err := memoryOf(t.pids)
		if err != nil {
			return nil, err
		}
		r.Tunnels[i].MemoryAfter = after
	}
	r.complete()
	return r, nil
}

// sample takes every figure of one tunnel once.
func (b *bench) sample(ctx context.Context, t *tunnel) (sample, error) {
	s := sample{}
	if err := b.idle(ctx, t, s); err != nil {
		return nil, err
	}
	one, err := b.tcp(ctx, t, "1")
	if err != nil {
		return nil, err
	}
	s[tcp1], s[daemons1], s[machine1] = one.speed, one.work.daemons, one.work.machine
	four, err := b.tcp(ctx, t, "4")
	if err != nil {
		return nil, err
	}
	s[tcp4], s[daemons4], s[machine4] = four.speed, four.work.daemons, four.work.machine
	s[resent] = one.resent
	load, err := b.pingUnderLoad(ctx, t)
	if err != nil {
		return nil, err
	}
	s[load50], s[load99], s[loadLost] = load.quantile(0.5), load.quantile(0.99), load.lostShare()
	s[flood], err = b.flood(ctx, t)
	return s, err
}

// idle pings without load. What the machine does meanwhile is mostly the work
// of others: it says how far the other figures can be trusted.
func (b *bench) idle(ctx context.Context, t *tunnel, s sample) error {
	before, err := workOf(t.pids)
	if err != nil {
		return err
	}
	start := time.Now()
	p, err := b.ping(ctx, t, idlePings)
	if err != nil {
		return err
	}
	after, err := workOf(t.pids)
	if err != nil {
		return err
	}
	all := time.Since(start).Seconds() * float64(runtime.NumCPU())
	s[idleBusy] = 100 * after.since(before).machine / all
	s[idle50], s[idle99] = p.quantile(0.5), p.quantile(0.99)
	return nil
}

// flow is a TCP measurement: Gbit/s, CPU seconds per 10^9 bytes, segments
// sent again.
type flow struct {
	speed  float64
	work   work
	resent float64
}

func (b *bench) tcp(ctx context.Context, t *tunnel, streams string) (flow, error) {
	before, err := workOf(t.pids)
	if err != nil {
		return flow{}, err
	}
	out, err := b.iperf(ctx, t, "-t", fmt.Sprint(b.opts.seconds), "-P", streams)
	if err != nil {
		return flow{}, err
	}
	after, err := workOf(t.pids)
	if err != nil {
		return flow{}, err
	}
	got := out.End.SumReceived
	if got.Bytes <= 0 {
		return flow{}, fmt.Errorf("iperf3 sent %.0f bytes and nothing arrived", out.End.SumSent.Bytes)
	}
	used, volume := after.since(before), got.Bytes/gigabyte
	return flow{
		speed:  got.BitsPerSecond / gigabyte,
		work:   work{used.daemons / volume, used.machine / volume},
		resent: out.End.SumSent.Retransmits,
	}, nil
}

// flood offers as many small UDP packets as the sender can and gives the
// thousands per second that arrived.
func (b *bench) flood(ctx context.Context, t *tunnel) (float64, error) {
	out, err := b.iperf(ctx, t, "-u", "-b", "0", "-l", fmt.Sprint(smallSize), "-t", fmt.Sprint(b.opts.seconds))
	if err != nil {
		return 0, err
	}
	sum := out.End.Sum
	if sum.Seconds <= 0 {
		return 0, errors.New("iperf3 gives no time for its UDP flood")
	}
	return (sum.Packets - sum.LostPackets) / sum.Seconds / 1000, nil
}

// pingUnderLoad pings while one TCP stream fills the tunnel.
func (b *bench) pingUnderLoad(ctx context.Context, t *tunnel) (pings, error) {
	var got pings
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := b.iperf(ctx, t, "-t", fmt.Sprint(b.opts.seconds))
		return err
	})
	g.Go(func() (err error) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(loadSettle):
		}
		during := time.Duration(b.opts.seconds)*time.Second - 2*loadSettle
		got, err = b.ping(ctx, t, during)
		return err
	})
	return got, g.Wait()
}

// ping has a copy of this program ping from inside host a.
func (b *bench) ping(ctx context.Context, t *tunnel, during time.Duration) (pings, error) {
	self, err := os.Executable()
	if err != nil {
		return pings{}, fmt.Errorf("find own program: %w", err)
	}
	out, err := output(b.a.Command(ctx, self, "-ping", t.addrB.String(), "-for", during.String()))
	if err != nil {
		return pings{}, err
	}
	var p pings
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		return pings{}, fmt.Errorf("read pings: %w", err)
	}
	return p, nil
}

// iperfResult is the part of what `iperf3 -J` prints that is used here.
type iperfResult struct {
	End struct {
		// Sum is of UDP, as the receiver counted it.
		Sum struct {
			Seconds     float64 `json:"seconds"`
			Packets     float64 `json:"packets"`
			LostPackets float64 `json:"lost_packets"`
		} `json:"sum"`
		SumSent struct {
			Bytes       float64 `json:"bytes"`
			Retransmits float64 `json:"retransmits"`
		} `json:"sum_sent"`
		SumReceived struct {
			Bytes         float64 `json:"bytes"`
			BitsPerSecond float64 `json:"bits_per_second"`
		} `json:"sum_received"`
	} `json:"end"`
}

// iperf sends from a to b through a tunnel.
func (b *bench) iperf(ctx context.Context, t *tunnel, args ...string) (iperfResult, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(b.opts.seconds)*time.Second+iperfGrace)
	defer cancel()
	args = append([]string{"-J", "-c", t.addrB.String(), "-B", t.addrA.String()}, args...)
	var r iperfResult
	out, err := output(b.a.Command(ctx, "iperf3", args...))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("read output of iperf3: %w", err)
	}
	return r, nil
}
