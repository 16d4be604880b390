package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlay/overlay"
)

func TestCleanLeavesOneHarmlessLine(t *testing.T) {
	got := clean("name \x1b[31m\"büro\"\u009b1m\u202e\nnext\tend\x00")
	want := "name ?[31m\"büro\"?1m? next end?"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1 kB", 1234: "1.23 kB", 999_499: "999 kB", 999_500: "1 MB",
		12_345_678: "12.3 MB", 1 << 62: "4.61 EB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) is %q, want %q", n, got, want)
		}
	}
}

func TestSince(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		-time.Second: "now", 0: "now", time.Second: "1 s ago", 119 * time.Second: "119 s ago",
		2 * time.Minute: "2 min ago", 2 * time.Hour: "2 h ago", 49 * time.Hour: "2 days ago",
	} {
		if got := since(now.Add(-d), now); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
	if got := since(time.Time{}, now); got != "" {
		t.Errorf("never: %q", got)
	}
}

func TestEveryKindHasItsExitCode(t *testing.T) {
	want := map[overlay.Kind]int{
		overlay.Failure: 1, overlay.Usage: 2, overlay.NotRunning: 3, overlay.Refused: 4,
		overlay.Permission: 5, overlay.NoReply: 6, overlay.Unreachable: 7,
	}
	for k, code := range want {
		if got := exitCode(k); got != code {
			t.Errorf("%s: %d, want %d", k, got, code)
		}
		if got := kindOf(code); got != k {
			t.Errorf("code %d: %s, want %s", code, got, k)
		}
	}
}

func TestErrorsAreSanitised(t *testing.T) {
	var b bytes.Buffer
	printError(&b, fmt.Errorf("join: %w", failure(overlay.Refused, "say\x07 please", "no\nway \x1b[2J")))
	if want := "overlay: join: no way ?[2J\n  say? please\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func TestSSHArgs(t *testing.T) {
	st := overlay.Status{Peers: []overlay.PeerStatus{{Name: "bob", IPv4: netip.MustParseAddr("100.64.0.2"), IPv6: netip.MustParseAddr("fd00::2")}}}
	for _, tt := range []struct {
		args, want string
	}{
		{"bob", "ssh -o HostKeyAlias=bob 100.64.0.2"},
		{"root@bob", "ssh -o HostKeyAlias=bob root@100.64.0.2"},
		{"a@b@bob", "ssh -o HostKeyAlias=bob a@b@100.64.0.2"},
		{"fd00::2", "ssh -o HostKeyAlias=bob 100.64.0.2"},
		{"bob -p 2222 uptime", "ssh -o HostKeyAlias=bob 100.64.0.2 -p 2222 uptime"},
	} {
		_, got, err := sshArgs(st, strings.Fields(tt.args))
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %q, %v, want %q", tt.args, got, err, tt.want)
		}
	}
	for _, name := range []string{"-oProxyCommand=x@bob", "bpb", "-F", "@"} {
		if _, got, err := sshArgs(st, []string{name}); overlay.KindOf(err) != overlay.Usage {
			t.Errorf("%s: %q, %v, want a usage error", name, got, err)
		}
	}
}

// Before ssh waits for a machine that is off, it is said so.
func TestSSHTellsOfAbsence(t *testing.T) {
	for _, x := range []struct {
		peer overlay.PeerStatus
		want string
	}{
		{overlay.PeerStatus{Name: "bob", Path: overlay.PathStatus{Kind: "none"}}, "bob is not connected; trying all the same\n"},
		{overlay.PeerStatus{Name: "bob", Path: overlay.PathStatus{Kind: "relay"}}, ""}, // only the server lost it
		{overlay.PeerStatus{Name: "bob", Path: overlay.PathStatus{Kind: "none"}, Online: true}, ""},
	} {
		var b bytes.Buffer
		if tellAbsence(&b, x.peer); b.String() != x.want {
			t.Errorf("%+v: %q, want %q", x.peer, b.String(), x.want)
		}
	}
}

// A relay has addresses of the mesh, but is no machine to connect to.
func TestRelayIsNoPeer(t *testing.T) {
	st := overlay.Status{Relays: []overlay.RelayStatus{{Name: "berlin"}, {Name: "carl", Peer: true}}}
	for name, want := range map[string]string{
		"berlin": `"berlin" is a relay, not a machine to connect to`, "carl": `no node "carl"`,
	} {
		if _, err := findPeer(st, name); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestDaemonErrorRepeatsTheLastOne(t *testing.T) {
	for _, tt := range []struct {
		name, log string
		want      overlay.Error
	}{
		{"hint", "time=x\noverlay: old\n  old hint\noverlay: keys are open\n  chmod 600 x\n", overlay.Error{Kind: overlay.Permission, Message: "keys are open", Hint: "chmod 600 x"}},
		{"no hint", "overlay: old\n  old hint\noverlay: gone", overlay.Error{Kind: overlay.Permission, Message: "gone"}},
		{"nothing", "panic: no\n", overlay.Error{Kind: overlay.Permission, Message: "the daemon ended at once (exit code 5)"}},
	} {
		err := daemonError(strings.NewReader("overlay: before\n"+tt.log), int64(len("overlay: before\n")), 5)
		if e, ok := errors.AsType[*overlay.Error](err); !ok || *e != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, err, tt.want)
		}
	}
}

// A log that is full becomes the old one, and standard error goes on in a new
// file.
func TestLogRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), logFile)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	moved := 0
	l := &rotatingLog{path: path, size: maxLogSize - 3, move: func(to *os.File) error {
		moved++
		if to.Name() != path {
			t.Errorf("moved to %s", to.Name())
		}
		return nil
	}, out: f}
	for _, s := range []string{"abc", "def", "ghi"} {
		if _, err := io.WriteString(l, s); err != nil {
			t.Fatal(err)
		}
	}
	if moved != 1 || l.size != 6 {
		t.Errorf("moved %d times, size %d; want once and 6", moved, l.size)
	}
	names, err := filepath.Glob(path + "*")
	if err != nil || !slices.Equal(names, []string{path, path + ".1"}) {
		t.Errorf("files %q, %v", names, err)
	}
}

// systemd is told on the socket it names, and nobody else is.
func TestNotifyReady(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", "")
	if err := notifyReady(); err != nil {
		t.Fatalf("without systemd: %v", err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	if err := notifyReady(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	n, err := l.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("got %q, %v", b[:n], err)
	}
}
