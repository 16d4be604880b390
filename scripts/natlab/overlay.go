package natlab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

const (
	programName = "overlay"
	programPath = "overlay/cmd/overlay"
	coordWait   = 15 * time.Second
)

// Build puts the overlay program where every host of the lab finds it: the
// one of Options.Binary, or one compiled from this module. It does so once;
// later calls return the same result.
func (l *Lab) Build(ctx context.Context) error {
	l.build.Do(func() {
		to := filepath.Join(l.binDir(), programName)
		if l.opts.Binary != "" {
			l.buildErr = copyProgram(to, l.opts.Binary)
		} else {
			l.buildErr = compile(ctx, programPath, to)
		}
	})
	return l.buildErr
}

// compile builds a program of this module, or of one that it uses.
func compile(ctx context.Context, path, to string) error {
	tool, err := exec.LookPath("go")
	if err != nil {
		tool = "/usr/local/go/bin/go"
	}
	cmd := exec.CommandContext(ctx, tool, "build", "-trimpath", "-ldflags", "-s -w", "-o", to, path)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", path, err, bytes.TrimSpace(out))
	}
	return nil
}

func copyProgram(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("open program: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return fmt.Errorf("install program: %w", err)
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return fmt.Errorf("install program: %w", err)
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("install program: %w", err)
	}
	return nil
}

// Overlay prepares the overlay program to run on the host; Build must have
// succeeded.
func (h *Host) Overlay(ctx context.Context, args ...string) *exec.Cmd {
	return h.Command(ctx, programName, args...)
}

// StartCoord runs `overlay coord --public ADDRESS` and the given arguments in
// the background and returns it with the owner invite, the one line it prints
// as long as there is no owner.
func (h *Host) StartCoord(ctx context.Context, args ...string) (*Process, string, error) {
	line := &firstLine{found: make(chan string, 1)}
	args = append([]string{"coord", "--public", h.Addr().String()}, args...)
	coord, err := h.Start(context.WithoutCancel(ctx), line, programName, args...)
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, coordWait)
	defer cancel()
	select {
	case invite := <-line.found:
		return coord, invite, nil
	case <-coord.done:
		return nil, "", fmt.Errorf("overlay coord on %s ended: %s", h.name, coord.tail())
	case <-ctx.Done():
		return nil, "", fmt.Errorf("wait for the owner invite: %w: %s", ctx.Err(), coord.tail())
	}
}

// StartRelay runs `overlay relay --public ADDRESS` and the given arguments, the
// first time an invite for a relay, in the background. It does not wait: nodes
// learn of a relay from their server.
func (h *Host) StartRelay(ctx context.Context, args ...string) (*Process, error) {
	args = append([]string{"relay", "--public", h.Addr().String()}, args...)
	return h.Start(context.WithoutCancel(ctx), nil, programName, args...)
}

// firstLine is a writer that hands over the first line written to it.
type firstLine struct {
	found chan string

	mu   sync.Mutex
	text []byte
	done bool
}

const maxLine = 4096

// Write keeps bytes up to the first line feed, and drops the rest.
func (f *firstLine) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done {
		return len(p), nil
	}
	f.text = append(f.text, p...)
	line, _, ok := bytes.Cut(f.text, []byte("\n"))
	if ok {
		f.found <- string(bytes.TrimSpace(line))
	}
	f.done = ok || len(f.text) > maxLine
	return len(p), nil
}

// Status is what `overlay status --json` prints.
type Status struct {
	Schema int           `json:"schema"`
	Self   StatusNode    `json:"self"`
	Peers  []StatusPeer  `json:"peers"`
	Relays []StatusRelay `json:"relays"`
}

// StatusRelay is a relay the node knows: transport is udp, tls or empty, which
// is not connected.
type StatusRelay struct {
	Name      string   `json:"name"`
	Transport string   `json:"transport"`
	RTTms     *float64 `json:"rttMs"`
	Home      bool     `json:"home"`
	Trouble   string   `json:"trouble"`
}

// StatusNode is a node in Status.
type StatusNode struct {
	Name      string     `json:"name"`
	IPv4      netip.Addr `json:"ipv4"`
	IPv6      netip.Addr `json:"ipv6"`
	PublicKey string     `json:"publicKey"`
	Online    bool       `json:"online"`
}

// StatusPeer is another node, seen from the one that was asked. Times are nil
// and round trips, in milliseconds, zero where there is none yet.
type StatusPeer struct {
	StatusNode
	Path          StatusPath `json:"path"`
	RTTms         float64    `json:"rttMs"`
	RxBytes       uint64     `json:"rxBytes"`
	TxBytes       uint64     `json:"txBytes"`
	Segments      int        `json:"segments"` // per message
	LastHandshake *time.Time `json:"lastHandshake"`
}

// StatusPath says how packets reach a peer: kind is direct, relay or none;
// reason, for people, says why it is not direct.
type StatusPath struct {
	Kind     string `json:"kind"`
	Endpoint string `json:"endpoint"`
	Via      string `json:"via"`
	Relay    string `json:"relay"`
	Reason   string `json:"reason"`
}

// Status asks the host's node.
func (h *Host) Status(ctx context.Context) (Status, error) {
	out, err := h.Overlay(ctx, "status", "--json").Output()
	if err != nil {
		return Status{}, fmt.Errorf("overlay status on %s: %w", h.name, err)
	}
	return parseStatus(out)
}

func parseStatus(text []byte) (Status, error) {
	var s Status
	if err := json.Unmarshal(text, &s); err != nil {
		return Status{}, fmt.Errorf("parse overlay status: %w", err)
	}
	if s.Schema != 1 {
		return Status{}, fmt.Errorf("parse overlay status: schema %d is not 1", s.Schema)
	}
	return s, nil
}

// Peer finds a peer by name.
func (s Status) Peer(name string) (StatusPeer, error) {
	for _, p := range s.Peers {
		if p.Name == name {
			return p, nil
		}
	}
	return StatusPeer{}, fmt.Errorf("no peer %s in the status of %s", name, s.Self.Name)
}
