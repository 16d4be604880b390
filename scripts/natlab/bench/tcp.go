package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	idlePings  = 2 * time.Second
	loadSettle = 500 * time.Millisecond
)

// flowCase is a TCP measurement: Gbit/s, CPU seconds per 10^9 bytes, segments
// sent again. The prefix is that of its metrics.
type flowCase struct {
	name, prefix, label, congestion string
	args                            []string
	ipv6                            bool
	server                          bool // what the server uses counts, too
}

func (f flowCase) metric(suffix string) metric { return metric(f.prefix + suffix) }

func (f flowCase) rows() []row {
	rows := []row{
		{f.metric("Gbps"), f.label + ", Gbit/s"},
		{f.metric("DaemonSecondsPerGB"), "  daemons, CPU s/GB"},
		{f.metric("MachineSecondsPerGB"), "  machine, CPU s/GB"},
		{f.metric("Retransmits"), "  segments sent again"},
	}
	if f.server {
		rows = append(rows, row{f.metric("ServerSecondsPerGB"), "  server, CPU s/GB"})
	}
	return rows
}

// note takes down what was carried in some CPU time.
func (f flowCase) note(s sample, used work, received ...iperfSum) error {
	var bytes, speed float64
	for _, sum := range received {
		if sum.Bytes <= 0 {
			return fmt.Errorf("%s: iperf3 says that nothing arrived", f.name)
		}
		bytes, speed = bytes+sum.Bytes, speed+sum.BitsPerSecond
	}
	s[f.metric("Gbps")] = speed / gigabyte
	s[f.metric("DaemonSecondsPerGB")] = used.sum() / (bytes / gigabyte)
	s[f.metric("MachineSecondsPerGB")] = used.machine / (bytes / gigabyte)
	if f.server {
		s[f.metric("ServerSecondsPerGB")] = used.server / (bytes / gigabyte)
	}
	return nil
}

// tcp measures streams to the first peer.
func (b *bench) tcp(f flowCase) testCase {
	run := func(ctx context.Context, t *tunnel, s sample) error {
		var r iperfResult
		used, err := t.spend(func() (err error) {
			way := b.stream(t, 1)
			if f.ipv6 {
				way.from, way.to = t.addrs6[0], t.addrs6[1]
			}
			r, err = way.iperf(ctx, append([]string{"-C", f.congestion}, f.args...)...)
			return err
		})
		if err != nil {
			return err
		}
		received := []iperfSum{r.End.SumReceived}
		if r.End.BackSent.Bytes > 0 {
			received = append(received, r.End.BackReceived)
		}
		s[f.metric("Retransmits")] = r.End.SumSent.Retransmits + r.End.BackSent.Retransmits
		return f.note(s, used, received...)
	}
	return testCase{f.name, f.congestion, f.rows(), run}
}

// twoPeers measures one stream to each of two peers at once.
func (b *bench) twoPeers() testCase {
	f := flowCase{name: "peers", prefix: "tcpTwoPeers", label: "TCP to two peers at once, sum", congestion: bbr}
	run := func(ctx context.Context, t *tunnel, s sample) error {
		var r [2]iperfResult
		used, err := t.spend(func() error {
			g, ctx := errgroup.WithContext(ctx)
			for i := range r {
				g.Go(func() (err error) {
					r[i], err = b.stream(t, i+1).iperf(ctx, "-C", f.congestion)
					return err
				})
			}
			return g.Wait()
		})
		if err != nil {
			return err
		}
		s[f.metric("Retransmits")] = r[0].End.SumSent.Retransmits + r[1].End.SumSent.Retransmits
		return f.note(s, used, r[0].End.SumReceived, r[1].End.SumReceived)
	}
	return testCase{f.name, f.congestion, f.rows(), run}
}

// pingIdle pings without load. What the machine does meanwhile is mostly the
// work of others: it says how far the other figures can be trusted.
func (b *bench) pingIdle() testCase {
	rows := []row{
		{"pingIdleP50ms", "ping idle p50, ms"},
		{"pingIdleP99ms", "ping idle p99, ms"},
		{"idleMachineBusyPercent", "  machine busy meanwhile, %"},
	}
	run := func(ctx context.Context, t *tunnel, s sample) error {
		var p pings
		start := time.Now()
		used, err := t.spend(func() (err error) {
			p, err = t.ping(ctx, pingEvery, idlePings)
			return err
		})
		if err != nil {
			return err
		}
		all := time.Since(start).Seconds() * float64(runtime.NumCPU())
		s["idleMachineBusyPercent"] = 100 * used.machine / all
		s["pingIdleP50ms"], s["pingIdleP99ms"] = p.quantile(0.5), p.quantile(0.99)
		return nil
	}
	return testCase{"ping-idle", "", rows, run}
}

// pingLoad pings while one TCP stream fills the tunnel.
func (b *bench) pingLoad(name, prefix, label, congestion string) testCase {
	p50, p99, gone := metric(prefix+"P50ms"), metric(prefix+"P99ms"), metric(prefix+"LostPercent")
	rows := []row{
		{p50, "ping under " + label + " p50, ms"},
		{p99, "ping under " + label + " p99, ms"},
		{gone, "  lost, %"},
	}
	run := func(ctx context.Context, t *tunnel, s sample) error {
		var got pings
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error {
			_, err := b.stream(t, 1).iperf(ctx, "-C", congestion)
			return err
		})
		g.Go(func() (err error) {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(loadSettle):
			}
			during := time.Duration(b.opts.seconds)*time.Second - 2*loadSettle
			got, err = t.ping(ctx, pingEvery, during)
			return err
		})
		err := g.Wait()
		s[p50], s[p99], s[gone] = got.quantile(0.5), got.quantile(0.99), got.lostShare()
		return err
	}
	return testCase{name, congestion, rows, run}
}
