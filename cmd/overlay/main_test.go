package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"overlay/overlay"
)

func TestMain(m *testing.M) {
	testscript.Main(leakCheck{m}, map[string]func(){"overlay": main, "asnobody": asNobody})
}

// leakCheck fails a run of tests that left goroutines behind.
type leakCheck struct{ m *testing.M }

func (l leakCheck) Run() int {
	code := l.m.Run()
	if code != 0 {
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

const nobody = 65534

// asNobody becomes overlay without root's rights. The program is run through a
// descriptor because the folders above it may be closed to others.
func asNobody() {
	f, err := os.Open("/proc/self/exe")
	if err == nil && os.Geteuid() == 0 {
		err = errors.Join(syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody))
	}
	if err == nil {
		err = syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), append([]string{"overlay"}, os.Args[1:]...), os.Environ())
	}
	fmt.Fprintln(os.Stderr, "asnobody:", err)
	os.Exit(99)
}

// Everything that works without root and without an interface.
func TestVerbs(t *testing.T) { testscript.Run(t, scripts("testdata/verbs")) }

// What needs root runs in namespaces of its own: this test starts itself again
// inside them.
func TestNode(t *testing.T) {
	const inside = "OVERLAY_TEST_INSIDE"
	if os.Getenv(inside) != "" {
		prepareHost(t)
		p := scripts("testdata/node")
		setup := p.Setup
		p.Setup = func(e *testscript.Env) error { return errors.Join(emptyHost(), setup(e)) }
		testscript.Run(t, p)
		return
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil || os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must run this test as root and with /dev/net/tun")
		}
		t.Skip("SKIP: the verbs of a node are only tested as root and with /dev/net/tun")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestNode$", "-test.parallel=1", "-test.timeout=5m", "-test.v="+strconv.FormatBool(testing.Verbose()))
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}

// prepareHost makes the namespaces look like a machine in a network.
func prepareHost(t *testing.T) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	check(syscall.Mount("proc", "/proc", "proc", 0, ""))
	for _, dir := range []string{"/run", "/var/lib"} {
		check(syscall.Mount("tmpfs", dir, "tmpfs", 0, ""))
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", "eth0", "type", "veth", "peer", "name", "eth1"},
		{"addr", "add", "10.9.9.1/24", "dev", "eth0"},
		{"link", "set", "eth0", "up"},
		{"link", "set", "eth1", "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
}

// emptyHost removes what an earlier script left at the usual places.
func emptyHost() error {
	var errs []error
	for _, dir := range []string{"/run/systemd", overlay.DefaultStateDir, filepath.Dir(overlay.DefaultSocket)} {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

func scripts(dir string) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Values[serversKey{}] = map[string]*exec.Cmd{}
			e.Setenv("NO_COLOR", "1")
			e.Setenv("TZ", "UTC")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // else each command takes a second to end
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"run":      runOverlay,
			"node":     runVerb,
			"nobody":   runAsNobody,
			"coord":    startServer,
			"end":      endServer,
			"listen":   listenPlain,
			"proxy":    startProxy,
			"forge":    forgeInvite,
			"brief":    briefInvite,
			"withdraw": withdrawInvite,
			"keep":     keepOutput,
			"damage":   damageFile,
		},
		Condition: func(c string) (bool, error) {
			if c == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", c)
		},
	}
}

// expectCode runs a program and wants its exit code to be the given one.
func expectCode(ts *testscript.TestScript, code string, argv ...string) {
	want, err := strconv.Atoi(code)
	ts.Check(err)
	err = ts.Exec(argv[0], argv[1:]...)
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func usage(ts *testscript.TestScript, neg, bad bool, text string) {
	if neg || bad {
		ts.Fatalf("usage: %s", text)
	}
}

// run CODE ARG...
func runOverlay(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) < 1, "run CODE ARG...")
	expectCode(ts, args[0], append([]string{"overlay"}, args[1:]...)...)
}

// nobody CODE ARG...
func runAsNobody(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) < 1, "nobody CODE ARG...")
	expectCode(ts, args[0], append([]string{"asnobody"}, args[1:]...)...)
}

// node NAME CODE VERB ARG... runs a verb of the node with this name, interface,
// socket and state directory.
func runVerb(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) < 3, "node NAME CODE VERB ARG...")
	name, verb := args[0], args[2]
	argv := []string{"overlay", verb, "--socket", ts.MkAbs(name + ".sock")}
	if slices.Contains([]string{"up", "leave", "netcheck"}, verb) {
		argv = append(argv, "--state", ts.MkAbs(name))
	}
	if verb == "up" {
		argv = append(argv, "--interface", name)
	}
	ts.Defer(func() { endDaemon(ts.MkAbs(name + ".sock")) })
	expectCode(ts, args[1], append(argv, args[3:]...)...)
}

// endDaemon ends what a script that failed left running.
func endDaemon(socket string) {
	d := watchDaemon(socket)
	defer d.close()
	if d.pidfd >= 0 {
		_ = exec.Command("overlay", "down", "--socket", socket).Run()
	}
}

// damage FILE cuts a file in the middle.
func damageFile(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 1, "damage FILE")
	fi, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Check(os.Truncate(ts.MkAbs(filepath.Clean(args[0])), fi.Size()/2))
}

// keep VAR sets a variable to the last line of the standard output.
func keepOutput(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 1, "keep VAR")
	lines := strings.Split(strings.TrimSpace(ts.ReadFile("stdout")), "\n")
	ts.Setenv(args[0], lines[len(lines)-1])
}
