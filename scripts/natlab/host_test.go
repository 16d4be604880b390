package natlab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// stateCommands print what a node may change on its machine.
func stateCommands() []string {
	return []string{
		"ip -o link", "ip -o addr", "ip rule", "ip -6 rule",
		"ip route show table all", "ip -6 route show table all", "nft list ruleset",
		"find /run /var/run ! -type d",
		"cat /etc/resolv.conf || true",
	}
}

// networkState is what a node may change on its machine, as sorted lines
// without what differs by itself. It waits until IPv6 is sure of its
// addresses, which then appear in the routes.
func networkState(t *testing.T, h *Host) string {
	t.Helper()
	for start := time.Now(); output(t, h, "ip", "-6", "addr", "show", "tentative") != ""; time.Sleep(statusPoll) {
		if time.Since(start) > directWait {
			t.Fatalf("IPv6 addresses of %s stay tentative", h.Name())
		}
	}
	var all strings.Builder
	for _, c := range stateCommands() {
		lines := strings.Split(unstable().ReplaceAllString(output(t, h, "sh", "-c", c), ""), "\n")
		slices.Sort(lines)
		fmt.Fprintf(&all, "# %s\n%s\n", c, strings.Join(lines, "\n"))
	}
	return all.String()
}

// unstable matches interface indices and what says whether a neighbour is
// there.
func unstable() *regexp.Regexp {
	return regexp.MustCompile(`(?m)^[0-9]+: | link-netnsid \d+| linkdown`)
}

// memory is the resident set of a process in bytes.
func memory(t *testing.T, pid int) int64 {
	t.Helper()
	return statusBytes(t, pid, "VmRSS")
}

// peak is the largest it was since resetPeak.
func peak(t *testing.T, pid int) int64 {
	t.Helper()
	return statusBytes(t, pid, "VmHWM")
}

func resetPeak(t *testing.T, pid int) {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
}

func statusBytes(t *testing.T, pid int, field string) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("status of process %d: %q", pid, text)
	}
	kb, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// openFiles counts the file descriptors of a process.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// programs are the overlay processes in a machine.
func programs(t *testing.T, h *Host) (pids []int) {
	t.Helper()
	for _, pid := range processesIn(t, h.mountNamespace(t)) {
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err == nil && string(bytes.TrimSpace(name)) == programName {
			pids = append(pids, pid)
		}
	}
	return pids
}

// daemon is the process of the node, which must run.
func (n *member) daemon(t *testing.T) int {
	t.Helper()
	pid, err := n.daemonPID()
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// stateFiles are the names in the node's state directory.
func stateFiles(t *testing.T, h *Host) []string {
	t.Helper()
	list, err := filepath.Glob(h.state() + "/*")
	if err != nil {
		t.Fatal(err)
	}
	for i, path := range list {
		list[i] = filepath.Base(path)
	}
	return list
}

// exitCode runs a verb that should fail and returns how it ended and
// everything it printed.
func exitCode(t *testing.T, h *Host, args ...string) (int, string) {
	t.Helper()
	out, err := h.Overlay(t.Context(), args...).CombinedOutput()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	if err == nil {
		return 0, string(out)
	}
	return err.(*exec.ExitError).ExitCode(), string(out)
}
