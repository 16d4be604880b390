package overlay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

// Leave revokes this device, deletes its keys and ends Run. The error says
// that the server could not be told; the keys are gone all the same.
func (n *Node) Leave(ctx context.Context, r LeaveRequest) error {
	n.up.Lock()
	defer n.up.Unlock()
	if err := n.store.mayLeave(r); err != nil {
		return err
	}
	if n.current() != nil {
		n.endSession() // it would save its netmap again
	}
	err := n.store.leave(ctx, n.cfg)
	n.Down()
	return err
}

// leaveWait bounds how long leaving tries to tell the server.
const leaveWait = 5 * time.Second

// Leave gives up the identity in a state directory that no daemon uses.
func Leave(ctx context.Context, cfg Config, r LeaveRequest) error {
	cfg.setDefaults()
	st := store{cfg.StateDir}
	if err := st.open(); err != nil && KindOf(err) == Permission {
		return err
	}
	unlock, err := st.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := st.mayLeave(r); err != nil {
		return err
	}
	return st.leave(ctx, cfg)
}

// mayLeave keeps the founder from deleting the mesh's root key unawares while
// there are other members. State that is damaged decides nothing.
func (s store) mayLeave(r LeaveRequest) error {
	var k keys
	var c cache
	_, _ = s.load(keysFile, &k)
	_, _ = s.load(netmapFile, &c)
	if r.ForgetRoot || len(k.Root) == 0 || len(c.Nodes) == 0 {
		return nil
	}
	return fail(Failure, "copy "+s.dir+" to a safe place first, then: overlay leave --forget-root",
		"this machine holds the only root key of the mesh: without it nobody can ever be invited again")
}

func (s store) leave(ctx context.Context, cfg Config) error {
	var k keys
	var m membership
	hadKeys, keyErr := s.load(keysFile, &k)
	joined, meshErr := s.load(meshFile, &m)
	if !hadKeys && !joined && keyErr == nil && meshErr == nil {
		return fail(Refused, "", "this machine has not joined a mesh")
	}
	told := errors.Join(keyErr, meshErr)
	if told == nil && joined {
		ctx, cancel := context.WithTimeout(ctx, leaveWait)
		defer cancel()
		told = revokeSelf(ctx, &k, &m, cfg)
	}
	if err := s.forget(); err != nil {
		return fmt.Errorf("delete the keys: %w", err)
	}
	if told != nil {
		return fail(Unreachable, "", "left, and the keys are deleted, but the server was not told (%s); it lists this machine as offline", troubleText(told))
	}
	return nil
}

func revokeSelf(ctx context.Context, k *keys, m *membership, cfg Config) error {
	cert, err := ownCert(m)
	if err != nil {
		return err
	}
	doc, err := trust.SignRevocation(trust.Revocation{
		Target: cert.Device, By: cert.Device, From: time.Now().UTC().Truncate(time.Second),
	}, k.Device)
	if err != nil {
		return fmt.Errorf("sign the revocation: %w", err)
	}
	mesh, err := trust.NewMesh(m.TrustHash, m.Genesis, m.State)
	if err != nil {
		return fmt.Errorf("verify the mesh: %w", err)
	}
	var set settings
	if _, err := (store{cfg.StateDir}).load(settingsFile, &set); err != nil {
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
	return c.once(ctx, func(ctx context.Context, conn *coord.Conn) error {
		return conn.Revoke(ctx, coord.RevokeRequest{Revocation: doc})
	})
}
