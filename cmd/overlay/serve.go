package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlay/overlay"
)

// joinWait is how long a daemon without a mesh waits for an invite.
const joinWait = 60 * time.Second

// serve is the daemon itself.
func (v *upVerb) serve(cmd *cobra.Command) error {
	state, socket, err := v.node.places()
	if err != nil {
		return err
	}
	log := cmd.ErrOrStderr()
	if v.daemon {
		if log, err = newRotatingLog(filepath.Join(state, logFile)); err != nil {
			return err
		}
	}
	c := overlay.Config{
		StateDir: state, Socket: socket, Version: version(), Processors: true,
		Log: slog.New(slog.NewTextHandler(log, nil)),
	}
	if err := overlay.CheckState(c, true); err != nil {
		return err
	}
	node := overlay.New(c)
	err = runNode(cmd.Context(), node, func(ctx context.Context) error {
		if v.daemon || overlay.CheckState(c, v.request.Invite != "") != nil {
			c.Log.Info("waiting for overlay up", "socket", socket, "limit", joinWait)
			return awaitUp(ctx, node)
		}
		res, err := node.Up(ctx, v.request, progressTo(cmd.ErrOrStderr()))
		if err != nil {
			return err
		}
		return showUp(cmd, res)
	})
	if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// runNode runs a node, and beside it what is to be done once its socket is
// there. It ends when the node ends or up fails.
func runNode(ctx context.Context, node *overlay.Node, up func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	ready := make(chan struct{})
	g.Go(func() error {
		defer cancel()
		return node.Run(ctx, func() { close(ready) })
	})
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-ready:
		}
		if err := errors.Join(notifyReady(), up(ctx)); ctx.Err() == nil {
			return err
		}
		return nil
	})
	return g.Wait()
}

// awaitUp gives somebody time to ask for an up over the socket, and fails when
// the node is still not up then.
func awaitUp(ctx context.Context, node *overlay.Node) error {
	if !pause(ctx, joinWait) {
		return nil
	}
	_, err := node.Up(ctx, overlay.UpRequest{}, func(overlay.Progress) {})
	return err
}

// rotatingLog writes to out, the log file at path, and begins a new file when
// that one is full. The new file takes out's place by move.
type rotatingLog struct {
	mu   sync.Mutex
	path string
	size int64
	out  io.Writer
	move func(to *os.File) error
}

// newRotatingLog takes standard error, which is the file at path, for the log:
// panics shall stand there too.
func newRotatingLog(path string) (io.Writer, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("look at the log: %w", err)
	}
	return &rotatingLog{path: path, size: fi.Size(), out: os.Stderr, move: moveOutput}, nil
}

// Write appends b; a file that cannot be replaced grows on.
func (l *rotatingLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(b)) > maxLogSize && l.rotate() == nil {
		l.size = 0
	}
	n, err := l.out.Write(b)
	l.size += int64(n)
	return n, err
}

func (l *rotatingLog) rotate() error {
	if err := os.Rename(l.path, l.path+".1"); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return l.move(f)
}

// moveOutput makes a file the standard output and standard error.
func moveOutput(to *os.File) error {
	for _, fd := range []int{unix.Stdout, unix.Stderr} {
		if err := unix.Dup3(int(to.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return nil
}
