package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The ways whose tunnels the verb relay compares. Those by a relay are called
// as the status of a node calls them.
const (
	variantDirect   = "direct"
	variantRelayUDP = "relay-udp"
	variantRelayTLS = "relay-tls"
)

const (
	sideMbps  = 100
	sideSize  = 1200
	sidePause = 2 * time.Millisecond
	sideDrain = 2 * time.Second

	wayWait  = 30 * time.Second
	wayPause = 100 * time.Millisecond
)

func relayVariants() list { return list{variantDirect, variantRelayUDP, variantRelayTLS} }

// relayCases are what the verb relay measures.
func (b *bench) relayCases() []testCase {
	return []testCase{
		b.tcp(flowCase{name: "tcp1", prefix: "tcp1", label: "TCP 1 stream, BBR", congestion: bbr, server: true}),
		b.pingIdle(),
		b.pingLoad("ping-bbr", "pingLoad", "BBR", bbr),
		b.slowReader(),
	}
}

// compareRelay compares a direct path with one by the server over UDP and one
// by it over TLS, between hosts with public addresses.
func compareRelay(ctx context.Context, o *options) error {
	return compareCases(ctx, o, layout{peers: 2}, (*bench).relayCases)
}

// restrict leaves a tunnel the way it is to measure, and no other.
func (b *bench) restrict(ctx context.Context, t *tunnel) error {
	for i, one := range t.hosts {
		if t.name == variantRelayTLS {
			if err := b.lab.BlockUDP(ctx, one.Addr()); err != nil {
				return err
			}
		}
		for _, two := range t.hosts[:i] {
			if t.name != variantRelayUDP && t.name != variantRelayTLS {
				continue
			}
			if err := b.lab.Cut(ctx, one.Addr(), two.Addr()); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitWay waits until every host reaches the first, and it them, the way that
// is to be measured.
func (t *tunnel) awaitWay(ctx context.Context) error {
	for i := range t.hosts[1:] {
		for _, ends := range [][2]int{{0, i + 1}, {i + 1, 0}} {
			if err := t.awaitOne(ctx, ends[0], ends[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *tunnel) awaitOne(ctx context.Context, from, to int) error {
	kind, via := "direct", ""
	if t.name == variantRelayUDP || t.name == variantRelayTLS {
		kind, via = "relay", t.name
	}
	for start := time.Now(); ; {
		// A ping is traffic, which has the nodes look for a path.
		_, pinged := output(t.hosts[from].Overlay(ctx, "ping", "-c", "1", t.hosts[to].Name()))
		status, err := t.hosts[from].Status(ctx)
		if err != nil {
			return err
		}
		peer, err := status.Peer(t.hosts[to].Name())
		if err == nil && pinged == nil && peer.Path.Kind == kind && (via == "" || peer.Path.Via == via) {
			return nil
		}
		if ctx.Err() != nil || time.Since(start) > wayWait {
			return errors.Join(fmt.Errorf("the path from %s to %s is %+v, not %s", t.hosts[from].Name(), t.hosts[to].Name(), peer.Path, t.name), pinged, err)
		}
		time.Sleep(wayPause)
	}
}

// slowReader measures a stream to one peer while UDP goes to another, first as
// it should, and then with that one's daemon stopped, so that what is for it
// piles up wherever it can.
func (b *bench) slowReader() testCase {
	const (
		reads   metric = "besideReaderGbps"
		stopped metric = "besideStoppedGbps"
	)
	rows := []row{
		{reads, fmt.Sprintf("TCP beside %d Mbit/s to another peer, Gbit/s", sideMbps)},
		{stopped, "  with that peer's daemon stopped, Gbit/s"},
	}
	run := func(ctx context.Context, t *tunnel, s sample) (err error) {
		if s[reads], err = b.besideSide(ctx, t); err != nil {
			return err
		}
		slow := t.pids[2]
		if err := unix.Kill(slow, unix.SIGSTOP); err != nil {
			return fmt.Errorf("stop process %d: %w", slow, err)
		}
		s[stopped], err = b.besideSide(ctx, t)
		if err := errors.Join(err, unix.Kill(slow, unix.SIGCONT)); err != nil {
			return err
		}
		time.Sleep(sideDrain)
		return t.awaitOne(ctx, 0, 2)
	}
	return testCase{"slow-reader", bbr, rows, run}
}

// besideSide is the speed of a stream to the first peer beside UDP to the
// second.
func (b *bench) besideSide(ctx context.Context, t *tunnel) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, fmt.Errorf("find own program: %w", err)
	}
	var r iperfResult
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := output(t.hosts[0].Command(ctx, self, verbPour,
			"-to", t.addrs[2].String(), "-mbps", fmt.Sprint(sideMbps), "-for", (time.Duration(b.opts.seconds) * time.Second).String()))
		return err
	})
	g.Go(func() (err error) {
		r, err = b.stream(t, 1).iperf(ctx, "-C", bbr)
		return err
	})
	err = g.Wait()
	return r.End.SumReceived.BitsPerSecond / gigabyte, err
}

// pour is all that the copy inside a host does: it sends UDP at a steady pace to
// a port where nobody need listen.
func pour(ctx context.Context, o *options) error {
	addr, err := netip.ParseAddr(o.to)
	if err != nil {
		return fmt.Errorf("parse address to send to: %w", err)
	}
	const discard = 9 // RFC 863
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, discard)))
	if err != nil {
		return fmt.Errorf("open socket to send from: %w", err)
	}
	defer c.Close()
	packet := make([]byte, sideSize)
	perSecond := float64(o.mbps) * megabyte / 8 / sideSize
	sent, start := 0, time.Now()
	for ctx.Err() == nil && time.Since(start) < o.wait {
		for due := int(time.Since(start).Seconds() * perSecond); sent < due; sent++ {
			// What comes back when nobody listens is an error of a later write.
			_, _ = c.Write(packet)
		}
		time.Sleep(sidePause)
	}
	return ctx.Err()
}
