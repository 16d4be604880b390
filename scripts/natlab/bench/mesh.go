package main

import (
	"context"
	"fmt"

	"overlay/scripts/natlab"
)

const (
	// offloadsEnv and noLarge make an overlay speak the plain format.
	offloadsEnv = "OVERLAY_OFFLOADS"
	noLarge     = "-large"
	// profileEnv is of programs built with -tags profile.
	profileEnv = "OVERLAY_PROFILE"
)

// mesh makes a mesh of the hosts, with a server of its own, as a user does.
func (b *bench) mesh(ctx context.Context, t *tunnel, l layout) error {
	if err := b.lab.Build(ctx); err != nil {
		return err
	}
	server, err := b.lab.Server(ctx, t.name+"-server")
	if err != nil {
		return err
	}
	coord, invite, err := server.StartCoord(ctx)
	if err != nil {
		return err
	}
	t.server = coord.PID()
	if err := b.restrict(ctx, t); err != nil {
		return err
	}
	for i, h := range t.hosts {
		if i > 0 {
			if invite, err = output(t.hosts[0].Overlay(ctx, "invite")); err != nil {
				return err
			}
		}
		up := h.Overlay(ctx, "up", "--mtu", fmt.Sprint(b.opts.mtu), invite)
		if t.name == variantPlain {
			up.Env = append(up.Env, offloadsEnv+"="+noLarge)
		}
		if len(l.profiles) > 0 {
			up.Env = append(up.Env, profileEnv+"="+l.profiles[i])
		}
		if _, err := output(up); err != nil {
			return err
		}
	}
	if err := t.addresses(ctx); err != nil {
		return err
	}
	return t.findDaemons(ctx, "overlay")
}

// addresses waits until the first host reaches the others as it should, and
// notes what it says of them.
func (t *tunnel) addresses(ctx context.Context) error {
	if err := t.awaitWay(ctx); err != nil {
		return err
	}
	status, err := t.hosts[0].Status(ctx)
	if err != nil {
		return err
	}
	t.add(status.Self)
	for _, h := range t.hosts[1:] {
		peer, err := status.Peer(h.Name())
		if err != nil {
			return err
		}
		t.add(peer.StatusNode)
	}
	return nil
}

func (t *tunnel) add(n natlab.StatusNode) {
	t.addrs, t.addrs6 = append(t.addrs, n.IPv4), append(t.addrs6, n.IPv6)
}

// findDaemons looks up the daemons by the name of their program.
func (t *tunnel) findDaemons(ctx context.Context, program string) error {
	for _, h := range t.hosts {
		space, err := output(h.Command(ctx, "readlink", "/proc/self/ns/net"))
		if err != nil {
			return err
		}
		pid, err := findProcess(space, program)
		if err != nil {
			return err
		}
		t.pids = append(t.pids, pid)
	}
	return nil
}
