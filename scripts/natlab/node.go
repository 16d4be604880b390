package natlab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	holderGrace = 15 * time.Second
	waitDelay   = 2 * time.Second
	nodePath    = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// holderScript runs as the first process of a machine, inside its new
// namespaces, and holds them open. Its standard input is a pipe from the lab:
// at its end, which also comes when the lab's process is killed, it ends every
// process that lives in this machine, daemons included, and then itself.
const holderScript = `
set -e
trap '' INT HUP TERM
name=$1 dir=$2
mount -t tmpfs -o mode=755 tmpfs /run
[ /var/run -ef /run ] || mount -t tmpfs -o mode=755 tmpfs /var/run
mount --bind "$dir/lib" /var/lib
mount --bind "$dir/root" /root
ip link set lo up
echo "$name" >/proc/sys/kernel/hostname
echo ready
set +e
read -r _
rounds=0
while [ $rounds -lt 200 ]; do
	left=0
	for p in /proc/[0-9]*; do
		pid=${p#/proc/}
		[ "$pid" = $$ ] && continue
		[ "$p/ns/mnt" -ef /proc/$$/ns/mnt ] || continue
		left=1
		kill -9 "$pid" 2>/dev/null
	done
	[ $left = 0 ] && exit 0
	rounds=$((rounds + 1))
	sleep 0.05
done
exit 1
`

// node is one machine: namespaces for network, mounts and host name. Its
// mounts give it an empty /run and its own /var/lib and /root.
type node struct {
	name   string
	dir    string
	path   string
	pid    int
	net    *os.File
	holder *exec.Cmd
	stdin  io.Closer
	stderr bytes.Buffer
}

func (l *Lab) newNode(ctx context.Context, name string) (*node, error) {
	if name == "" || len(name) > 63 || strings.ContainsAny(name, "/. \t\n") {
		return nil, fmt.Errorf("machine name %q is not a host name", name)
	}
	n := &node{name: name, dir: filepath.Join(l.dir, name), path: l.binDir() + ":" + nodePath}
	for _, dir := range []string{n.dir, filepath.Join(n.dir, "lib")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make machine %s: %w", name, err)
		}
	}
	if err := os.Mkdir(filepath.Join(n.dir, "root"), 0o700); err != nil {
		return nil, fmt.Errorf("make machine %s: %w", name, err)
	}
	if err := n.hold(ctx); err != nil {
		return nil, fmt.Errorf("make machine %s: %w", name, err)
	}
	l.mu.Lock()
	l.nodes = append(l.nodes, n)
	l.mu.Unlock()
	return n, nil
}

func (n *node) hold(ctx context.Context) error {
	n.holder = exec.Command("/bin/sh", "-c", holderScript, "natlab-holder", n.name, n.dir)
	n.holder.Env = n.env()
	n.holder.Dir = "/"
	n.holder.Stderr = &n.stderr
	n.holder.SysProcAttr = &unix.SysProcAttr{
		// Ctrl-C in the terminal must reach the lab, not its machines.
		Setsid:       true,
		Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
	}
	stdin, err := n.holder.StdinPipe()
	if err != nil {
		return fmt.Errorf("open pipe to holder: %w", err)
	}
	stdout, err := n.holder.StdoutPipe()
	if err != nil {
		return fmt.Errorf("open pipe from holder: %w", err)
	}
	if err := n.holder.Start(); err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	n.stdin, n.pid = stdin, n.holder.Process.Pid
	stopped := context.AfterFunc(ctx, func() { n.holder.Process.Kill() })
	defer stopped()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		return errors.Join(errors.New("holder did not become ready"), ctx.Err(), n.close())
	}
	n.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", n.pid))
	if err != nil {
		return errors.Join(fmt.Errorf("open network namespace: %w", err), n.close())
	}
	return nil
}

func (n *node) close() error {
	var errs []error
	if n.net != nil {
		errs = append(errs, n.net.Close())
	}
	errs = append(errs, n.stdin.Close())
	late := time.AfterFunc(holderGrace, func() { n.holder.Process.Kill() })
	defer late.Stop()
	if err := n.holder.Wait(); err != nil {
		errs = append(errs, fmt.Errorf("end machine %s: %w: %s", n.name, err, bytes.TrimSpace(n.stderr.Bytes())))
	}
	return errors.Join(errs...)
}

func (n *node) env() []string {
	return []string{"PATH=" + n.path, "HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=dumb"}
}

// command runs a program in the machine. nsenter replaces itself by the
// program, so signals, exit status and pid are the program's own.
func (n *node) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(n.pid), "--net", "--mount", "--uts", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Env = n.env()
	cmd.Dir = "/"
	cmd.WaitDelay = waitDelay
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	return cmd
}

// sh runs a script of setup lines and stops at the first that fails.
func (n *node) sh(ctx context.Context, s script) error {
	cmd := n.command(ctx, "/bin/sh", "-e")
	cmd.Stdin = strings.NewReader(strings.Join(s, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("set up %s with %q: %w: %s", n.name, s, err, bytes.TrimSpace(out))
	}
	return nil
}

// inside runs f on a thread that is in the machine's network namespace. What
// f opens (sockets, TUN devices) stays in there.
func (n *node) inside(f func() error) error {
	var g errgroup.Group
	g.Go(func() error {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return fmt.Errorf("open own network namespace: %w", err)
		}
		defer home.Close()
		if err := unix.Setns(int(n.net.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network of %s: %w", n.name, err)
		}
		err = f()
		// A thread that cannot go home stays locked and dies with this
		// goroutine.
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		return err
	})
	return g.Wait()
}

// script is a list of shell lines.
type script []string

func (s *script) add(format string, args ...any) {
	*s = append(*s, fmt.Sprintf(format, args...))
}

func (s *script) sysctl(key string, value int) {
	s.add("echo %d >/proc/sys/%s", value, key)
}
