package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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

// work is CPU time in seconds: of the daemons of a tunnel, and of the whole
// machine.
type work struct{ daemons, machine float64 }

func (w work) since(earlier work) work {
	return work{w.daemons - earlier.daemons, w.machine - earlier.machine}
}

func workOf(pids [2]int) (work, error) {
	var w work
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return work{}, fmt.Errorf("read CPU time of process: %w", err)
		}
		seconds, err := processSeconds(text)
		if err != nil {
			return work{}, err
		}
		w.daemons += seconds
	}
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return work{}, fmt.Errorf("read CPU time of machine: %w", err)
	}
	w.machine, err = machineSeconds(text)
	return w, err
}

// processSeconds reads proc_pid_stat(5): utime and stime, the fields 14 and
// 15. The second field, the name, may have spaces in it and ends in the last
// parenthesis.
func processSeconds(text []byte) (float64, error) {
	const user, system = 14 - 3, 15 - 3
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) <= system {
		return 0, fmt.Errorf("read CPU time of process: %d fields", len(fields))
	}
	var ticks float64
	for _, i := range []int{user, system} {
		n, err := strconv.ParseUint(string(fields[i]), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read CPU time of process: %w", err)
		}
		ticks += float64(n)
	}
	return ticks / ticksPerSecond, nil
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

// memoryOf gives the resident memory of each daemon, in megabytes.
func memoryOf(pids [2]int) ([2]float64, error) {
	var all [2]float64
	for i, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return all, fmt.Errorf("read memory of process: %w", err)
		}
		if all[i], err = residentMegabytes(string(text)); err != nil {
			return all, err
		}
	}
	return all, nil
}

// residentMegabytes reads proc_pid_status(5).
func residentMegabytes(text string) (float64, error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "VmRSS:" {
			continue
		}
		n, err := strconv.ParseUint(fields[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read memory of process: %w", err)
		}
		return float64(n) * kibibyte / megabyte, nil
	}
	return 0, fmt.Errorf("read memory of process: no VmRSS")
}
