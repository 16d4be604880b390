package natlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlay/overlay"
)

const (
	overlayDevice = "overlay0"
	invitePrefix  = "ovl1_"

	commandWait = 30 * time.Second
	directWait  = 10 * time.Second
	statusPoll  = 20 * time.Millisecond

	maxShown = 64 << 10
)

// envBinary names a ready overlay program, so that not every lab compiles one.
const envBinary = "OVERLAY_LAB_BINARY"

// mesh is a lab with a server, and the laptops that joined it. The first of
// them founded the mesh.
type mesh struct {
	*Lab
	server  *Host
	coord   *Process
	owner   string
	members []*member
	relays  map[string]*relayHost // by name
}

// member is a laptop that is a node of the mesh.
type member struct {
	*Host
	nodeName string
	addr     netip.Addr
	client   *overlay.Client
	// invite is what it was given, printed and took are what its last
	// `overlay up` said and how long that lasted.
	invite, printed string
	took            time.Duration
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	return newMeshIn(t, Options{})
}

// newMeshIn is newMesh in an Internet of another kind.
func newMeshIn(t *testing.T, opts Options) *mesh {
	t.Helper()
	opts.Binary = os.Getenv(envBinary)
	m := &mesh{Lab: newLab(t, opts)}
	if err := m.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.server = mustServer(t, m.Lab, "server")
	var err error
	if m.coord, m.owner, err = m.server.StartCoord(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.explain(t) })
	return m
}

// explain shows the ends of all logs when the test failed, with the stacks of
// the daemons.
func (m *mesh) explain(t *testing.T) {
	if !t.Failed() {
		return
	}
	t.Logf("log of the server:\n%s", m.coord.tail())
	for name, r := range m.relays {
		t.Logf("log of relay %s:\n%s", name, r.process.tail())
	}
	for _, n := range m.members {
		before, err := os.ReadFile(n.state() + "/overlay.log")
		t.Logf("log of %s: %v\n%s", n.nodeName, err, before[max(0, len(before)-maxShown):])
		if pid, err := n.daemonPID(); err == nil {
			unix.Kill(pid, unix.SIGQUIT)
			time.Sleep(time.Second)
		}
		text, err := os.ReadFile(n.state() + "/overlay.log")
		stacks := text[min(len(before), len(text)):]
		t.Logf("stacks of %s: %v\n%s", n.nodeName, err, stacks[:min(len(stacks), maxShown)])
	}
}

// restartCoord starts the server anew; having an owner it prints nothing.
func (m *mesh) restartCoord(t *testing.T) {
	t.Helper()
	args := []string{"coord", "--public", m.server.Addr().String()}
	coord, err := m.server.Start(context.WithoutCancel(t.Context()), nil, programName, args...)
	if err != nil {
		t.Fatal(err)
	}
	m.coord = coord
}

// laptopAt puts a laptop into a new home of its own.
func (m *mesh) laptopAt(t *testing.T, name string, nat NAT) *Host {
	t.Helper()
	return mustLaptop(t, mustHome(t, m.Lab, "home-"+name, nat), name)
}

// join makes a laptop a member.
func (m *mesh) join(t *testing.T, h *Host) *member {
	t.Helper()
	n := &member{Host: h, nodeName: h.Name(), client: overlay.NewClient(h.socket())}
	n.invite = m.owner
	if len(m.members) > 0 {
		n.invite = m.members[0].newInvite(t)
	}
	m.members = append(m.members, n)
	args := []string{n.invite}
	if h.home != nil && h.home.nat == ProxyAuth {
		args = []string{"--proxy", h.home.Proxy().String(), n.invite}
	}
	if err := n.up(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
	st := n.status(t)
	n.addr = st.Self.IPv4
	if !st.Self.Online {
		t.Fatalf("%s is not online after up: %s", n.nodeName, st.Self.Trouble)
	}
	return n
}

// pair is a mesh of two laptops, each in a home of its own.
func pair(t *testing.T, one, two NAT) (m *mesh, a, b *member) {
	t.Helper()
	m = newMesh(t)
	a = m.join(t, m.laptopAt(t, "a", one))
	b = m.join(t, m.laptopAt(t, "b", two))
	return m, a, b
}

// state is the node's state directory as seen from outside of the machine.
func (h *Host) state() string { return fmt.Sprintf("/proc/%d/root%s", h.pid, overlay.DefaultStateDir) }

func (n *member) newInvite(t *testing.T) string {
	t.Helper()
	invite := strings.TrimSpace(output(t, n.Host, "overlay", "invite"))
	if !strings.HasPrefix(invite, invitePrefix) {
		t.Fatalf("overlay invite prints %q", invite)
	}
	return invite
}

// up runs `overlay up`.
func (n *member) up(ctx context.Context, args ...string) (err error) {
	start := time.Now()
	n.printed, err = n.run(ctx, append([]string{"up"}, args...)...)
	n.took = time.Since(start)
	return err
}

func (n *member) down(ctx context.Context) error {
	_, err := n.run(ctx, "down")
	return err
}

// run runs a verb to its end.
func (n *member) run(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandWait)
	defer cancel()
	cmd := n.Overlay(ctx, args...)
	if n.home != nil && n.home.nat == ProxyOnly {
		cmd.Env = append(cmd.Env, "HTTPS_PROXY="+n.home.Proxy().String())
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("overlay %s on %s: %w: %s", args[0], n.Name(), err, stderr.String())
	}
	return string(out), nil
}

func (n *member) status(t *testing.T) overlay.Status {
	t.Helper()
	st, err := n.client.Status(t.Context())
	if err != nil {
		t.Fatalf("status of %s: %v", n.nodeName, err)
	}
	return st
}

// await polls the node's status until ok, and returns how long it took.
func (n *member) await(ctx context.Context, limit time.Duration, ok func(overlay.Status) bool) (time.Duration, error) {
	start := time.Now()
	for {
		st, err := n.client.Status(ctx)
		if err == nil && ok(st) {
			return time.Since(start), nil
		}
		if time.Since(start) > limit {
			return 0, fmt.Errorf("status of %s after %v: %+v (%v)", n.nodeName, limit, st, err)
		}
		time.Sleep(statusPoll)
	}
}

// pathTo is what a node says of its path to another.
func pathTo(st overlay.Status, name string) overlay.PathStatus {
	for _, p := range st.Peers {
		if p.Name == name {
			return p.Path
		}
	}
	return overlay.PathStatus{}
}

// directTo asks whether the path to a node is a direct one.
func directTo(name string) func(overlay.Status) bool {
	return func(st overlay.Status) bool { return pathTo(st, name).Kind == "direct" }
}

// viaTCP asks whether it is a TCP connection.
func viaTCP(name string) func(overlay.Status) bool {
	return func(st overlay.Status) bool { return pathTo(st, name).Via == "tcp" }
}

func online(st overlay.Status) bool { return st.Self.Online }

// awaitDirect waits until each of both sees a direct path to the other, and
// returns when the later of them did.
func awaitDirect(ctx context.Context, a, b *member) (time.Duration, error) {
	var g errgroup.Group
	var took [2]time.Duration
	g.Go(func() (err error) {
		took[0], err = a.await(ctx, directWait, directTo(b.nodeName))
		return err
	})
	g.Go(func() (err error) {
		took[1], err = b.await(ctx, directWait, directTo(a.nodeName))
		return err
	})
	err := g.Wait()
	return max(took[0], took[1]), err
}

func mustDirect(t *testing.T, a, b *member) {
	t.Helper()
	if _, err := awaitDirect(t.Context(), a, b); err != nil {
		t.Fatal(err)
	}
}

// daemonPID is the process behind the node's socket.
func (h *Host) daemonPID() (int, error) {
	c, err := net.Dial("unix", h.socket())
	if err != nil {
		return 0, fmt.Errorf("find the daemon of %s: %w", h.name, err)
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("find the daemon of %s: %w", h.name, err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("find the daemon of %s: %w", h.name, err)
	}
	return int(cred.Pid), nil
}
