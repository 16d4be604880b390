package natlab

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// envCrash makes this test program build a lab, print its folder and wait to
// be killed.
const envCrash = "NATLAB_TEST_CRASH"

func TestMain(m *testing.M) {
	if dir := os.Getenv(envCrash); dir != "" {
		crash(dir)
	}
	if task := os.Getenv(envLight); task != "" {
		if err := runLight(task); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	remove, err := buildOnce()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		remove()
		os.Exit(code)
	}))
}

// buildOnce compiles the program for all labs of this run, unless one is
// given, and returns what removes it.
func buildOnce() (remove func(), err error) {
	if os.Getenv("OVERLAY_LAB") != "1" || os.Getenv(envBinary) != "" {
		return func() {}, nil
	}
	dir, err := os.MkdirTemp("", "natlab-program-")
	if err != nil {
		return nil, fmt.Errorf("make folder for the program: %w", err)
	}
	remove = func() { os.RemoveAll(dir) }
	binary := filepath.Join(dir, programName)
	if err := compile(context.Background(), programPath, binary); err != nil {
		remove()
		return nil, err
	}
	return remove, os.Setenv(envBinary, binary)
}

// newLab builds a lab that closes with the test, or skips the test.
func newLab(t *testing.T, opts Options) *Lab {
	t.Helper()
	needLab(t)
	opts.Log = quiet()
	lab, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	return lab
}

func needLab(t *testing.T) {
	t.Helper()
	if os.Getenv("OVERLAY_LAB") != "1" {
		t.Skip("lab tests run with OVERLAY_LAB=1")
	}
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("lab tests need root")
	}
	fmt.Fprintf(os.Stderr, "SKIP %s: lab tests need root\n", t.Name())
	t.Skip("lab tests need root")
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func mustHome(t *testing.T, l *Lab, name string, nat NAT) *Home {
	t.Helper()
	h, err := l.Home(t.Context(), name, nat)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func mustLaptop(t *testing.T, h *Home, name string) *Host {
	t.Helper()
	host, err := h.Laptop(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func mustServer(t *testing.T, l *Lab, name string) *Host {
	t.Helper()
	host, err := l.Server(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return host
}

// output runs a program on a host and gives its standard output.
func output(t *testing.T, h *Host, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := h.Command(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s on %s: %v: %s", cmd, h.Name(), err, stderr.String())
	}
	return string(out)
}

func TestOptionsThatCannotBe(t *testing.T) {
	for name, opts := range map[string]Options{
		"loss above one":          {Loss: 1.5},
		"negative loss":           {Loss: -0.1},
		"loss without delay line": {Delay: -1, Loss: 0.1},
		"private folder":          {Dir: "/var/lib/labs"},
		"root's folder":           {Dir: "/root"},
	} {
		if lab, err := New(t.Context(), opts); err == nil {
			t.Errorf("%s: got a lab", name)
			lab.Close()
		}
	}
}

func TestMachinesAreSeparate(t *testing.T) {
	lab := newLab(t, Options{})
	home := mustHome(t, lab, "home", Masquerade)
	a, b := mustLaptop(t, home, "a"), mustLaptop(t, home, "b")
	if got := output(t, a, "hostname"); got != "a\n" {
		t.Errorf("host name of a is %q", got)
	}
	for _, dir := range []string{"/run", "/var/run/x", "/var/lib/x", "/root/x"} {
		output(t, a, "mkdir", "-p", dir)
		output(t, a, "touch", dir+"/mine")
		for name, h := range map[string]*Host{"b": b, "a": a} {
			found := h.Command(t.Context(), "test", "-e", dir+"/mine").Run() == nil
			if found != (name == "a") {
				t.Errorf("%s of a, seen from %s: %v", dir, name, found)
			}
		}
		if _, err := os.Stat(dir + "/mine"); err == nil {
			t.Errorf("%s/mine reached the machine itself", dir)
		}
	}
	if err := a.Command(t.Context(), "sh", "-c", "exit 7").Run(); err == nil || err.Error() != "exit status 7" {
		t.Errorf("exit 7 gives %v", err)
	}
}

func TestNamesAreHostNames(t *testing.T) {
	lab := newLab(t, Options{})
	for _, name := range []string{"", "../up", "a b", "core", "x.y"} {
		if _, err := lab.Server(t.Context(), name); err == nil {
			t.Errorf("machine name %q was taken", name)
		}
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	before := machineState(t)
	lab := newLab(t, Options{Dir: t.TempDir()})
	home := mustHome(t, lab, "home", Masquerade)
	a := mustLaptop(t, home, "a")
	if err := a.StartSSHD(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A daemon that left its parent, its session and its standard files.
	output(t, a, "sh", "-c", "setsid sleep 4242 </dev/null >/dev/null 2>&1 &")
	if len(processesIn(t, a.mountNamespace(t))) < 3 {
		t.Fatal("the daemon does not run")
	}
	ns, dir := a.mountNamespace(t), lab.dir
	if err := lab.Close(); err != nil {
		t.Fatal(err)
	}
	if left := processesIn(t, ns); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("folder is left: %v", err)
	}
	if after := machineState(t); after != before {
		t.Errorf("before the lab:\n%s\nafter it:\n%s", before, after)
	}
}

// machineState is what a lab could leave on the machine: mounts, links,
// routes, rules, and named namespaces.
func machineState(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, f := range []string{"/proc/self/mounts", "/proc/net/route"} {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	for _, pattern := range []string{"/sys/class/net/*", "/run/netns/*", "/var/lib/overlay*", "/run/overlay*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&all, found)
	}
	return all.String()
}

func (h *Host) mountNamespace(t *testing.T) string {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", h.pid))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func processesIn(t *testing.T, ns string) []int {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, link := range links {
		if got, err := os.Readlink(link); err != nil || got != ns {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}
