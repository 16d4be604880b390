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

	"overlay/scripts/natlab"
)

const (
	readyWait  = 15 * time.Second
	readyPause = 100 * time.Millisecond
	iperfPort  = 5201
	sidePort   = 5202 // of measurements beside another
)

// layout is the network a tunnel is measured in: one host that sends, and its
// peers.
type layout struct {
	peers int
	nat   bool // the host that sends is behind one
	ipv6  bool // measurements inside the tunnel use IPv6, too
	side  bool // measurements run beside another
	// profiles are files for the CPU profiles of the daemons, if any.
	profiles []string
}

// tunnel is one way from the first of some hosts to the others.
type tunnel struct {
	name  string
	hosts []*natlab.Host
	// addrs and addrs6 are the addresses inside, pids the daemons, both of
	// each host.
	addrs, addrs6 []netip.Addr
	pids          []int
	server        int // the process of its server; 0 is none
}

// build makes every variant its own hosts and its own tunnel, all alike.
func (b *bench) build(ctx context.Context, l layout) error {
	for _, variant := range b.opts.variants {
		t, err := b.open(ctx, variant, l)
		if err != nil {
			return err
		}
		b.tunnels = append(b.tunnels, t)
	}
	return nil
}

// open makes one variant's hosts and tunnel.
func (b *bench) open(ctx context.Context, variant string, l layout) (*tunnel, error) {
	b.say("building %s between %d hosts", variant, 1+l.peers)
	t := &tunnel{name: variant}
	if err := b.addHosts(ctx, t, l); err != nil {
		return nil, err
	}
	start := b.mesh
	if variant == variantRaw || variant == variantControl {
		start = b.raw
	}
	if err := start(ctx, t, l); err != nil {
		return nil, fmt.Errorf("start %s: %w", variant, err)
	}
	if err := b.ready(ctx, t, l); err != nil {
		return nil, fmt.Errorf("start %s: %w", variant, err)
	}
	return t, nil
}

func (b *bench) addHosts(ctx context.Context, t *tunnel, l layout) error {
	for i := range 1 + l.peers {
		var h *natlab.Host
		var err error
		name := fmt.Sprintf("%s-%c", t.name, 'a'+i)
		if i == 0 && l.nat {
			h, err = b.laptop(ctx, name)
		} else {
			h, err = b.lab.Server(ctx, name)
		}
		if err != nil {
			return err
		}
		// What one stream learned of the way must not slow the next down.
		if _, err := output(h.Command(ctx, "/bin/sh", "-c", "echo 1 >/proc/sys/net/ipv4/tcp_no_metrics_save")); err != nil {
			return err
		}
		t.hosts = append(t.hosts, h)
	}
	return nil
}

func (b *bench) laptop(ctx context.Context, name string) (*natlab.Host, error) {
	home, err := b.lab.Home(ctx, name+"-home", natlab.Masquerade)
	if err != nil {
		return nil, err
	}
	return home.Laptop(ctx, name)
}

// ready starts the other side of the measurements and waits until packets
// pass.
func (b *bench) ready(ctx context.Context, t *tunnel, l layout) error {
	for i := range l.peers {
		for _, s := range b.streams(t, i+1, l) {
			server := []string{"-s", "-B", s.to.String(), "-p", fmt.Sprint(s.port)}
			if _, err := t.hosts[i+1].Start(context.WithoutCancel(ctx), nil, "iperf3", server...); err != nil {
				return err
			}
			if err := s.await(ctx); err != nil {
				return fmt.Errorf("wait for packets to %s: %w", s.to, err)
			}
		}
	}
	return nil
}

// streams are all that a layout wants to be possible to one peer.
func (b *bench) streams(t *tunnel, peer int, l layout) []stream {
	s := b.stream(t, peer)
	all := []stream{s}
	if l.ipv6 {
		six := s
		six.from, six.to = t.addrs6[0], t.addrs6[peer]
		all = append(all, six)
	}
	if l.side {
		side := s
		side.port = sidePort
		all = append(all, side)
	}
	return all
}

// await tries until a little of a stream arrives.
func (s stream) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	s.seconds = 0
	for {
		_, err := s.iperf(ctx, "-n", "100K")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
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
	return strings.TrimSpace(out.String()), nil
}
