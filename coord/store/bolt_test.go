package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// crashEnv names the store file to the child process of TestCrash.
const crashEnv = "OVERLAY_STORE_CRASH"

func TestMain(m *testing.M) {
	if path := os.Getenv(crashEnv); path != "" {
		writeForEver(path)
	}
	goleak.VerifyTestMain(m)
}

func TestBolt(t *testing.T) {
	conformance(t, func(t testing.TB) (Store, func() Store) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		open := func() Store { return openBolt(t, filepath.Join(dir, "store.db")) }
		return open(), open
	})
}

func openBolt(t testing.TB, path string) Store {
	t.Helper()
	s, err := OpenBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestBoltLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	openBolt(t, path)
	if _, err := OpenBolt(path); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
}

func TestBoltDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	if err := os.WriteFile(path, []byte(strings.Repeat("not a database ", 2000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Fatal(err)
	}
}

func TestBoltHistoryIsBounded(t *testing.T) {
	s := openBolt(t, filepath.Join(t.TempDir(), "store.db"))
	for range historyBytes/MaxValue + 2 {
		put(t, s, "big", strings.Repeat("x", MaxValue))
	}
	if err := lastError(s, t.Context(), 0); !errors.Is(err, ErrCompacted) {
		t.Fatal(err)
	}
	if size := s.(*bolt).size; size > historyBytes {
		t.Fatalf("history holds %d bytes", size)
	}
}

// TestBoltFull fills a small file system: the refusal is ErrFull, what was
// acknowledged stays, and the store works again once there is room.
func TestBoltFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		if os.Geteuid() == 0 {
			t.Fatal("mount a small file system as root:", err)
		}
		t.Skip("SKIP: mounting a small file system needs root:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openBolt(t, filepath.Join(dir, "store.db"))
	acked, err := uint64(0), error(nil)
	for i := 0; err == nil && i < 200; i++ {
		var r uint64
		if r, err = s.Txn(t.Context(), nil, []Op{{Key: strconv.Itoa(i), Value: make([]byte, 64<<10)}}); err == nil {
			acked = r
		}
	}
	if !errors.Is(err, ErrFull) {
		t.Fatalf("after %d: %v", acked, err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if list, rev, err := s.List(t.Context(), ""); err != nil || rev != acked || len(list) != int(acked) {
		t.Fatalf("%d entries at %d, %v; acknowledged %d", len(list), rev, err, acked)
	}
	if r := put(t, s, "again", "x"); r != acked+1 {
		t.Fatalf("revision %d after %d", r, acked)
	}
}

// TestCrash kills a writing process and looks for every write it acknowledged.
func TestCrash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	for round, acked := 0, uint64(0); round < 8; round++ {
		acked = crash(t, path, acked)
		s, err := OpenBolt(path)
		if err != nil {
			t.Fatal(err)
		}
		list, rev, err := s.List(t.Context(), "")
		if err != nil || rev < acked || rev > acked+1 {
			t.Fatalf("round %d: revision %d, %v; acknowledged %d", round, rev, err, acked)
		}
		for _, e := range list {
			if want := fmt.Sprintf("%d", e.Revision); string(e.Value) != want {
				t.Fatalf("round %d: %q has %q of revision %s", round, e.Key, e.Value, want)
			}
		}
		if a, b := list[0], list[1]; a.Revision != rev || b.Revision != rev {
			t.Fatalf("round %d: half a transaction: %v", round, list)
		}
		acked = rev
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// crash starts a writer, kills it at some moment, and gives the last revision
// it acknowledged.
func crash(t *testing.T, path string, acked uint64) uint64 {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashEnv+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for left := 5 + rand.IntN(40); lines.Scan(); left-- {
		if acked, err = strconv.ParseUint(lines.Text(), 10, 64); err != nil {
			t.Fatalf("child says %q", lines.Text())
		}
		if left == 0 {
			_ = cmd.Process.Kill() // and go on reading what it had acknowledged
		}
	}
	_ = cmd.Wait()
	return acked
}

func writeForEver(path string) {
	s, err := OpenBolt(path)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	_, rev, _ := s.List(context.Background(), "")
	for {
		next := []byte(strconv.FormatUint(rev+1, 10))
		if rev, err = s.Txn(context.Background(), nil, []Op{{Key: "a", Value: next}, {Key: "b", Value: next}}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(rev)
	}
}
