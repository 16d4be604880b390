// Command bench compares the overlay with raw wireguard-go, built from the same
// module, between two public hosts of a lab without delay: speed, CPU, latency
// and memory, at equal MTU, in interleaved pairs on the same two hosts. Only
// ratios inside one run count: machines differ, and one machine from hour to
// hour.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"overlay/scripts/natlab"
)

const (
	exitFailure     = 1
	exitUsage       = 2
	exitInterrupted = 130

	defaultPairs   = 5
	defaultSeconds = 10
	quickPairs     = 1
	quickSeconds   = 2
	maxPairs       = 100
	maxSeconds     = 600
	defaultMTU     = 1400
)

// options are the command line.
type options struct {
	overlay, wireguard string
	pairs, seconds     int
	mtu                int
	quick, control     bool
	json               string

	// The other two are for the copy of this program that runs inside a
	// host of the lab.
	ping string
	wait time.Duration
}

func main() { os.Exit(run()) }

func parseOptions() (*options, error) {
	o := &options{}
	flag.StringVar(&o.overlay, "overlay", "", "ready overlay program; empty compiles it")
	flag.StringVar(&o.wireguard, "wireguard", "wireguard-go", "ready wireguard-go program")
	flag.IntVar(&o.pairs, "pairs", defaultPairs, "interleaved pairs of measurements")
	flag.IntVar(&o.seconds, "seconds", defaultSeconds, "length of each measurement")
	flag.IntVar(&o.mtu, "mtu", defaultMTU, "MTU of both tunnels")
	flag.BoolVar(&o.quick, "quick", false, fmt.Sprintf("%d pair of %d s: shows that it works, proves no figure", quickPairs, quickSeconds))
	flag.BoolVar(&o.control, "control", false, "compare raw with raw: the noise of this machine")
	flag.StringVar(&o.json, "json", "", "write all figures to this `file`, too")
	flag.StringVar(&o.ping, "ping", "", "internal: ping this `address` and print the round trips")
	flag.DurationVar(&o.wait, "for", time.Second, "internal: how long to ping")
	flag.Parse()
	if o.quick {
		o.pairs, o.seconds = quickPairs, quickSeconds
	}
	if flag.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", flag.Arg(0))
	}
	if o.pairs < 1 || o.pairs > maxPairs || o.seconds < 2 || o.seconds > maxSeconds {
		return nil, fmt.Errorf("pairs must be 1 to %d, seconds 2 to %d", maxPairs, maxSeconds)
	}
	return o, nil
}

func run() int {
	o, err := parseOptions()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(),
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	if o.ping != "" {
		err = answerPing(ctx, o)
	} else {
		err = compare(ctx, o)
	}
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "\nInterrupted; everything the bench made is removed.")
		return exitInterrupted
	default:
		fmt.Fprintln(os.Stderr, "bench:", err)
		return exitFailure
	}
}

// answerPing is all that the copy inside a host does.
func answerPing(ctx context.Context, o *options) error {
	addr, err := netip.ParseAddr(o.ping)
	if err != nil {
		return fmt.Errorf("parse address to ping: %w", err)
	}
	p, err := ping(ctx, addr, o.wait)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(p)
}

func compare(ctx context.Context, o *options) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	lab, err := natlab.New(ctx, natlab.Options{Delay: -1, Binary: o.overlay, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	b := &bench{opts: o, lab: lab, progress: os.Stderr}
	if err := b.build(ctx); err != nil {
		return err
	}
	r, err := b.measure(ctx)
	if err != nil {
		return err
	}
	if err := r.table(os.Stdout); err != nil {
		return err
	}
	return save(r, o.json)
}

func save(r *results, name string) error {
	if name == "" {
		return nil
	}
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("encode figures: %w", err)
	}
	if err := os.WriteFile(name, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("save figures: %w", err)
	}
	return nil
}

// bench is one run: a lab, its two hosts, and the tunnels between them.
type bench struct {
	opts     *options
	lab      *natlab.Lab
	progress io.Writer

	a, b    *natlab.Host
	tunnels []*tunnel
}

// say tells who is waiting what goes on.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, format+"\n", args...)
}
