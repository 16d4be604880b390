package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// ticksPerSecond is USER_HZ, which is 100 on every Linux Go runs on.
	ticksPerSecond = 100
	kibibyte       = 1024
	megabyte       = 1e6
)

// findProcess finds the one process of a program in a network namespace.
func findProcess(space, program string) (int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, fmt.Errorf("list processes: %w", err)
	}
	found := 0
	for _, dir := range dirs {
		// Processes may end while we look.
		name, err := os.ReadFile(dir + "/comm")
		if err != nil || strings.TrimSpace(string(name)) != program {
			continue
		}
		if at, err := os.Readlink(dir + "/ns/net"); err != nil || at != space {
			continue
		}
		if found != 0 {
			return 0, fmt.Errorf("find %s: there are several", program)
		}
		if found, err = strconv.Atoi(filepath.Base(dir)); err != nil {
			return 0, fmt.Errorf("find %s: %w", program, err)
		}
	}
	if found == 0 {
		return 0, fmt.Errorf("find %s: it does not run", program)
	}
	return found, nil
}

// work is CPU time in seconds: of each daemon of a tunnel, of its server, if it
// has one, and of the whole machine.
type work struct {
	daemons         []float64
	server, machine float64
}

// sum is the time of all daemons.
func (w work) sum() (all float64) {
	for _, one := range w.daemons {
		all += one
	}
	return all
}

// spend says what is used while f runs.
func (t *tunnel) spend(f func() error) (work, error) {
	pids := t.pids
	if t.server > 0 {
		pids = append(slices.Clone(pids), t.server)
	}
	before, err := workOf(pids)
	if err != nil {
		return work{}, err
	}
	if err := f(); err != nil {
		return work{}, err
	}
	used, err := workOf(pids)
	if err != nil {
		return work{}, err
	}
	for i := range used.daemons {
		used.daemons[i] -= before.daemons[i]
	}
	used.machine -= before.machine
	if last := len(t.pids); t.server > 0 {
		used.daemons, used.server = used.daemons[:last], used.daemons[last]
	}
	return used, nil
}

func workOf(pids []int) (work, error) {
	var w work
	for _, pid := range pids {
		// The clock of a process, as clock_getcpuclockid(3) makes its name
		// from the pid: finer than the ticks in /proc.
		const scheduled = 2
		var used unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|scheduled), &used); err != nil {
			return work{}, fmt.Errorf("read CPU time of process %d: %w", pid, err)
		}
		w.daemons = append(w.daemons, time.Duration(used.Nano()).Seconds())
	}
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return work{}, fmt.Errorf("read CPU time of machine: %w", err)
	}
	w.machine, err = machineSeconds(text)
	return w, err
}

// machineSeconds reads proc_stat(5): all that is neither idle nor waiting nor
// counted twice (guests are part of user).
func machineSeconds(text []byte) (float64, error) {
	const idle, waiting, guest = 3, 4, 8
	line, _, _ := bytes.Cut(text, []byte("\n"))
	fields := strings.Fields(string(line))
	if len(fields) < guest || fields[0] != "cpu" {
		return 0, fmt.Errorf("read CPU time of machine: first line is %q", line)
	}
	var ticks float64
	for i, field := range fields[1:] {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read CPU time of machine: %w", err)
		}
		if i != idle && i != waiting && i < guest {
			ticks += float64(n)
		}
	}
	return ticks / ticksPerSecond, nil
}

// process is what a daemon holds: resident memory now and at most, in
// megabytes, threads and open files.
type process struct {
	memory, peak float64
	threads      int
	files        int
}

func processOf(pid int) (process, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return process{}, fmt.Errorf("read status of process: %w", err)
	}
	p, err := parseStatus(string(text))
	if err != nil {
		return process{}, err
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return process{}, fmt.Errorf("list files of process: %w", err)
	}
	p.files = len(files)
	return p, nil
}

// parseStatus reads proc_pid_status(5).
func parseStatus(text string) (process, error) {
	values := map[string]uint64{"VmRSS:": 0, "VmHWM:": 0, "Threads:": 0}
	seen := 0
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		if _, ok := values[fields[0]]; !ok {
			continue
		}
		n, err := strconv.ParseUint(fields[1], 10, 64)
		if err != nil {
			return process{}, fmt.Errorf("read status of process: %w", err)
		}
		values[fields[0]] = n
		seen++
	}
	if seen != len(values) {
		return process{}, errors.New("read status of process: it lacks memory or threads")
	}
	return process{
		memory:  float64(values["VmRSS:"]) * kibibyte / megabyte,
		peak:    float64(values["VmHWM:"]) * kibibyte / megabyte,
		threads: int(values["Threads:"]),
	}, nil
}
