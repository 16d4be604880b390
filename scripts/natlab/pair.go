package natlab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/overlay"
)

const (
	pairCommand = 30 * time.Second
	pairPoll    = 10 * time.Millisecond
	// pairPast is for how long a run goes on after its bar, so that the table says
	// whether a pair is late or never comes; relayWatch how long one is looked at
	// that is to stay at a relay.
	pairPast   = 3 * time.Second
	relayWatch = 4 * time.Second
	// pairDrained is how long the Internet may still deliver what was sent to a
	// laptop that is down.
	pairDrained = 150 * time.Millisecond
	lossSeed    = 5
	churnPace   = 200 * time.Millisecond
	pingPace    = "0.05"
)

// Pair is a cell that was built: a lab with a server and a mesh of two laptops.
type Pair struct {
	cell Cell
	lab  *Lab
	ends [2]*pairEnd
	// routers are all there are, strangers the laptops that only make churn.
	routers   []*Home
	strangers []*Host
}

// pairEnd is a laptop that is a node.
type pairEnd struct {
	*Host
	client *overlay.Client
	addr   netip.Addr // in the mesh
}

// Build makes a lab for the cell. Of the options it takes the folder, the program
// and the log.
func (c Cell) Build(ctx context.Context, opts Options) (*Pair, error) {
	opts.Delay, opts.Loss = c.Delay, 0
	opts.IPv6 = c.One.IPv6 != "" || c.Two.IPv6 != ""
	lab, err := New(ctx, opts)
	if err != nil {
		return nil, err
	}
	p := &Pair{cell: c, lab: lab}
	if err := p.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("build %s: %w", c.Name(), err), lab.Close())
	}
	return p, nil
}

// Close removes the lab.
func (p *Pair) Close() error { return p.lab.Close() }

func (p *Pair) build(ctx context.Context) error {
	if err := p.lab.Build(ctx); err != nil {
		return err
	}
	server, err := p.lab.Server(ctx, "server")
	if err != nil {
		return err
	}
	_, invite, err := server.StartCoord(ctx)
	if err != nil {
		return err
	}
	homes, err := p.homes(ctx)
	if err != nil {
		return err
	}
	for i, name := range []string{"a", "b"} {
		host, err := homes[i].Laptop(ctx, name)
		if err != nil {
			return err
		}
		if i > 0 {
			if invite, err = p.ends[0].run(ctx, "invite"); err != nil {
				return err
			}
		}
		if p.ends[i], err = join(ctx, host, strings.TrimSpace(invite)); err != nil {
			return err
		}
	}
	if p.cell.Together == SameNAT {
		if err := homes[0].Isolate(ctx, p.ends[0].Host, p.ends[1].Host); err != nil {
			return err
		}
	}
	// Joining is not what is measured.
	p.lab.line.set(Line{Delay: p.lab.opts.Delay, Loss: p.cell.Loss, Seed: lossSeed})
	return p.addStrangers(ctx, homes)
}

func (p *Pair) addStrangers(ctx context.Context, homes [2]*Home) error {
	if p.cell.Churn == 0 {
		return nil
	}
	for i, h := range homes {
		s, err := h.Laptop(ctx, fmt.Sprintf("stranger%d", i))
		if err != nil {
			return err
		}
		p.strangers = append(p.strangers, s)
	}
	return nil
}

// homes makes those of both laptops, which may be one.
func (p *Pair) homes(ctx context.Context) (homes [2]*Home, err error) {
	var carrier *Home
	for i, place := range []Place{p.cell.One, p.cell.Two} {
		if i > 0 && (p.cell.Together == SameLAN || p.cell.Together == SameNAT) {
			homes[1] = homes[0]
			break
		}
		if p.cell.Together != SameCarrier {
			carrier = nil
		}
		if place.Carrier != "" {
			if carrier, err = p.lab.Carrier(ctx, fmt.Sprintf("carrier%d", i), place.Carrier); err != nil {
				return homes, err
			}
			p.routers = append(p.routers, carrier)
		}
		if homes[i], err = p.home(ctx, fmt.Sprintf("home%d", i), place, carrier); err != nil {
			return homes, err
		}
		p.routers = append(p.routers, homes[i])
	}
	return homes, nil
}

// home makes that of one laptop.
func (p *Pair) home(ctx context.Context, name string, place Place, carrier *Home) (*Home, error) {
	if place.Mapping != "" {
		return p.lab.HardHome(ctx, name, place.Mapping, carrier)
	}
	prefix, err := place.prefix()
	if err != nil {
		return nil, err
	}
	return p.lab.HomeAt(ctx, name, Site{NAT: place.NAT, LAN: prefix, Carrier: carrier, IPv6: place.IPv6})
}

func join(ctx context.Context, h *Host, invite string) (*pairEnd, error) {
	e := &pairEnd{Host: h, client: overlay.NewClient(h.socket())}
	if _, err := e.run(ctx, "up", invite); err != nil {
		return nil, err
	}
	st, err := e.client.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("status of %s: %w", h.name, err)
	}
	e.addr = st.Self.IPv4
	return e, nil
}

// socket is the daemon's socket as seen from outside of the machine.
func (h *Host) socket() string {
	return fmt.Sprintf("/proc/%d/root%s", h.pid, overlay.DefaultSocket)
}

// run runs a verb of the program to its end.
func (e *pairEnd) run(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, pairCommand)
	defer cancel()
	out, err := e.Overlay(ctx, args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("overlay %s on %s: %w", args[0], e.name, err)
	}
	return string(out), nil
}

// pathTo is how the node reaches the other one.
func (e *pairEnd) pathTo(ctx context.Context, other *pairEnd) (overlay.PathStatus, error) {
	st, err := e.client.Status(ctx)
	if err != nil {
		return overlay.PathStatus{}, fmt.Errorf("status of %s: %w", e.name, err)
	}
	for _, p := range st.Peers {
		if p.IPv4 == other.addr {
			return p.Path, nil
		}
	}
	return overlay.PathStatus{}, nil
}

// stop takes both nodes down, has all routers forget what they know, and the counters
// begin.
func (p *Pair) stop(ctx context.Context) error {
	if err := p.both(func(e *pairEnd) error { _, err := e.run(ctx, "down"); return err }); err != nil {
		return err
	}
	time.Sleep(pairDrained)
	for _, r := range p.routers {
		if err := r.Reboot(ctx); err != nil {
			return err
		}
	}
	return p.both(func(e *pairEnd) error { return e.startCounting(ctx) })
}

// start has both nodes connect, the second after the skew.
func (p *Pair) start(ctx context.Context, skew time.Duration) error {
	var g errgroup.Group
	for i, e := range p.ends {
		g.Go(func() error {
			time.Sleep(time.Duration(i) * skew)
			_, err := e.run(ctx, "up")
			return err
		})
	}
	return g.Wait()
}

func (p *Pair) both(do func(*pairEnd) error) error {
	var g errgroup.Group
	for _, e := range p.ends {
		g.Go(func() error { return do(e) })
	}
	return g.Wait()
}
