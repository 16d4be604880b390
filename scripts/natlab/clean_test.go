package natlab

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	idleMemory  = 30 << 20
	programSize = 16 << 20

	serverGrowth = 8 << 20
	extraFiles   = 4

	leaveBar = 2 * time.Second
)

// TestDownLeavesNothing compares a laptop before its first up with the same
// laptop after down, again and again, and the server before and after.
func TestDownLeavesNothing(t *testing.T) {
	m := newMesh(t)
	laptop := m.laptopAt(t, "a", Masquerade)
	other := m.join(t, m.laptopAt(t, "b", Masquerade))
	before := networkState(t, laptop)
	a := m.join(t, laptop)
	cycle := func() {
		mustDirect(t, a, other)
		if err := a.down(t.Context()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, networkState(t, laptop)); diff != "" {
			t.Errorf("what down left (-before +after):\n%s", diff)
		}
		if left := programs(t, laptop); len(left) > 0 {
			t.Errorf("processes left: %v", left)
		}
	}
	cycle()
	pid := m.coord.cmd.Process.Pid
	startMemory, startFiles := memory(t, pid), openFiles(t, pid)
	for range runs(5, 20) {
		if err := a.up(t.Context()); err != nil {
			t.Fatal(err)
		}
		cycle()
	}
	grown, files := memory(t, pid)-startMemory, openFiles(t, pid)-startFiles
	t.Logf("server: %d KiB at the start, %d KiB more and %d files more at the end", startMemory>>10, grown>>10, files)
	if grown > serverGrowth || files > extraFiles {
		t.Errorf("the server grew by %d bytes and %d files", grown, files)
	}
}

// TestSize weighs the program on disk and an idle node and server in memory.
func TestSize(t *testing.T) {
	m, a, b := pair(t, Masquerade, FullCone)
	mustDirect(t, a, b)
	file, err := os.Stat(m.binDir() + "/" + programName)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("program: %.1f MiB", float64(file.Size())/(1<<20))
	if file.Size() > programSize {
		t.Errorf("the program has %d bytes", file.Size())
	}
	time.Sleep(time.Duration(runs(3, 30)) * time.Second)
	for name, pid := range map[string]int{
		"node a": a.daemon(t), "node b": b.daemon(t), "server": m.coord.cmd.Process.Pid,
	} {
		size := memory(t, pid)
		t.Logf("%s: %.1f MiB", name, float64(size)/(1<<20))
		if size > idleMemory {
			t.Errorf("%s has %d bytes resident", name, size)
		}
	}
}

// TestLeave has a node leave: the others drop it, its keys are gone and its
// machine is as before.
func TestLeave(t *testing.T) {
	m := newMesh(t)
	a := m.join(t, m.laptopAt(t, "a", Masquerade))
	laptop := m.laptopAt(t, "b", Masquerade)
	before := networkState(t, laptop)
	b := m.join(t, laptop)
	mustDirect(t, a, b)
	if _, err := b.run(t.Context(), "leave"); err != nil {
		t.Fatal(err)
	}
	took, err := a.await(t.Context(), directWait, func(st overlayStatus) bool { return len(st.Peers) == 0 })
	t.Logf("gone from the other's status after %v", took)
	if err != nil || took > leaveBar {
		t.Errorf("b is in the status of a for %v: %v", took, err)
	}
	if got := output(t, a.Host, "wg", "show", overlayDevice, "peers"); got != "" {
		t.Errorf("peers of a after b left: %q", got)
	}
	if diff := cmp.Diff(before, networkState(t, laptop)); diff != "" {
		t.Errorf("what leave left (-before +after):\n%s", diff)
	}
	if left := stateFiles(t, laptop); !slices.Equal(left, []string{"overlay.log"}) {
		t.Errorf("files left in the state directory: %v", left)
	}
	deadAfterLeave(t, a, b)
}

// deadAfterLeave tries the tunnel and the identity of a node that left.
func deadAfterLeave(t *testing.T, a, b *member) {
	t.Helper()
	ping := startPing(t, a.Host, b.addr, slowPing)
	if at, err := ping.firstReply(time.Second); err == nil {
		t.Errorf("the tunnel to a node that left answers after %v", at)
	}
	if code, text := exitCode(t, b.Host, "up"); code != 4 {
		t.Errorf("up after leave ends with %d: %s", code, text)
	}
	code, text := exitCode(t, b.Host, "up", b.invite)
	if code != 4 || strings.Contains(text, b.invite) {
		t.Errorf("up with a used invite ends with %d: %s", code, text)
	}
}
