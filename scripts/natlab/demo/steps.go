package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"overlay/scripts/natlab"
)

const (
	device       = "overlay0"
	invitePrefix = "ovl1_"
)

const topology = `   server ───────── Internet, 20 ms one way ─────────┐
                    │                                │
               home-a (NAT)                     home-b (NAT)
                    │                                │
                laptop-a                         laptop-b`

// demo is the cast: machines, and what the commands told so far.
type demo struct {
	lab    *natlab.Lab
	screen *screen

	server, a, b *natlab.Host
	homeA, homeB *natlab.Home

	ownerInvite, invite string
	addrA, addrB        netip.Addr
}

func (d *demo) buildNetwork(ctx context.Context) error {
	d.screen.step("A small Internet is built from Linux network namespaces and nftables.")
	fmt.Fprintln(d.screen.out, topology)
	if err := d.lab.Build(ctx); err != nil {
		return err
	}
	var err error
	if d.server, err = d.lab.Server(ctx, "server"); err != nil {
		return err
	}
	if d.homeA, d.a, err = d.family(ctx, "a"); err != nil {
		return err
	}
	if d.homeB, d.b, err = d.family(ctx, "b"); err != nil {
		return err
	}
	return d.b.StartSSHD(ctx)
}

func (d *demo) family(ctx context.Context, letter string) (*natlab.Home, *natlab.Host, error) {
	home, err := d.lab.Home(ctx, "home-"+letter, natlab.Masquerade)
	if err != nil {
		return nil, nil, err
	}
	laptop, err := home.Laptop(ctx, "laptop-"+letter)
	return home, laptop, err
}

func (d *demo) probeHomes(ctx context.Context) error {
	d.screen.step("Are the laptops really hidden? An independent probe looks at both networks.")
	if err := d.probe(ctx, d.homeA, d.a); err != nil {
		return err
	}
	if err := d.probe(ctx, d.homeB, d.b); err != nil {
		return err
	}
	fmt.Fprintln(d.screen.out, "   Nobody can send to either laptop first.")
	return nil
}

func (d *demo) probe(ctx context.Context, home *natlab.Home, laptop *natlab.Host) error {
	seen, err := laptop.Probe(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.screen.out, "   %s has %s; the world sees %s; mapping %s, filtering %s\n",
		laptop.Name(), laptop.Addr(), seen.Public, seen.Mapping, seen.Filtering)
	if seen.Public != home.WAN() || seen.Filtering != natlab.AddressAndPortDependent {
		return fmt.Errorf("%s is not behind the NAT it should be behind: %+v", laptop.Name(), seen)
	}
	return nil
}

func (d *demo) startServer(ctx context.Context) error {
	d.screen.step("The first line: on the server. It prints the owner's invite.")
	d.screen.typed(d.server, "overlay", "coord", "--public", d.server.Addr().String())
	_, invite, err := d.server.StartCoord(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.screen, "%s\n", invite)
	d.ownerInvite = invite
	return checkInvite(invite)
}

func checkInvite(text string) error {
	if !strings.HasPrefix(text, invitePrefix) {
		return fmt.Errorf("%q is not an invite", text)
	}
	return nil
}

func (d *demo) joinFirst(ctx context.Context) error {
	d.screen.step("The second line: on the first laptop. It prints an invite for the next.")
	out, err := d.overlay(ctx, d.a, "up", d.ownerInvite)
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	d.invite = lines[len(lines)-1]
	return checkInvite(d.invite)
}

func (d *demo) joinSecond(ctx context.Context) error {
	d.screen.step("The third line: on the second laptop, with the invite from the first.")
	_, err := d.overlay(ctx, d.b, "up", d.invite)
	return err
}

func (d *demo) overlay(ctx context.Context, host *natlab.Host, args ...string) (string, error) {
	return d.screen.run(host, host.Overlay(ctx, args...), append([]string{"overlay"}, args...)...)
}

func (d *demo) command(ctx context.Context, host *natlab.Host, args ...string) (string, error) {
	return d.screen.run(host, host.Command(ctx, args[0], args[1:]...), args...)
}

func (d *demo) showStatus(ctx context.Context) error {
	d.screen.step("The mesh, seen from the first laptop.")
	if _, err := d.overlay(ctx, d.a, "status"); err != nil {
		return err
	}
	status, err := d.a.Status(ctx)
	if err != nil {
		return err
	}
	peer, err := status.Peer(d.b.Name())
	if err != nil {
		return err
	}
	if !status.Self.Online || !peer.Online {
		return fmt.Errorf("not online: this node %v, peer %v", status.Self.Online, peer.Online)
	}
	d.addrA, d.addrB = status.Self.IPv4, peer.IPv4
	return nil
}

func (d *demo) ping(ctx context.Context) error {
	d.screen.step("Ping until packets go straight from NAT to NAT, past the server.")
	if _, err := d.overlay(ctx, d.a, "ping", d.b.Name(), "--until-direct"); err != nil {
		return err
	}
	status, err := d.a.Status(ctx)
	if err != nil {
		return err
	}
	peer, err := status.Peer(d.b.Name())
	if err != nil {
		return err
	}
	endpoint, err := netip.ParseAddrPort(peer.Path.Endpoint)
	if err != nil {
		return fmt.Errorf("path of %s: %w", peer.Name, err)
	}
	if peer.Path.Kind != "direct" || endpoint.Addr() != d.homeB.WAN() {
		return fmt.Errorf("path is %+v, not a direct one to %s", peer.Path, d.homeB.WAN())
	}
	return nil
}

func (d *demo) showWireGuard(ctx context.Context) error {
	d.screen.step("WireGuard's own tool shows the punched endpoint: %s is the router of the other home.", d.homeB.WAN())
	out, err := d.command(ctx, d.a, "wg", "show", device)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "endpoint: "+d.homeB.WAN().String()+":") {
		return errors.New("wg show does not list the punched endpoint")
	}
	return nil
}

func (d *demo) ssh(ctx context.Context) error {
	d.screen.step("And what it is for: the system's ssh to the other laptop's overlay address.")
	remote := fmt.Sprintf("hostname; echo $SSH_CONNECTION; ip route get %s", d.addrA)
	out, err := d.command(ctx, d.a, "ssh", "-o", "HostKeyAlias="+d.b.Name(), d.addrB.String(), remote)
	if err != nil {
		return err
	}
	for what, want := range map[string]string{
		"host name":  d.b.Name() + "\n",
		"connection": d.addrA.String() + " ",
		"route":      "dev " + device,
	} {
		if !strings.Contains(out, want) {
			return fmt.Errorf("the %s over ssh is not the expected %q", what, want)
		}
	}
	return nil
}
