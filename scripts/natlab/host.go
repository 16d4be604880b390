package natlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// Host is a machine programs run on: a server or a laptop. Its methods may be
// used from several goroutines.
type Host struct {
	*node
	lab *Lab

	mu      sync.Mutex
	home    *Home
	port    string
	addr    netip.Addr
	addr6   netip.Addr
	gateway netip.Addr
	started int
}

func (l *Lab) newHost(ctx context.Context, name string) (*Host, error) {
	n, err := l.newNode(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := l.installKeys(n); err != nil {
		return nil, err
	}
	return &Host{node: n, lab: l}, nil
}

// Name is the host's name, also its host name inside.
func (h *Host) Name() string { return h.name }

// Addr is the address of the host's interface eth0: a private one for laptops
// behind a NAT.
func (h *Host) Addr() netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.addr
}

// Command prepares a program to run on the host, in its network, with its
// files, as root, with an environment of its own. When the context ends, the
// program is killed.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return h.command(ctx, name, args...)
}

// Process is a program running in the background of a host.
type Process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// Start runs a program in the background; Close of the lab ends it, and so
// does the context. What it prints goes to a log in the lab's folder, and its
// standard output also to stdout, which may be nil.
func (h *Host) Start(ctx context.Context, stdout io.Writer, name string, args ...string) (*Process, error) {
	h.mu.Lock()
	h.started++
	logName := fmt.Sprintf("%02d-%s.log", h.started, filepath.Base(name))
	h.mu.Unlock()
	log, err := os.Create(filepath.Join(h.dir, logName))
	if err != nil {
		return nil, fmt.Errorf("make log of %s: %w", name, err)
	}
	defer log.Close()
	p := &Process{cmd: h.command(ctx, name, args...), log: log.Name(), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if stdout != nil {
		p.cmd.Stdout = stdout
	}
	if err := h.lab.watch(p); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, h.name, err)
	}
	return p, nil
}

// watch starts a process and waits for it until the lab is closed.
func (l *Lab) watch(p *Process) error {
	if err := p.cmd.Start(); err != nil {
		return err
	}
	l.group.Go(func() error {
		defer close(p.done)
		// How a background program ends is told by its log; most are
		// killed.
		p.cmd.Wait()
		return nil
	})
	return nil
}

// PID is the number of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process with SIGKILL and waits until it is gone.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill process %d: %w", p.cmd.Process.Pid, err)
	}
	<-p.done
	return nil
}

// tail is the end of what the process printed, for error messages.
func (p *Process) tail() string {
	const most = 2000
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-most):])
}

// SetLink takes the host's interface eth0 down or up. Coming up it gets its
// default route back, which the kernel drops with the link.
func (h *Host) SetLink(ctx context.Context, up bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var s script
	if !up {
		s.add("ip link set eth0 down")
		return h.sh(ctx, s)
	}
	s.add("ip link set eth0 up")
	s.add("ip route replace default via %s dev eth0 onlink", h.gateway)
	return h.sh(ctx, s)
}

// MoveTo carries a laptop into another home: the cable changes, eth0 loses its
// carrier for a moment and gets an address and the default route of that home,
// the same address as when it was there before.
func (h *Host) MoveTo(ctx context.Context, to *Home) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.home == nil {
		return fmt.Errorf("move %s: it is not a laptop in a home", h.name)
	}
	addr, err := to.lease(h.name, false)
	if err != nil {
		return err
	}
	var out, in, self script
	out.add("ip link set %s netns %d", h.port, to.pid)
	in.add("ip link set %s master %s up", h.port, lanDevice)
	self.add("ip addr flush dev eth0 scope global")
	self.add("ip addr add %s dev eth0", addr)
	self.add("ip route replace default via %s dev eth0", to.router())
	if err := errors.Join(h.home.sh(ctx, out), to.sh(ctx, in), h.sh(ctx, self)); err != nil {
		return fmt.Errorf("move %s to %s: %w", h.name, to.name, err)
	}
	h.home, h.addr, h.gateway = to, addr.Addr(), to.router()
	return nil
}
