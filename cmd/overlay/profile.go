//go:build profile

package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime/pprof"
	"sync"
	"syscall"
)

// profileEnv names the file for the CPU profile of a program built with
// -tags profile, as scripts/bench profile does; no other one has this.
const profileEnv = "OVERLAY_PROFILE"

var _ = awaitProfile(os.Getenv(profileEnv))

// awaitProfile has a first SIGUSR2 begin a CPU profile and a second end it.
// The file has its name when it is complete.
func awaitProfile(path string) error {
	if path == "" {
		return nil
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGUSR2)
	new(sync.WaitGroup).Go(func() {
		if err := profileBetween(signals, path); err != nil {
			fmt.Fprintln(os.Stderr, "profile:", err)
		}
	})
	return nil
}

func profileBetween(signals <-chan os.Signal, path string) error {
	<-signals
	f, err := os.Create(path + ".part")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	<-signals
	pprof.StopCPUProfile()
	return os.Rename(f.Name(), path)
}
