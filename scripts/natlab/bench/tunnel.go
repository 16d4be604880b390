package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"overlay/scripts/natlab"
)

const (
	readyWait  = 15 * time.Second
	readyPause = 100 * time.Millisecond
	rawPort    = 51820
)

// tunnel is one way from host a to host b.
type tunnel struct {
	name         string
	addrA, addrB netip.Addr
	// pids are the two daemons, on a and on b.
	pids [2]int
}

// build makes the two hosts and the two tunnels between them.
func (b *bench) build(ctx context.Context) error {
	b.say("building two public hosts, the overlay and raw wireguard-go between them")
	var err error
	if b.a, err = b.lab.Server(ctx, "a"); err != nil {
		return err
	}
	if b.b, err = b.lab.Server(ctx, "b"); err != nil {
		return err
	}
	first := b.overlay
	if b.opts.control {
		first = func(ctx context.Context) (*tunnel, error) { return b.raw(ctx, "control", 2) }
	}
	for _, make := range []func(context.Context) (*tunnel, error){
		first,
		func(ctx context.Context) (*tunnel, error) { return b.raw(ctx, "raw", 1) },
	} {
		t, err := make(ctx)
		if err != nil {
			return err
		}
		if err := b.ready(ctx, t); err != nil {
			return fmt.Errorf("start %s: %w", t.name, err)
		}
		b.tunnels = append(b.tunnels, t)
	}
	return nil
}

// overlay makes a mesh of the two hosts as a user does.
func (b *bench) overlay(ctx context.Context) (*tunnel, error) {
	if err := b.lab.Build(ctx); err != nil {
		return nil, err
	}
	server, err := b.lab.Server(ctx, "server")
	if err != nil {
		return nil, err
	}
	_, invite, err := server.StartCoord(ctx)
	if err != nil {
		return nil, err
	}
	for _, h := range []*natlab.Host{b.a, b.b} {
		out, err := output(h.Overlay(ctx, "up", "--mtu", fmt.Sprint(b.opts.mtu), invite))
		if err != nil {
			return nil, err
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		invite = lines[len(lines)-1]
	}
	if _, err := output(b.a.Overlay(ctx, "ping", b.b.Name(), "--until-direct")); err != nil {
		return nil, err
	}
	status, err := b.a.Status(ctx)
	if err != nil {
		return nil, err
	}
	peer, err := status.Peer(b.b.Name())
	if err != nil {
		return nil, err
	}
	if peer.Path.Kind != "direct" {
		return nil, fmt.Errorf("the path of the overlay is %s, not direct", peer.Path.Kind)
	}
	t := &tunnel{name: "overlay", addrA: status.Self.IPv4, addrB: peer.IPv4}
	return t, b.findDaemons(ctx, t, "overlay")
}

// raw makes a tunnel of wireguard-go as its manual says. Tunnels that exist at
// the same time differ in their number.
func (b *bench) raw(ctx context.Context, name string, number int) (*tunnel, error) {
	t := &tunnel{
		name:  name,
		addrA: netip.AddrFrom4([4]byte{10, 98, byte(number), 1}),
		addrB: netip.AddrFrom4([4]byte{10, 98, byte(number), 2}),
	}
	keyA, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	keyB, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	end := rawEnd{device: fmt.Sprintf("wg%d", number), port: rawPort + number, mtu: b.opts.mtu}
	end.key, end.addr, end.peer, end.peerAddr, end.peerHost = keyA, t.addrA, keyB.PublicKey(), t.addrB, b.b.Addr()
	if t.pids[0], err = b.startRaw(ctx, b.a, end); err != nil {
		return nil, err
	}
	end.key, end.addr, end.peer, end.peerAddr, end.peerHost = keyB, t.addrB, keyA.PublicKey(), t.addrA, b.a.Addr()
	if t.pids[1], err = b.startRaw(ctx, b.b, end); err != nil {
		return nil, err
	}
	return t, nil
}

// rawEnd is what one end of a raw tunnel is told.
type rawEnd struct {
	device    string
	port, mtu int
	key, peer wgtypes.Key

	addr, peerAddr, peerHost netip.Addr
}

// startRaw gives the process id of the daemon.
func (b *bench) startRaw(ctx context.Context, h *natlab.Host, end rawEnd) (int, error) {
	daemon := h.Command(context.WithoutCancel(ctx), b.opts.wireguard, "-f", end.device)
	daemon.Env = append(daemon.Env, "LOG_LEVEL=error")
	if err := daemon.Start(); err != nil {
		return 0, fmt.Errorf("start wireguard-go on %s: %w", h.Name(), err)
	}
	// The lab ends it; it needs no Wait, because this program ends as well.
	setUp := h.Command(ctx, "/bin/sh", "-ec", fmt.Sprintf(`
		n=0
		until wg show %[1]s >/dev/null 2>&1; do
			n=$((n + 1)); [ $n -lt 100 ]; sleep 0.05
		done
		wg set %[1]s private-key /dev/stdin listen-port %[2]d \
			peer %[3]s endpoint %[4]s:%[2]d allowed-ips %[5]s/32
		ip addr add %[6]s/24 dev %[1]s
		ip link set %[1]s mtu %[7]d up`,
		end.device, end.port, end.peer, end.peerHost, end.peerAddr, end.addr, end.mtu))
	setUp.Stdin = strings.NewReader(end.key.String() + "\n")
	if _, err := output(setUp); err != nil {
		return 0, err
	}
	return daemon.Process.Pid, nil
}

// findDaemons looks up the daemons of a tunnel by the name of their program.
func (b *bench) findDaemons(ctx context.Context, t *tunnel, program string) error {
	for i, h := range []*natlab.Host{b.a, b.b} {
		space, err := output(h.Command(ctx, "readlink", "/proc/self/ns/net"))
		if err != nil {
			return err
		}
		if t.pids[i], err = findProcess(strings.TrimSpace(space), program); err != nil {
			return err
		}
	}
	return nil
}

// ready starts the other side of the measurements and waits until packets
// pass.
func (b *bench) ready(ctx context.Context, t *tunnel) error {
	if _, err := b.b.Start(context.WithoutCancel(ctx), nil, "iperf3", "-s", "-B", t.addrB.String()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	for {
		_, err := b.iperf(ctx, t, "-n", "100K")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for packets through %s: %w", t.name, errors.Join(ctx.Err(), err))
		case <-time.After(readyPause):
		}
	}
}

// output runs a program and gives what it prints; its error has what it
// complained about.
func output(cmd *exec.Cmd) (string, error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("run %s: %w: %s", cmd, err, bytes.TrimSpace(append(complaint.Bytes(), out.Bytes()...)))
	}
	return out.String(), nil
}
