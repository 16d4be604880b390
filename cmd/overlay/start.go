package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"overlay/overlay"
)

const (
	logFile    = "overlay.log"
	maxLogSize = 8 << 20 // then one old log is kept beside the new one
	maxLogTail = 16 << 10

	startWait = 5 * time.Second
	startPoll = 10 * time.Millisecond

	unitName = "overlay.service"
)

// start brings a daemon up and returns when its socket answers.
func (v *upVerb) start(ctx context.Context) error {
	state, socket, err := v.node.places()
	if err != nil {
		return err
	}
	if err := overlay.CheckState(overlay.Config{StateDir: state}, v.request.Invite != ""); err != nil {
		return err
	}
	if state == overlay.DefaultStateDir && socket == overlay.DefaultSocket && unitInstalled() {
		return startUnit(ctx)
	}
	return startProcess(ctx, state, socket)
}

// unitInstalled says whether systemd runs this machine and knows the daemon.
func unitInstalled() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false
	}
	return slices.ContainsFunc([]string{"/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"}, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "systemd/system", unitName))
		return err == nil
	})
}

func startUnit(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "systemctl", "start", unitName).CombinedOutput()
	if err != nil {
		return failure(overlay.Failure, "see: journalctl -u "+unitName, "systemd cannot start %s: %s", unitName, bytes.TrimSpace(out))
	}
	return nil
}

// startProcess runs this program again as a daemon in a session of its own.
// The invite is not among what it is given: it gets it over the socket.
func startProcess(ctx context.Context, state, socket string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	log, err := openLog(state)
	if err != nil {
		return err
	}
	defer log.Close()
	from, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("look at %s: %w", log.Name(), err)
	}
	cmd := exec.Command(self, "up", "--daemon", "--state", state, "--socket", socket)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, inviteEnv+"=") || strings.HasPrefix(v, "NOTIFY_SOCKET=")
	})
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	return waitSocket(ctx, cmd.Process, overlay.NewClient(socket), func(code int) error { return daemonError(log, from, code) })
}

// waitSocket returns when the daemon answers; a daemon that ended instead is
// explained by died.
func waitSocket(ctx context.Context, daemon *os.Process, c *overlay.Client, died func(code int) error) error {
	for deadline := time.Now().Add(startWait); time.Now().Before(deadline); {
		if running(ctx, c) {
			return daemon.Release()
		}
		var st syscall.WaitStatus
		if pid, err := syscall.Wait4(daemon.Pid, &st, syscall.WNOHANG, nil); err == nil && pid == daemon.Pid {
			if running(ctx, c) { // another up was faster
				return nil
			}
			return died(st.ExitStatus())
		}
		if !pause(ctx, startPoll) {
			return errors.Join(ctx.Err(), daemon.Kill())
		}
	}
	return errors.Join(failure(overlay.Failure, "", "the daemon did not answer within %s", startWait), daemon.Kill())
}

// openLog opens the daemon's log; the state directory is made when it is not
// there.
func openLog(state string) (*os.File, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, stateError(state, err)
	}
	f, err := os.OpenFile(filepath.Join(state, logFile), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, stateError(state, err)
	}
	return f, nil
}

func stateError(state string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return failure(overlay.Permission, "run it with sudo", "cannot use the state directory %s: permission denied", state)
	}
	return failure(overlay.Failure, "look at the disk, then run it again", "cannot save state in %s: %v", state, errors.Unwrap(err))
}

// daemonError repeats what a daemon said when it ended. It is this program: its
// last error has our form, and its exit code our meaning.
func daemonError(log io.ReaderAt, from int64, code int) error {
	text, err := io.ReadAll(io.NewSectionReader(log, from, maxLogTail))
	if err != nil {
		return fmt.Errorf("read the daemon's log: %w", err)
	}
	e := &overlay.Error{Kind: kindOf(code), Message: fmt.Sprintf("the daemon ended at once (exit code %d)", code)}
	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		if message, ok := strings.CutPrefix(line, "overlay: "); ok {
			e.Message, e.Hint = message, ""
			if hint, ok := strings.CutPrefix(lines[min(i+1, len(lines)-1)], "  "); ok {
				e.Hint = hint
			}
		}
	}
	return e
}

// kindOf is the kind of failure that an exit code stands for.
func kindOf(code int) overlay.Kind {
	for _, k := range []overlay.Kind{
		overlay.Usage, overlay.NotRunning, overlay.Refused, overlay.Permission, overlay.NoReply, overlay.Unreachable,
	} {
		if exitCode(k) == code {
			return k
		}
	}
	return overlay.Failure
}
