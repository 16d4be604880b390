package overlay

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
)

// The files of the state directory, all 0600.
const (
	keysFile     = "keys.json"     // private keys
	meshFile     = "mesh.json"     // membership: the signed documents
	settingsFile = "settings.json" // flags that were given, port, nonces
	netmapFile   = "netmap.json"   // cache: may be lost
)

// keys are the private keys of this device. Root, Signer and Founding exist
// only where a mesh was founded.
type keys struct {
	Device    ed25519.PrivateKey `json:"device"`
	WireGuard wgtypes.Key        `json:"wireguard"`
	Root      ed25519.PrivateKey `json:"root,omitempty"`
	Signer    ed25519.PrivateKey `json:"signer,omitempty"`
	Founding  *founding          `json:"founding,omitempty"`

	fresh bool // Root, Signer and Founding were drawn by this process
}

// founding is what the owner's device drew before it spoke to the server, so
// that a repeat signs the same documents.
type founding struct {
	MeshID  [16]byte     `json:"meshId"`
	ULA     netip.Prefix `json:"ula"`
	Prefix4 netip.Prefix `json:"prefix4"`
	At      time.Time    `json:"at"`
}

// settings are the flags of `overlay up`, remembered, and what was drawn once.
type settings struct {
	Name       string         `json:"name,omitempty"`
	Server     string         `json:"server,omitempty"`
	Interface  string         `json:"interface"`
	MTU        int            `json:"mtu"`
	ListenPort int            `json:"listenPort"`
	Offloads   string         `json:"offloads,omitempty"`
	Proxy      string         `json:"proxy,omitempty"`
	Announced  bool           `json:"announced,omitempty"` // the founder's first invite was given out
	Nonces     [2]punch.Nonce `json:"nonces"`
	NonceTime  time.Time      `json:"nonceTime"`
	Boot       uint64         `json:"boot"` // of the last session

	PortMapping string `json:"portMapping,omitempty"` // portMappingOff, or on
	PeerRelay   string `json:"peerRelay,omitempty"`   // peerRelayOff, on, or Mbit/s
	RelayPort   int    `json:"relayPort,omitempty"`   // of the relay for others
}

// cache is the last netmap and the paths that worked, for a start without the
// server.
type cache struct {
	State       trust.Document             `json:"state,omitempty"`
	Revocations []trust.Document           `json:"revocations,omitempty"`
	Nodes       []coord.Node               `json:"nodes"`
	Paths       map[string]punch.Candidate `json:"paths"`            // by WireGuard key
	Serial      uint64                     `json:"serial,omitempty"` // of the own record that was published last
	Relay       *cachedRelay               `json:"relay,omitempty"`  // in the own server
}

// cachedRelay is the relay in a server, for a start while the server's stream is
// out of reach.
type cachedRelay struct {
	Server string           `json:"server"` // host:port
	Key    []byte           `json:"key"`
	Addrs  []netip.AddrPort `json:"addrs"`
}

// store is the state directory.
type store struct{ dir string }

// open makes the directory and refuses one that others can read keys in.
func (s store) open() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return fail(Permission, "run it with sudo", "cannot use the state directory %s: permission denied", s.dir)
		}
		return s.saveError(err)
	}
	return s.checkModes()
}

// A daemon that was killed a moment ago may still hold its lock.
const (
	lockWait = 2 * time.Second
	lockPoll = 20 * time.Millisecond
)

// lock keeps every other daemon off the directory, whatever socket it has, until
// unlock or the death of the process.
func (s store) lock(ctx context.Context) (unlock func(), err error) {
	d, err := os.Open(s.dir)
	if err != nil {
		return nil, s.saveError(err)
	}
	for end := time.Now().Add(lockWait); ; {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = d.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) || ctx.Err() != nil {
			break
		}
		time.Sleep(lockPoll)
	}
	_ = d.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fail(Failure, "name its socket with --socket, or another directory with --state", "another daemon uses the state directory %s", s.dir)
	}
	return nil, fmt.Errorf("lock %s: %w", s.dir, err)
}

func (s store) checkModes() error {
	for _, name := range []string{keysFile, meshFile, settingsFile} {
		if err := s.checkMode(name); err != nil {
			return err
		}
	}
	return nil
}

func (s store) checkMode(name string) error {
	path := filepath.Join(s.dir, name)
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return fail(Permission, "run it with sudo", "cannot read %s: permission denied", path)
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return fail(Failure, "chmod 600 "+path,
			"%s is readable by others (%04o); it holds this machine's identity", path, fi.Mode().Perm())
	}
	return nil
}

// load reads a file into v; ok is false when there is none.
func (s store) load(name string, v any) (ok bool, err error) {
	path := filepath.Join(s.dir, name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return false, fail(Permission, "run it with sudo", "cannot read %s: permission denied", path)
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", path, err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fail(Failure, "restore it from a backup, or give this identity up and join again: "+s.leaveCommand(),
			"state file %s is damaged%s", path, where(err))
	}
	return true, nil
}

func where(err error) string {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Sprintf(" at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Sprintf(" at byte %d", e.Offset)
	}
	return ": " + err.Error()
}

// save replaces a file: write, fsync, rename, fsync of the folder.
func (s store) save(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	path := filepath.Join(s.dir, name)
	tmp := path + ".new"
	if err := writeSync(tmp, append(b, '\n')); err != nil {
		_ = os.Remove(tmp)
		return s.saveError(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return s.saveError(err)
	}
	return s.syncDir()
}

func writeSync(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func (s store) syncDir() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return s.saveError(err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return s.saveError(err)
	}
	return nil
}

func (s store) saveError(err error) error {
	hint := "look at the disk, then run it again"
	if errors.Is(err, syscall.ENOSPC) {
		hint = "free some space there, then run it again"
	}
	cause := err
	for u := errors.Unwrap(cause); u != nil; u = errors.Unwrap(cause) {
		cause = u
	}
	if e, ok := errors.AsType[syscall.Errno](err); ok {
		cause = e
	}
	return fail(Failure, hint, "cannot save state in %s: %v", s.dir, cause)
}

// forget deletes everything this device is.
func (s store) forget() error {
	var errs []error
	for _, name := range []string{keysFile, meshFile, settingsFile, netmapFile} {
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, s.syncDir())...)
}

// loadKeys gives the device's keys, drawing and saving them the first time.
func (s store) loadKeys() (*keys, error) {
	var k keys
	ok, err := s.load(keysFile, &k)
	if err != nil {
		return nil, err
	}
	if ok {
		if len(k.Device) != ed25519.PrivateKeySize || k.WireGuard == (wgtypes.Key{}) {
			return nil, fail(Failure, "restore it from a backup, or give this identity up and join again: "+s.leaveCommand(),
				"state file %s is damaged: a key is missing", filepath.Join(s.dir, keysFile))
		}
		return &k, nil
	}
	_, k.Device, err = ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the device key: %w", err)
	}
	if k.WireGuard, err = wgtypes.GeneratePrivateKey(); err != nil {
		return nil, fmt.Errorf("make the wireguard key: %w", err)
	}
	return &k, s.save(keysFile, &k)
}

// found draws what only the founder of a mesh has, once.
func (s store) found(k *keys, avoid []netip.Prefix) error {
	if k.Founding != nil {
		return nil
	}
	var err error
	if _, k.Root, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return fmt.Errorf("make the root key: %w", err)
	}
	if _, k.Signer, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return fmt.Errorf("make the signer key: %w", err)
	}
	f := &founding{At: time.Now().UTC().Truncate(time.Second)}
	if _, err = rand.Read(f.MeshID[:]); err != nil {
		return fmt.Errorf("draw the mesh id: %w", err)
	}
	f.ULA, f.Prefix4 = coord.DrawPrefixes(rand.Reader, avoid)
	k.Founding, k.fresh = f, true
	return s.save(keysFile, k)
}

// unfound drops what found drew a moment ago when err says for certain that it
// founded nothing: else it would count as the root key of a mesh. Older ones stay.
func (s store) unfound(k *keys, err error) error {
	_, foreign := errors.AsType[*coord.PinError](err)
	refused, ok := errors.AsType[*coord.Error](err)
	if !k.fresh || !foreign && (!ok || refusal(refused.Code) != Refused) {
		return nil
	}
	k.Root, k.Signer, k.Founding, k.fresh = nil, nil, nil, false
	return s.save(keysFile, k)
}

// Random ports are drawn below the kernel's ephemeral range and away from the
// ports that WireGuard and other overlays use.
const firstPort, portCount = 20000, 12000

// nonceLife is how long a nonce is published before a start draws a new one.
const nonceLife = 24 * time.Hour

// bootStep is more than the boots that one session gives out: one for itself and
// one for each link to a relay.
const bootStep = 1 << 20

// begin numbers a session: higher than all before it, whatever the clock says, or
// peers and relays would take its messages for old ones.
func (c *settings) begin(now time.Time) { c.Boot = max(c.Boot+bootStep, uint64(now.UnixNano())) }

func drawPort() (uint16, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(portCount))
	if err != nil {
		return 0, fmt.Errorf("draw a port: %w", err)
	}
	return uint16(firstPort + n.Int64()), nil
}

// loadSettings gives the saved settings with defaults filled in.
func (s store) loadSettings(now time.Time) (*settings, error) {
	c := settings{Interface: DefaultInterface, MTU: DefaultMTU}
	if _, err := s.load(settingsFile, &c); err != nil {
		return nil, err
	}
	for _, port := range []*int{&c.ListenPort, &c.RelayPort} {
		for *port == 0 || port == &c.RelayPort && *port == c.ListenPort {
			n, err := drawPort()
			if err != nil {
				return nil, err
			}
			*port = int(n)
		}
	}
	if age := now.Sub(c.NonceTime); age > nonceLife || age < 0 {
		c.Nonces[1] = c.Nonces[0]
		if _, err := rand.Read(c.Nonces[0][:]); err != nil {
			return nil, fmt.Errorf("draw a nonce: %w", err)
		}
		c.NonceTime = now.UTC()
	}
	return &c, nil
}
