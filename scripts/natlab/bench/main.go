// Command bench compares the overlay with raw wireguard-go, built from the same
// module, between public hosts of a lab: speed, CPU, latency and memory, at
// equal MTU, in interleaved rounds. Only ratios inside one run count: machines
// differ, and one machine from hour to hour.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"overlay/scripts/natlab"
)

const (
	exitFailure     = 1
	exitUsage       = 2
	exitInterrupted = 130
)

func main() { os.Exit(run(os.Args[1:])) }

// verbs are what the program can do, by the first argument.
func verbs() map[string]func(context.Context, *options) error {
	return map[string]func(context.Context, *options) error{
		verbCompare: compare,
		verbLoss:    compareUnderLoss,
		verbPaths:   comparePaths,
		verbProfile: profile,
		verbSoak:    soak,
		verbRelay:   compareRelay,
		verbNAT:     measureNATs,
		verbPing:    answerPing,
		verbPour:    pour,
	}
}

func run(args []string) int {
	o, err := parseOptions(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(),
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	err = verbs()[o.verb](ctx, o)
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

// bench is one lab with the tunnels in it.
type bench struct {
	opts     *options
	lab      *natlab.Lab
	progress io.Writer
	tunnels  []*tunnel
}

// say tells who is waiting what goes on.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, format+"\n", args...)
}

// inLab makes an empty lab without delay, and removes it afterwards.
func inLab(ctx context.Context, o *options, f func(*bench) error) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	lab, err := natlab.New(ctx, natlab.Options{Delay: -1, Binary: o.overlay, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	return f(&bench{opts: o, lab: lab, progress: os.Stderr})
}

// compare is the comparison on a plain network.
func compare(ctx context.Context, o *options) error {
	return compareCases(ctx, o, layout{peers: 1}, (*bench).cases)
}

// compareCases measures the chosen ones of some cases, and tells.
func compareCases(ctx context.Context, o *options, on layout, all func(*bench) []testCase) error {
	return inLab(ctx, o, func(b *bench) error {
		cases, err := b.choose(all(b))
		if err != nil || len(cases) == 0 {
			return err
		}
		if err := b.build(ctx, on); err != nil {
			return err
		}
		r, err := b.measure(ctx, cases)
		if err != nil {
			return err
		}
		if err := show(os.Stdout, o, false, r); err != nil {
			return err
		}
		return save(r, o.json)
	})
}

// series is what a comparison in several settings says.
type series struct {
	Schema int        `json:"schema"`
	Verb   string     `json:"verb"`
	Runs   []*results `json:"runs"`
}

// finish prints and saves a series.
func (s *series) finish(o *options) error {
	s.Schema, s.Verb = 1, o.verb
	if err := show(os.Stdout, o, true, s.Runs...); err != nil {
		return err
	}
	return save(s, o.json)
}

// save writes a document to a file, if it has a name.
func save(document any, name string) error {
	if name == "" {
		return nil
	}
	text, err := json.MarshalIndent(document, "", "\t")
	if err != nil {
		return fmt.Errorf("encode figures: %w", err)
	}
	if err := os.WriteFile(name, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("save figures: %w", err)
	}
	return nil
}
