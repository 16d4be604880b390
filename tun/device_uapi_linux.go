package tun

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// uapiFolder is where wg and wgctrl look for the sockets of userspace devices.
const uapiFolder = "/var/run/wireguard"

// acceptPause follows a failed accept.
const acceptPause = 100 * time.Millisecond

// A uapi is the socket through which wg, wgctrl and this program configure the
// device. Unlike package ipc's, its file is made private without the
// process-wide umask, its goroutines all end, and it is put back when somebody
// removes the file: without it no endpoint could be written any more.
type uapi struct {
	path string
	log  *slog.Logger

	mu     sync.Mutex
	socket *net.UnixListener
	ended  bool
}

// openUAPI makes the socket of the interface, in place of one that nobody
// serves. It fails with ErrInterfaceTaken when somebody does.
func openUAPI(name string, log *slog.Logger) (*uapi, error) {
	u := &uapi{path: filepath.Join(uapiFolder, name+".sock"), log: log}
	if err := os.MkdirAll(uapiFolder, 0o755); err != nil {
		return nil, fmt.Errorf("make folder of uapi socket: %w", err)
	}
	if err := u.listen(); err != nil {
		return nil, err
	}
	return u, nil
}

func (u *uapi) listen() error {
	if err := removeStale(u.path); err != nil {
		return err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// The mode of an unbound socket is the mode of the file that bind
		// makes: at no moment can others open it.
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", u.path)
	if err != nil {
		return fmt.Errorf("listen on uapi socket: %w", err)
	}
	u.socket = l.(*net.UnixListener)
	return nil
}

// removeStale removes a socket file that a killed process left.
func removeStale(path string) error {
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		defer c.Close()
		return fmt.Errorf("uapi socket %s: %w by %s", path, ErrInterfaceTaken, socketPeer(c.(*net.UnixConn)))
	case errors.Is(err, os.ErrNotExist):
		return nil
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("look at uapi socket: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale uapi socket: %w", err)
	}
	return nil
}

// socketPeer describes who listens at the other end.
func socketPeer(c *net.UnixConn) string {
	pid := 0
	if raw, err := c.SyscallConn(); err == nil {
		err := raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				pid = int(cred.Pid)
			}
		})
		if err == nil && pid != 0 {
			return describeProcess(strconv.Itoa(pid))
		}
	}
	return "another process"
}

// restore listens again when the file is gone.
func (u *uapi) restore() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ended {
		return ErrClosed
	}
	if _, err := os.Lstat(u.path); err == nil {
		return nil
	}
	old := u.socket
	if err := u.listen(); err != nil {
		return err
	}
	old.SetUnlinkOnClose(false) // the name is the new socket's now
	return old.Close()
}

// close ends serve and whatever waits to be served.
func (u *uapi) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.ended {
		u.ended = true
		u.socket.Close()
	}
}

func (u *uapi) current() (l *net.UnixListener, ended bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.socket, u.ended
}

// serve hands connections to handle, each in its own goroutine of g, until the
// socket is closed or ctx ends; then open connections are cut.
func (u *uapi) serve(ctx context.Context, g *errgroup.Group, handle func(net.Conn)) {
	defer context.AfterFunc(ctx, u.close)()
	for {
		l, ended := u.current()
		if ended {
			return
		}
		c, err := l.Accept()
		if err != nil {
			if now, ended := u.current(); ended || now != l {
				continue
			}
			// Out of file descriptors, perhaps: no reason to end a tunnel.
			u.log.Warn("cannot accept on the uapi socket", "err", err)
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		g.Go(func() error {
			defer context.AfterFunc(ctx, func() { c.Close() })()
			handle(c)
			return nil
		})
	}
}
