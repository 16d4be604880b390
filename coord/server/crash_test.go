package server

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlay/coord"
)

// childEnv names the state folder to the child process of TestKill.
const childEnv = "OVERLAY_COORD_CHILD"

// freeMemory makes the child give memory back to the system.
const freeMemory = syscall.SIGUSR1

// child is a server in a process of its own.
type child struct {
	cmd    *exec.Cmd
	addr   string
	invite string
}

func startChild(t testing.TB, dir string) *child {
	t.Helper()
	c := &child{cmd: exec.Command(os.Args[0])}
	c.cmd.Env = append(os.Environ(), childEnv+"="+dir)
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	c.addr, c.invite, _ = strings.Cut(strings.TrimSpace(line), " ")
	return c
}

func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	}
}

func runChild(dir string) {
	s, err := Open(Config{Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: dir})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	invite := ""
	if i, ok := s.OwnerInvite(); ok {
		invite = i.String()
	}
	free := make(chan os.Signal, 1)
	signal.Notify(free, freeMemory)
	go func() {
		for range free {
			debug.FreeOSMemory()
		}
	}()
	fmt.Println(s.Addr(), invite)
	fmt.Fprintln(os.Stderr, s.Run(context.Background()))
	os.Exit(1)
}

// TestKill kills the server at any moment: nothing acknowledged is lost, names
// and addresses stay unique, and what was cut off can be repeated.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	c := startChild(t, dir)
	invite, err := coord.ParseInvite(c.invite)
	if err != nil {
		t.Fatal(err)
	}
	o := newOwner(t, invite)
	if o.member, err = coord.Join(t.Context(), o.config, nil); err != nil {
		t.Fatal(err)
	}
	acked := map[string]coord.NodeInfo{}
	for round := range 12 {
		o.server = c.addr
		n, i := newNode(t), o.invite(t, uses(1))
		stop := make(chan struct{})
		go func() { // at a moment that differs from round to round
			defer close(stop)
			time.Sleep(time.Duration(round) * 700 * time.Microsecond)
			c.kill()
		}()
		joinErr := n.join(t, i, "bob")
		<-stop
		c = startChild(t, dir)
		o.server = c.addr
		if c.invite != "" {
			t.Fatal("the mesh has no owner any more")
		}
		firstCert := n.member.Cert
		i.Server = c.addr
		if err := n.join(t, i, "bob"); err != nil {
			t.Fatalf("round %d: repeat after %v: %v", round, joinErr, err)
		}
		if joinErr == nil && firstCert.Hash() != n.member.Cert.Hash() {
			t.Fatalf("round %d: an acknowledged certificate was lost", round)
		}
		cert := n.cert(t)
		acked[cert.Name] = coord.NodeInfo{Name: cert.Name, IP4: cert.IP4}
		checkNodes(t, o, acked)
	}
}

func checkNodes(t *testing.T, o *owner, acked map[string]coord.NodeInfo) {
	t.Helper()
	list, err := o.dial(t, o.server).Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	have, addresses := map[string]coord.NodeInfo{}, map[string]bool{}
	for _, n := range list.Nodes {
		have[n.Name], addresses[n.IP4.String()] = n, true
	}
	for name, n := range acked {
		if have[name].IP4 != n.IP4 {
			t.Errorf("%s has %v, was told %v", name, have[name].IP4, n.IP4)
		}
	}
	if len(addresses) != len(acked)+1 || len(list.Nodes) != len(acked)+1 {
		t.Errorf("%d addresses for %d nodes, want %d", len(addresses), len(list.Nodes), len(acked)+1)
	}
}

func TestRestartKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	o := found(t, s)
	i := o.invite(t, uses(2))
	b := newNode(t)
	if err := b.join(t, i, "bob"); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s = start(t, dir)
	if _, ok := s.OwnerInvite(); ok {
		t.Error("an owner invite for a mesh that has an owner")
	}
	o.server, i.Server = s.Addr().String(), s.Addr().String()
	checkNodes(t, o, map[string]coord.NodeInfo{"bob": {IP4: b.cert(t).IP4}})
	for _, want := range []coord.Code{"", coord.CodeInviteUsed} {
		if err := newNode(t).join(t, i, "carl"); codeOf(err) != want {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
