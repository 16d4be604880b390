package main

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"overlay/overlay"
)

// downWait is how long a daemon may take to end.
const (
	downWait = 5 * time.Second
	downPoll = 20 * time.Millisecond
)

// downCommand ends the daemon.
func downCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "down",
		Short: "disconnect and end the daemon; up connects again",
		Args:  cobra.NoArgs,
	}
	n := addNodeFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return stopDaemon(cmd.Context(), n) }
	return cmd
}

// stopDaemon asks the daemon to end and waits until it has.
func stopDaemon(ctx context.Context, n *nodeFlags) error {
	d := watchDaemon(n.socket)
	defer d.close()
	err := n.client().Down(ctx)
	if overlay.KindOf(err) == overlay.NotRunning {
		return failure(overlay.NotRunning, "", "the daemon is not running")
	}
	if err != nil {
		return err
	}
	return d.wait(ctx)
}

// daemonWatch notices the end of a daemon: its process's, because interface
// and routes go after the socket.
type daemonWatch struct {
	socket string
	pidfd  int // -1: unknown, as in another PID namespace
}

func watchDaemon(socket string) daemonWatch {
	d := daemonWatch{socket: socket, pidfd: -1}
	c, err := net.Dial("unix", socket)
	if err != nil {
		return d
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return d
	}
	_ = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil || cred.Pid == 0 {
			return
		}
		if fd, err := unix.PidfdOpen(int(cred.Pid), 0); err == nil {
			d.pidfd = fd
		}
	})
	return d
}

func (d daemonWatch) close() {
	if d.pidfd >= 0 {
		_ = unix.Close(d.pidfd)
	}
}

func (d daemonWatch) ended() bool {
	if d.pidfd < 0 {
		_, err := os.Lstat(d.socket)
		return errors.Is(err, os.ErrNotExist)
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(d.pidfd), Events: unix.POLLIN}}, 0)
	return err == nil && n == 1
}

func (d daemonWatch) wait(ctx context.Context) error {
	for deadline := time.Now().Add(downWait); time.Now().Before(deadline); {
		if d.ended() {
			return nil
		}
		if !pause(ctx, downPoll) {
			return ctx.Err()
		}
	}
	return failure(overlay.Failure, "see its log: overlay.log in the state directory", "the daemon did not end within %s", downWait)
}
