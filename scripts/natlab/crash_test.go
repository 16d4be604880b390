package natlab

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// crash is the program TestCrashLeavesNothing kills.
func crash(parent string) {
	lab, err := New(context.Background(), Options{Dir: parent, Log: quiet()})
	if err != nil {
		panic(err)
	}
	host, err := lab.Server(context.Background(), "server")
	if err != nil {
		panic(err)
	}
	if _, err := host.Start(context.Background(), nil, "sleep", "4242"); err != nil {
		panic(err)
	}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", host.pid))
	if err != nil {
		panic(err)
	}
	fmt.Println(ns, lab.dir)
	time.Sleep(time.Hour)
}

func TestCrashLeavesNothing(t *testing.T) {
	needLab(t)
	parent := t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envCrash+"="+parent)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	ns, dir, ok := strings.Cut(strings.TrimSpace(line), " ")
	if err != nil || !ok {
		t.Fatalf("crashing program said %q: %v", line, err)
	}
	if got := processesIn(t, ns); len(got) != 2 {
		t.Fatalf("processes in the machine: %v", got)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for start := time.Now(); len(processesIn(t, ns)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("processes left: %v", processesIn(t, ns))
		}
	}
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("the folder should wait for the next lab: %v", err)
	}
	next := newLab(t, Options{Dir: parent})
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("folder of the dead lab is left: %v", err)
	}
	third := newLab(t, Options{Dir: parent})
	if _, err := os.Stat(next.dir); err != nil {
		t.Errorf("lab %s removed the folder of a living one: %v", third.dir, err)
	}
}
