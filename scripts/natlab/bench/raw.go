package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"overlay/scripts/natlab"
)

const (
	rawDevice    = "wg0"
	rawPort      = 51820
	rawKeepalive = 25
)

// raw makes a tunnel of wireguard-go as its manual says. The first host knows
// where the others are, and they learn it from its first packet, so that it
// may be behind a NAT.
func (b *bench) raw(ctx context.Context, t *tunnel, l layout) error {
	keys := make([]wgtypes.Key, len(t.hosts))
	for i := range t.hosts {
		var err error
		if keys[i], err = wgtypes.GeneratePrivateKey(); err != nil {
			return fmt.Errorf("make key: %w", err)
		}
		t.addrs = append(t.addrs, netip.AddrFrom4([4]byte{10, 98, 0, byte(i + 1)}))
		t.addrs6 = append(t.addrs6, netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x98, 15: byte(i + 1)}))
	}
	for i, h := range t.hosts {
		profile := ""
		if len(l.profiles) > 0 {
			profile = l.profiles[i]
		}
		pid, err := b.startRaw(ctx, h, profile)
		if err != nil {
			return err
		}
		t.pids = append(t.pids, pid)
	}
	// The first is the last, because it begins to talk at once.
	for i := range slices.Backward(t.hosts) {
		if err := b.setRaw(ctx, t, i, keys); err != nil {
			return err
		}
	}
	return nil
}

// startRaw gives the process id of the daemon.
func (b *bench) startRaw(ctx context.Context, h *natlab.Host, profile string) (int, error) {
	daemon := h.Command(context.WithoutCancel(ctx), b.opts.wireguard, "-f", rawDevice)
	daemon.Env = append(daemon.Env, "LOG_LEVEL=error", profileEnv+"="+profile)
	if err := daemon.Start(); err != nil {
		return 0, fmt.Errorf("start wireguard-go on %s: %w", h.Name(), err)
	}
	// The lab ends it; it needs no Wait, because this program ends as well.
	return daemon.Process.Pid, nil
}

// setRaw gives one host's interface its key, addresses and peers.
func (b *bench) setRaw(ctx context.Context, t *tunnel, host int, keys []wgtypes.Key) error {
	set := []string{fmt.Sprintf("wg set %s private-key /dev/stdin listen-port %d", rawDevice, rawPort)}
	for i, key := range keys {
		if i == host || i > 0 && host > 0 {
			continue
		}
		set = append(set, fmt.Sprintf("peer %s allowed-ips %s/32,%s/128", key.PublicKey(), t.addrs[i], t.addrs6[i]))
		if host == 0 {
			set = append(set, fmt.Sprintf("endpoint %s:%d persistent-keepalive %d", t.hosts[i].Addr(), rawPort, rawKeepalive))
		}
	}
	script := fmt.Sprintf(`
		n=0
		until wg show %[1]s >/dev/null 2>&1; do
			n=$((n + 1)); [ $n -lt 100 ]; sleep 0.05
		done
		%[2]s
		ip link set %[1]s mtu %[3]d
		ip addr add %[4]s/24 dev %[1]s
		[ %[3]d -lt 1280 ] || ip -6 addr add %[5]s/64 dev %[1]s nodad
		ip link set %[1]s up`,
		rawDevice, strings.Join(set, " "), b.opts.mtu, t.addrs[host], t.addrs6[host])
	cmd := t.hosts[host].Command(ctx, "/bin/sh", "-ec", script)
	cmd.Stdin = strings.NewReader(keys[host].String() + "\n")
	_, err := output(cmd)
	return err
}
