package overlay

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

// Leave revokes this device, deletes its keys and ends Run. An error says that
// this did not happen, but for Unreachable with r.Offline: then all but the server
// knows.
func (n *Node) Leave(ctx context.Context, r LeaveRequest) error {
	if !n.store.is(r.State) {
		return fail(NotRunning, "name its socket with --socket",
			"the daemon that answers uses the state directory %s, not %s", n.store.dir, r.State)
	}
	n.up.Lock()
	defer n.up.Unlock()
	return n.store.leave(ctx, n.cfg, leaving{r, func() {
		if n.current() != nil {
			n.endSession() // it would save its netmap again
		}
		n.Down()
	}})
}

// is says whether dir names the state directory; an empty one does.
func (s store) is(dir string) bool {
	if dir == "" {
		return true
	}
	own, err := os.Stat(s.dir)
	other, otherErr := os.Stat(dir)
	return errors.Join(err, otherErr) == nil && os.SameFile(own, other)
}

// leaveWait bounds how long leaving tries to tell the server.
const leaveWait = 5 * time.Second

// Leave gives up the identity in a state directory that no daemon uses.
func Leave(ctx context.Context, cfg Config, r LeaveRequest) error {
	cfg.setDefaults()
	st := store{cfg.StateDir}
	if _, err := os.Stat(st.dir); errors.Is(err, fs.ErrNotExist) {
		return notJoined("")
	}
	if err := st.checkModes(); err != nil && KindOf(err) == Permission {
		return err
	}
	unlock, err := st.lock(ctx)
	if err != nil {
		return st.usedByRelay(err)
	}
	defer unlock()
	return st.leave(ctx, cfg, leaving{r, func() {}})
}

// usedByRelay words for a relay, which has no socket, why its directory is not
// free.
func (s store) usedByRelay(err error) error {
	var m membership
	if ok, loadErr := s.load(meshFile, &m); !ok || loadErr != nil {
		return err
	}
	if cert, certErr := ownCert(&m); certErr != nil || cert.Role != trust.RoleRelay {
		return err
	}
	return fail(KindOf(err), "stop the relay first, then run it again", "%v", err)
}

// mayLeave keeps the founder from deleting the mesh's root key unawares.
func (s store) mayLeave(r LeaveRequest) error {
	if r.ForgetRoot || !s.holdsRoot() {
		return nil
	}
	return fail(Failure, "copy "+s.dir+" to a safe place first, then: "+s.leaveCommand()+" --forget-root",
		"%s holds the only root key of a mesh: without it nobody can ever be invited again", filepath.Join(s.dir, keysFile))
}

// holdsRoot says whether the root key of a mesh would go with the keys. Who else
// is in the mesh is not asked: what is known of that may be late or lost. A key
// without a membership may have founded a mesh, a damaged file may be mended.
func (s store) holdsRoot() bool {
	var k keys
	if _, err := s.load(keysFile, &k); err != nil {
		b, err := os.ReadFile(filepath.Join(s.dir, keysFile))
		return err != nil || bytes.Contains(b, []byte(`"root"`))
	}
	if len(k.Root) != ed25519.PrivateKeySize {
		return len(k.Root) > 0
	}
	var m membership
	joined, err := s.load(meshFile, &m)
	if !joined || err != nil {
		return true
	}
	genesis, err := trust.OpenGenesis(m.Genesis)
	return err != nil || genesis.Root == publicOf(k.Root) // else it is of a mesh that never came to be
}

// leaveCommand is what a user types to leave with this state directory.
func (s store) leaveCommand() string {
	if s.dir == DefaultStateDir {
		return "overlay leave"
	}
	return "overlay leave --state " + s.dir
}

// leaving is a request to leave, and what ends the use of the state directory
// before it is emptied.
type leaving struct {
	LeaveRequest
	end func()
}

// leave deletes the keys once the server knows that they are not used any more:
// nobody else can tell it.
func (s store) leave(ctx context.Context, cfg Config, l leaving) error {
	if err := s.mayLeave(l.LeaveRequest); err != nil {
		return err
	}
	var k keys
	var m membership
	drawn, keyErr := s.load(keysFile, &k)
	joined, meshErr := s.load(meshFile, &m)
	told := errors.Join(keyErr, meshErr)
	if told == nil && !joined {
		return s.forgetDrawn(drawn)
	}
	if told == nil {
		told = s.tellServer(ctx, cfg, &k, &m)
	}
	switch {
	case told != nil && ctx.Err() != nil:
		return ctx.Err()
	case told != nil && !l.Offline:
		return s.notTold(told)
	}
	l.end()
	if err := s.forget(); err != nil {
		return fmt.Errorf("delete the keys: %w", err)
	}
	if told != nil {
		return fail(Unreachable, "", "left, and the keys are deleted, but the server was not told (%s); it lists this machine as offline", troubleText(told))
	}
	return nil
}

// forgetDrawn deletes what was drawn for a join that did not come about.
func (s store) forgetDrawn(drawn bool) error {
	if !drawn {
		return notJoined("")
	}
	if err := s.forget(); err != nil {
		return fmt.Errorf("delete the keys: %w", err)
	}
	return notJoined("; the keys that it drew for that are deleted")
}

func notJoined(more string) error {
	return fail(Refused, "", "this machine has not joined a mesh%s", more)
}

func (s store) notTold(err error) error {
	kind, hint := KindOf(serverError(err, "the server")), "to leave all the same, and be listed there for ever: "+s.leaveCommand()+" --offline"
	if kind == Unreachable {
		hint = "run it again when the server is reached; " + hint
	}
	return fail(kind, hint, "the server was not told, so nothing is deleted: %s", troubleText(err))
}

// tellServer revokes this device.
func (s store) tellServer(ctx context.Context, cfg Config, k *keys, m *membership) error {
	doc, err := revocation(k, m)
	if err != nil {
		return err
	}
	mesh, err := trust.NewMesh(m.TrustHash, m.Genesis, m.State)
	if err != nil {
		return fmt.Errorf("verify the mesh: %w", err)
	}
	var set settings
	if _, err := s.load(settingsFile, &set); err != nil {
		cfg.Log.Warn("saved settings not used", "err", err)
	}
	proxy, err := parseProxy(set.Proxy)
	if err != nil {
		cfg.Log.Warn("saved proxy not used", "err", err)
	}
	c := control{
		device:  k.Device,
		proxy:   proxy,
		servers: func() []string { return serverList(set.Server, m.Servers, mesh.State().Servers) },
		verify:  pinned(mesh),
		log:     cfg.Log,
	}
	ctx, cancel := context.WithTimeout(ctx, leaveWait)
	defer cancel()
	return c.once(ctx, func(ctx context.Context, conn *coord.Conn) error {
		return conn.Revoke(ctx, coord.RevokeRequest{Revocation: doc})
	})
}

func revocation(k *keys, m *membership) (trust.Document, error) {
	cert, err := ownCert(m)
	if err != nil {
		return nil, err
	}
	if len(k.Device) != ed25519.PrivateKeySize || publicOf(k.Device) != cert.Device {
		return nil, errors.New("the key of this device is missing")
	}
	doc, err := trust.SignRevocation(trust.Revocation{
		Target: cert.Device, By: cert.Device, From: time.Now().UTC().Truncate(time.Second),
	}, k.Device)
	if err != nil {
		return nil, fmt.Errorf("sign the revocation: %w", err)
	}
	return doc, nil
}
