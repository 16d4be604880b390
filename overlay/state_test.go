package overlay

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlay/punch"
)

func TestKeysAreDrawnOnce(t *testing.T) {
	s := store{filepath.Join(t.TempDir(), "state")}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	a := must[*keys](t)(s.loadKeys())
	b := must[*keys](t)(s.loadKeys())
	if !a.Device.Equal(b.Device) || a.WireGuard != b.WireGuard {
		t.Fatal("the second load gave other keys")
	}
	fi := must[os.FileInfo](t)(os.Stat(filepath.Join(s.dir, keysFile)))
	if fi.Mode().Perm() != 0o600 {
		t.Fatalf("keys are %04o, want 0600", fi.Mode().Perm())
	}
}

func TestReadableKeysAreRefused(t *testing.T) {
	s := store{t.TempDir()}
	_ = must[*keys](t)(s.loadKeys())
	path := filepath.Join(s.dir, keysFile)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	err := s.open()
	if err == nil || !strings.Contains(err.Error(), "readable by others (0644)") {
		t.Fatalf("got %v", err)
	}
	if hint := asError(err).Hint; hint != "chmod 600 "+path {
		t.Fatalf("hint %q", hint)
	}
}

func TestDamagedStateNamesFileAndByte(t *testing.T) {
	s := store{t.TempDir()}
	_ = must[*keys](t)(s.loadKeys())
	path := filepath.Join(s.dir, keysFile)
	whole := must[[]byte](t)(os.ReadFile(path))
	for cut := range len(whole) - 2 { // the last byte is white space after the end
		if err := os.WriteFile(path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := s.loadKeys()
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "damaged") {
			t.Fatalf("cut at %d of %d: %v", cut, len(whole), err)
		}
	}
}

func TestSettingsKeepPortAndTurnNonces(t *testing.T) {
	s := store{t.TempDir()}
	now := time.Now()
	a := must[*settings](t)(s.loadSettings(now))
	if a.ListenPort < firstPort || a.ListenPort >= firstPort+portCount {
		t.Fatalf("port %d", a.ListenPort)
	}
	if a.RelayPort < firstPort || a.RelayPort >= firstPort+portCount || a.RelayPort == a.ListenPort {
		t.Fatalf("port %d of the relay beside %d", a.RelayPort, a.ListenPort)
	}
	if err := s.save(settingsFile, a); err != nil {
		t.Fatal(err)
	}
	b := must[*settings](t)(s.loadSettings(now.Add(time.Hour)))
	if *a != *b {
		t.Fatalf("an hour later %+v, want %+v", b, a)
	}
	c := must[*settings](t)(s.loadSettings(now.Add(nonceLife + time.Hour)))
	if c.ListenPort != a.ListenPort || c.Nonces[1] != a.Nonces[0] || c.Nonces[0] == a.Nonces[0] || c.Nonces[0] == (punch.Nonce{}) {
		t.Fatalf("a day later %+v after %+v", c, a)
	}
}

// A session after the clock was set back, even twice, comes after the ones before.
func TestSettingsNumberSessions(t *testing.T) {
	s := store{t.TempDir()}
	now := time.Now()
	last := uint64(0)
	for _, age := range []time.Duration{0, -time.Hour, 1000 * time.Hour, 2000 * time.Hour, -time.Minute} {
		c := must[*settings](t)(s.loadSettings(now))
		c.begin(now.Add(-age))
		if c.Boot <= last {
			t.Fatalf("session %d after %d", c.Boot, last)
		}
		last = c.Boot
		if err := s.save(settingsFile, c); err != nil {
			t.Fatal(err)
		}
	}
	if last < uint64(now.Add(time.Hour).UnixNano()) {
		t.Fatalf("number %d is not of the latest time", last)
	}
}

func TestFullDiskSaysSoAndKeepsTheOldFile(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIP: mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount a tmpfs as root: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, 0) })
	s := store{dir}
	if err := s.save(settingsFile, &settings{Name: "before"}); err != nil {
		t.Fatal(err)
	}
	_ = os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600) // fills what is left
	err := s.save(settingsFile, &settings{Name: strings.Repeat("x", 8000)})
	if err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Fatalf("got %v", err)
	}
	var c settings
	if ok, err := s.load(settingsFile, &c); !ok || err != nil || c.Name != "before" {
		t.Fatalf("the old file: %v %v %+v", ok, err, c)
	}
}
