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
)

// stateCommands print what a node may change on its machine.
func stateCommands() []string {
	return []string{
		"ip -o link", "ip -o addr", "ip rule", "ip -6 rule",
		"ip route show table all", "ip -6 route show table all", "nft list ruleset",
		"ls -A /run/overlay /run/wireguard /var/run/wireguard 2>/dev/null || true",
		"cat /etc/resolv.conf || true",
	}
}

// networkState is what a node may change on its machine, as sorted lines
// without what differs by itself.
func networkState(t *testing.T, h *Host) string {
	t.Helper()
	var all strings.Builder
	for _, c := range stateCommands() {
		lines := strings.Split(output(t, h, "sh", "-c", c), "\n")
		slices.Sort(lines)
		fmt.Fprintf(&all, "# %s\n%s\n", c, strings.Join(lines, "\n"))
	}
	return unstable().ReplaceAllString(all.String(), "")
}

// unstable matches interface indices, and what IPv6 says of an address that
// is not yet known to be its only one.
func unstable() *regexp.Regexp {
	return regexp.MustCompile(`(?m)^[0-9]+: | link-netnsid \d+| tentative| linkdown`)
}

// sockets are the sockets that are open in the machine's network, without
// clients of the test.
func sockets(t *testing.T, h *Host) string {
	t.Helper()
	return output(t, h, "ss", "-Hnlutw")
}

// memory is the resident set of a process in bytes.
func memory(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(text)
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
