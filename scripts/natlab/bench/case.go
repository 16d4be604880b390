package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
)

// metric names a figure, as in JSON.
type metric string

// row is a metric as the table shows it.
type row struct {
	metric metric
	label  string
}

// sample is every figure of one tunnel, taken once.
type sample map[metric]float64

// testCase is a measurement that can be asked for by name. The first of its
// rows is the one that matters most.
type testCase struct {
	name string
	// congestion is the congestion control it cannot do without.
	congestion string
	rows       []row
	run        func(context.Context, *tunnel, sample) error
}

const (
	bbr   = "bbr"
	cubic = "cubic"
)

// cases are what compare can measure, in the order of the table.
func (b *bench) cases() []testCase {
	return []testCase{
		b.tcp(flowCase{name: "tcp1", prefix: "tcp1", label: "TCP 1 stream, BBR", congestion: bbr}),
		b.tcp(flowCase{name: "tcp1-cubic", prefix: "tcp1Cubic", label: "TCP 1 stream, cubic", congestion: cubic}),
		b.tcp(flowCase{name: "tcp4", prefix: "tcp4", label: "TCP 4 streams, BBR", congestion: bbr, args: []string{"-P", "4"}}),
		b.both(),
		b.pingIdle(),
		b.pingLoad("ping-bbr", "pingLoad", "BBR", bbr),
		b.pingLoad("ping-cubic", "pingLoadCubic", "cubic", cubic),
		b.flood("udp64", 64),
		b.flood("udp1200", 1200),
		b.pacedLarge(),
		b.pacedSmall(),
	}
}

// lossCases are those of a line with losses. How large messages are at the end
// of each measurement tells what a tunnel made of the losses.
func (b *bench) lossCases() []testCase {
	return []testCase{b.withSegments(b.cases()[0]), b.withSegments(b.cases()[1])}
}

// segmentsSuffix is that of the metrics of segments per message. They are shown
// in brief tables, too.
const segmentsSuffix = "Segments"

// withSegments adds a row to a case: the segments per message of the host that
// sent, where a tunnel has more than one.
func (b *bench) withSegments(c testCase) testCase {
	per := metric(strings.TrimSuffix(string(c.rows[0].metric), "Gbps") + segmentsSuffix)
	c.rows = append(c.rows, row{per, "  segments per message at the end"})
	run := c.run
	c.run = func(ctx context.Context, t *tunnel, s sample) error {
		if err := run(ctx, t, s); err != nil || t.name == variantRaw || t.name == variantControl {
			return err
		}
		status, err := t.hosts[0].Status(ctx)
		if err != nil {
			return err
		}
		peer, err := status.Peer(t.hosts[1].Name())
		s[per] = float64(peer.Segments)
		return err
	}
	return c
}

// both is TCP in both directions at once.
func (b *bench) both() testCase {
	return b.tcp(flowCase{name: "both", prefix: "tcpBoth", label: "TCP both directions at once, sum", congestion: bbr, args: []string{"--bidir"}})
}

// known are the names of what a verb can measure.
func known(verb string) []string {
	b := &bench{}
	var all []testCase
	switch verb {
	case verbCompare:
		all = b.cases()
	case verbLoss:
		all = b.lossCases()
	case verbRelay:
		all = b.relayCases()
	case verbPaths:
		for _, p := range b.places() {
			all = append(all, p.cases...)
		}
	}
	var names []string
	for _, c := range all {
		names = append(names, c.name)
	}
	return names
}

// choose takes the cases that were asked for and that the machine can run.
func (b *bench) choose(all []testCase) ([]testCase, error) {
	const file = "/proc/sys/net/ipv4/tcp_available_congestion_control"
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("list congestion controls: %w", err)
	}
	can := strings.Fields(string(text))
	var chosen []testCase
	for _, c := range all {
		if len(b.opts.only) > 0 && !slices.Contains(b.opts.only, c.name) {
			continue
		}
		if c.congestion != "" && !slices.Contains(can, c.congestion) {
			b.say("case %s is left out: this kernel has no %s", c.name, c.congestion)
			continue
		}
		chosen = append(chosen, c)
	}
	return chosen, nil
}
