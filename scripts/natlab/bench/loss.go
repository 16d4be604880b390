package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"overlay/scripts/natlab"
)

const (
	oneWay   = 10 * time.Millisecond // 20 ms there and back
	lateness = 3 * time.Millisecond
	lineSeed = 20

	maxWindow = 32 << 20
)

// setting is a state of the line between the hosts; of reordered packets 1 %
// come 3 ms late, and the number behind loss is in percent.
type setting struct {
	name string
	line natlab.Line
}

// settings come in the order of the harm they do: what a tunnel has learned
// of a worse line does not go into the figures of a better one.
func settings() []setting {
	all := []setting{
		{"clean", natlab.Line{}},
		{"reorder", natlab.Line{Reorder: 0.01, Late: lateness}},
	}
	for _, percent := range []float64{0.05, 0.1, 0.5, 1} {
		all = append(all, setting{fmt.Sprintf("loss%v", percent), natlab.Line{Loss: percent / 100}})
	}
	for i := range all {
		all[i].line.Delay, all[i].line.Seed = oneWay, lineSeed
	}
	return all
}

// widen lets the hosts have as much under way as a fast line of this length
// holds; with the kernel's own bound all tunnels would be as fast as that.
func (b *bench) widen(ctx context.Context) error {
	for _, t := range b.tunnels {
		for _, h := range t.hosts {
			script := fmt.Sprintf("cd /proc/sys/net/ipv4; for f in tcp_rmem tcp_wmem; do echo '4096 131072 %d' >$f; done", maxWindow)
			if _, err := output(h.Command(ctx, "/bin/sh", "-ec", script)); err != nil {
				return err
			}
		}
	}
	return nil
}

func settingNames() (names []string) {
	for _, s := range settings() {
		names = append(names, s.name)
	}
	return names
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
		if err := b.widen(ctx); err != nil {
			return err
		}
		line, err := b.lab.StartLine(ctx, natlab.Line{Delay: oneWay})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, line.Close()) }()
		for _, one := range settings() {
			if len(o.settings) > 0 && !slices.Contains(o.settings, one.name) {
				continue
			}
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
