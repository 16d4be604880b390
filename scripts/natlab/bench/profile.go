package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	profileWait  = 10 * time.Second
	profilePause = 50 * time.Millisecond
	profileTable = "groups.txt"
	topFunctions = 15
)

// shares is the CPU time of one daemon, in seconds, by kind of work and by
// innermost function.
type shares struct {
	groups    map[group]float64
	functions map[string]float64
	all       float64
}

// profile shows where the daemons of one variant spend their time during one
// TCP stream.
func profile(ctx context.Context, o *options) error {
	return inLab(ctx, o, func(b *bench) (err error) {
		// Programs of the lab see it under the same name.
		dir, err := os.MkdirTemp("", "overlay-bench-profile-")
		if err != nil {
			return fmt.Errorf("make folder for profiles: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		files := []string{filepath.Join(dir, "a.pprof"), filepath.Join(dir, "b.pprof")}
		t, err := b.open(ctx, o.variant, layout{peers: 1, profiles: files})
		if err != nil {
			return err
		}
		flow, err := b.record(ctx, t, files)
		if err != nil {
			return err
		}
		table, err := profileText(o, flow, files)
		if err != nil {
			return err
		}
		if _, err := os.Stdout.Write(table); err != nil {
			return fmt.Errorf("print table: %w", err)
		}
		return keep(o.out, table, files)
	})
}

// record has the daemons write their profiles of one TCP stream.
func (b *bench) record(ctx context.Context, t *tunnel, files []string) (sample, error) {
	if err := t.signal(unix.SIGUSR2); err != nil {
		return nil, err
	}
	s := sample{}
	if err := b.cases()[0].run(ctx, t, s); err != nil {
		return nil, err
	}
	if err := t.signal(unix.SIGUSR2); err != nil {
		return nil, err
	}
	for _, name := range files {
		if err := awaitFile(ctx, name); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (t *tunnel) signal(s unix.Signal) error {
	for _, pid := range t.pids {
		if err := unix.Kill(pid, s); err != nil {
			return fmt.Errorf("signal daemon %d: %w", pid, err)
		}
	}
	return nil
}

func awaitFile(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, profileWait)
	defer cancel()
	for {
		_, err := os.Stat(name)
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a profile (are the programs built with -tags profile?): %w", err)
		case <-time.After(profilePause):
		}
	}
}

// profileText is the table of both daemons.
func profileText(o *options, flow sample, files []string) ([]byte, error) {
	var all []shares
	for _, name := range files {
		s, err := sharesOf(name)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	var text bytes.Buffer
	fmt.Fprintf(&text, "\n%s; %s, TCP 1 stream of %d s, MTU %d: %s Gbit/s; CPU time in %%\n\n",
		machine(), o.variant, o.seconds, o.mtu, figure(flow["tcp1Gbps"]))
	cells := [][]string{{"", "sender", "receiver"}}
	for _, g := range groups() {
		cells = append(cells, []string{string(g), percent(all[0].groups[g], all[0].all), percent(all[1].groups[g], all[1].all)})
	}
	cells = append(cells, []string{"all, CPU s", figure(all[0].all), figure(all[1].all)})
	columns(&text, cells)
	for i, s := range all {
		fmt.Fprintf(&text, "\nmost of %s\n", cells[0][i+1])
		for _, name := range s.top() {
			fmt.Fprintf(&text, "%6s  %s\n", percent(s.functions[name], s.all), name)
		}
	}
	return text.Bytes(), nil
}

func percent(part, all float64) string { return fmt.Sprintf("%.1f", 100*part/max(all, 1e-9)) }

// sharesOf sums up a profile.
func sharesOf(name string) (shares, error) {
	f, err := os.Open(name)
	if err != nil {
		return shares{}, fmt.Errorf("open profile: %w", err)
	}
	defer f.Close()
	stacks, err := readProfile(f)
	if err != nil {
		return shares{}, fmt.Errorf("read profile %s: %w", filepath.Base(name), err)
	}
	s := shares{groups: map[group]float64{}, functions: map[string]float64{}}
	for _, one := range stacks {
		seconds := time.Duration(one.nanos).Seconds()
		s.groups[groupOf(one)] += seconds
		if len(one.frames) > 0 {
			s.functions[one.frames[0].function] += seconds
		}
		s.all += seconds
	}
	return s, nil
}

// top are the functions that take most.
func (s shares) top() []string {
	var names []string
	for name := range s.functions {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if s.functions[a] == s.functions[b] {
			return bytes.Compare([]byte(a), []byte(b))
		}
		if s.functions[a] > s.functions[b] {
			return -1
		}
		return 1
	})
	return names[:min(len(names), topFunctions)]
}

// keep puts the table and the profiles into a folder, if it has a name.
func keep(dir string, table []byte, files []string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make folder for profiles: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, profileTable), table, 0o644); err != nil {
		return fmt.Errorf("save table: %w", err)
	}
	for _, from := range files {
		text, err := os.ReadFile(from)
		if err != nil {
			return fmt.Errorf("read profile: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(from)), text, 0o644); err != nil {
			return fmt.Errorf("save profile: %w", err)
		}
	}
	return nil
}
