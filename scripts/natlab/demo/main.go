// Command demo shows the whole product on real parts: a server on the Internet
// and two laptops behind NATs that refuse unsolicited packets, joined by the
// three lines a user types, and one ssh command over the overlay address.
// Every claim it prints is checked; its exit status is 0 only if all held.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"overlay/scripts/natlab"
)

const (
	timeLimit       = 3 * time.Minute
	exitFailure     = 1
	exitInterrupted = 130
)

func main() { os.Exit(run()) }

func run() int {
	binary := flag.String("overlay", "", "ready overlay program; empty compiles it")
	flag.Parse()
	// A closed pipe on standard output must not end the program before it
	// has cleaned up.
	ctx, stop := signal.NotifyContext(context.Background(),
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	limited, cancel := context.WithTimeout(ctx, timeLimit)
	defer cancel()
	err := play(limited, *binary)
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "\nInterrupted; everything the demo made is removed.")
		return exitInterrupted
	default:
		fmt.Fprintf(os.Stderr, "\nThe demo failed: %v\n", err)
		return exitFailure
	}
}

func play(ctx context.Context, binary string) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	lab, err := natlab.New(ctx, natlab.Options{Binary: binary, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	d := &demo{lab: lab, screen: &screen{out: os.Stdout}}
	for _, step := range []func(context.Context) error{
		d.buildNetwork, d.probeHomes, d.startServer, d.joinFirst, d.joinSecond,
		d.showStatus, d.ping, d.showWireGuard, d.ssh,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	d.screen.say("Everything above was checked as it happened, and all of it held.")
	return nil
}
