package overlay

import (
	"crypto/ed25519"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"overlay/coord"
)

// Whoever may hold the root key of a mesh says that it may go; what is known of
// the other members does not matter.
func TestRootKeyGoesOnlyWhenAsked(t *testing.T) {
	m := newTestMesh(t)
	owner := m.node("anna", m.signer)
	for name, c := range map[string]struct {
		root   ed25519.PrivateKey
		joined bool
		damage string
		free   bool
	}{
		"the mesh's":               {root: m.root, joined: true},
		"none":                     {joined: true, free: true},
		"none, not joined":         {free: true},
		"a founding without reply": {root: m.root},
		"another's":                {root: newKey(t), joined: true, free: true},
		"half of one":              {root: m.root[:20], joined: true},
		"membership damaged":       {root: m.root, joined: true, damage: meshFile},
		"keys damaged":             {root: m.root, joined: true, damage: keysFile},
		"keys damaged, none":       {joined: true, damage: keysFile, free: true},
	} {
		s := store{t.TempDir()}
		err := s.save(keysFile, &keys{Device: owner.device, WireGuard: owner.w, Root: c.root})
		if c.joined {
			err = errors.Join(err, s.save(meshFile, m.membership(owner)))
		}
		if c.damage != "" {
			path := filepath.Join(s.dir, c.damage)
			b := must[[]byte](t)(os.ReadFile(path))
			err = errors.Join(err, os.WriteFile(path, b[:len(b)-4], 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := s.mayLeave(LeaveRequest{}); (err == nil) != c.free {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.mayLeave(LeaveRequest{ForgetRoot: true}); err != nil {
			t.Errorf("%s, asked for: %v", name, err)
		}
	}
}

// Keys that can never sign a revocation are not deleted unasked either: a backup
// of them could.
func TestLeaveKeepsWhatTheServerWasNotToldOf(t *testing.T) {
	m := newTestMesh(t)
	n := m.node("bob", m.signer)
	s := store{t.TempDir()}
	if err := errors.Join(s.save(keysFile, &keys{Device: newKey(t), WireGuard: n.w}), s.save(meshFile, m.membership(n))); err != nil {
		t.Fatal(err)
	}
	cfg := Config{StateDir: s.dir}
	wantKind(t, Leave(t.Context(), cfg, LeaveRequest{}), Failure, "nothing is deleted: the key of this device is missing")
	if _, err := os.Stat(filepath.Join(s.dir, meshFile)); err != nil {
		t.Fatal(err)
	}
	wantKind(t, Leave(t.Context(), cfg, LeaveRequest{Offline: true}), Unreachable, "left, and the keys are deleted")
	wantKind(t, Leave(t.Context(), cfg, LeaveRequest{}), Refused, "has not joined a mesh")
}

func TestLeaveMakesNoDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	wantKind(t, Leave(t.Context(), Config{StateDir: dir}, LeaveRequest{}), Refused, "has not joined a mesh")
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory: %v", err)
	}
}

// A daemon is not the one of every directory.
func TestDaemonLeavesItsOwnDirectoryOnly(t *testing.T) {
	c, cfg := startNode(t)
	other := t.TempDir()
	wantKind(t, c.Leave(t.Context(), LeaveRequest{State: other}), NotRunning, "uses the state directory "+cfg.StateDir+", not "+other)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(cfg.StateDir, link); err != nil {
		t.Fatal(err)
	}
	wantKind(t, c.Leave(t.Context(), LeaveRequest{State: link}), Refused, "has not joined a mesh")
	if _, err := c.Status(t.Context()); KindOf(err) != Refused {
		t.Errorf("the daemon after that: %v", err)
	}
}

func TestLeaveOfARunningRelay(t *testing.T) {
	m := newTestMesh(t)
	dir := relayDir(t, m, m.relay("fra"), &coord.Netmap{})
	unlock, err := (store{dir}).lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	err = Leave(t.Context(), Config{StateDir: dir}, LeaveRequest{})
	wantKind(t, err, Failure, "another daemon uses the state directory "+dir)
	if hint := asError(err).Hint; hint != "stop the relay first, then run it again" {
		t.Errorf("hint %q", hint)
	}
}

// Keys drawn for a founding go when it is refused for certain, and only those.
func TestRefusedFoundingKeepsNoRoot(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		older bool
		gone  bool
	}{
		"used":            {err: &coord.Error{Code: coord.CodeInviteUsed}, gone: true},
		"another server":  {err: &coord.PinError{}, gone: true},
		"server failed":   {err: &coord.Error{Code: coord.CodeInternal}},
		"not reached":     {err: &coord.ReachError{}},
		"not its mesh":    {err: coord.ErrMesh},
		"drawn long ago":  {err: &coord.Error{Code: coord.CodeInviteUsed}, older: true},
		"limited, not no": {err: &coord.Error{Code: coord.CodeRateLimited}},
	} {
		s := store{t.TempDir()}
		k := must[*keys](t)(s.loadKeys())
		if err := s.found(k, nil); err != nil {
			t.Fatal(err)
		}
		if c.older {
			k = must[*keys](t)(s.loadKeys())
		}
		if err := s.unfound(k, c.err); err != nil {
			t.Fatal(err)
		}
		saved := must[*keys](t)(s.loadKeys())
		if gone := saved.Root == nil && saved.Signer == nil && saved.Founding == nil; gone != c.gone || !saved.Device.Equal(k.Device) {
			t.Errorf("%s: gone is %v", name, gone)
		}
	}
}
