package tun

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/device"
	wgtun "golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl"
)

// MTU of an interface: below the first IPv4 is of no use (RFC 791), above the
// second a message does not fit into one UDP datagram.
const (
	minMTU = 576
	maxMTU = 65535 - 8 - 40 - 32
)

// A Device is one interface with wireguard-go, its sockets and its UAPI socket.
// Open makes it; the zero value is of no use. Methods may be called
// concurrently, but not from Config.Receive or Config.Demand. SetPeers,
// SetEndpoint, ClearEndpoint and Stats go through the UAPI socket, which Run
// serves: before Run they wait, after it they fail with ErrClosed.
type Device struct {
	config Config
	log    *slog.Logger
	peers  *peers
	bind   *bind
	tunnel *tunnel
	wg     *device.Device
	uapi   *uapi
	link   *link
	ctl    *wgctrl.Client
	starts handshakes

	mu     sync.Mutex
	known  map[Key]Peer // as last set
	failed map[Key]bool // in a set that failed: state unknown
	port   uint16       // of the sockets, when Rebind last saw them
	closed bool
}

// Open makes the interface c.Name with its addresses and routes, and starts
// wireguard-go on it, without peers. When it fails, everything made is undone.
// Errors: ErrNoTUN, ErrPermission, ErrInterfaceTaken, ErrPortTaken.
//
// The Device stays in the network namespace of the calling thread.
func Open(c Config) (*Device, error) {
	if err := checkConfig(c); err != nil {
		return nil, err
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	d := &Device{config: c, log: c.Log, known: make(map[Key]Peer), failed: make(map[Key]bool)}
	for _, step := range []func() error{d.openTUN, d.openWireGuard, d.openControl, d.openLink} {
		if err := step(); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return d, nil
}

func checkConfig(c Config) error {
	if err := checkName(c.Name); err != nil {
		return err
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return fmt.Errorf("interface %s: mtu %d: not between %d and %d", c.Name, c.MTU, minMTU, maxMTU)
	}
	if c.PrivateKey == (Key{}) {
		return fmt.Errorf("interface %s: no private key", c.Name)
	}
	return nil
}

func (d *Device) openTUN() error {
	c := d.config
	if _, err := os.Stat(tunPath); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("interface %q: %w", c.Name, ErrNoTUN)
	}
	if err := checkFree(c.Name); err != nil {
		return err
	}
	native, err := wgtun.CreateTUN(c.Name, c.MTU)
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("make interface %q: %w: %w", c.Name, ErrPermission, err)
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("make interface %q: %w: %w", c.Name, ErrNoTUN, err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make interface %q: %w: %w", c.Name, ErrInterfaceTaken, err)
	case err != nil:
		return fmt.Errorf("make interface %q: %w", c.Name, err)
	}
	d.peers = newPeers()
	d.peers.large = !c.switched(offLarge)
	d.bind = newBind(c, d.peers)
	if d.tunnel, err = newTunnel(native, d.peers, d.bind, c); err != nil {
		return errors.Join(fmt.Errorf("take over interface %q: %w", c.Name, err), native.Close())
	}
	if c.Processors {
		d.tunnel.procs = newProcs(d.log)
	}
	return nil
}

func (d *Device) openWireGuard() error {
	d.wg = device.NewDevice(d.tunnel, d.bind, newLogger(d.log))
	// One packet of a peer that comes another way must not move its endpoint:
	// only SetEndpoint does.
	d.wg.DisableSomeRoamingForBrokenMobileSemantics()
	return d.listen()
}

// listen gives wireguard-go its key and port. Which of the two calls binds the
// port depends on the interface: its coming up is an event on which wireguard-go
// goes up by itself, at any moment.
func (d *Device) listen() error {
	c := d.config
	set := fmt.Sprintf("private_key=%s\nlisten_port=%d\n", hex.EncodeToString(c.PrivateKey[:]), c.Port)
	err := d.wg.IpcSet(set)
	if err == nil {
		err = d.wg.Up()
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("listen on udp port %d: %w%s", c.Port, ErrPortTaken, portOwner(c.Port))
	case err != nil:
		return fmt.Errorf("set key of %s and listen on udp port %d: %w", c.Name, c.Port, err)
	}
	return nil
}

func (d *Device) openControl() (err error) {
	if d.uapi, err = openUAPI(d.config.Name, d.log); err != nil {
		return err
	}
	if d.ctl, err = wgctrl.New(); err != nil {
		return fmt.Errorf("open wgctrl: %w", err)
	}
	return nil
}

func (d *Device) openLink() (err error) {
	if d.link, err = openLink(d.config, d.log); err != nil {
		return err
	}
	return d.link.up()
}

// Run serves the UAPI socket, and puts addresses and routes back that somebody
// else removes, at most once per second. It returns nil when ctx ends or the
// Device is closed, and ErrInterfaceGone when somebody deletes the interface. It
// runs once; afterwards the Device can only be closed, which Run does not do.
func (d *Device) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	// Whatever ends first ends the other: nothing may wait for a socket that
	// nobody serves.
	defer d.uapi.close()
	defer context.AfterFunc(ctx, d.link.events.close)()
	g.Go(func() error {
		defer d.uapi.close()
		return d.link.guard(ctx)
	})
	g.Go(func() error {
		d.uapi.serve(ctx, g, d.wg.IpcHandle)
		return nil
	})
	g.Go(func() error { return d.waitClosed(ctx) })
	return g.Wait()
}

// waitClosed waits for the end of wireguard-go, which closes itself when it can
// no longer read from the TUN.
func (d *Device) waitClosed(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-d.wg.Wait():
	}
	d.uapi.close() // lets go whoever holds mu and waits for an answer
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	return fmt.Errorf("interface %s: %w", d.config.Name, ErrInterfaceGone)
}

// Send sends one datagram, from the given local address when that is valid and
// still this host's, from the spare socket of the given port or from the WireGuard
// port when it is 0, and with the given TTL or hop limit where that is above zero.
// To a handle of SetWays it goes through the relay, which
// no datagram with a TTL of its own does. It never blocks, and sends nothing else
// into Config.Mesh.
func (d *Device) Send(b []byte, to, from netip.AddrPort, ttl int) error {
	return d.bind.send(b, to, from, ttl)
}

// Capabilities are those of this node, to be published in its record.
func (d *Device) Capabilities() Capabilities {
	if d.config.switched(offLarge) || !d.tunnel.reader.offloads.header {
		return 0
	}
	return Large
}

// Port is the UDP port of both families, that of the main sockets.
func (d *Device) Port() uint16 { return d.bind.port() }

// Name is the name of the interface.
func (d *Device) Name() string { return d.config.Name }

// Activity counts the packets sent to a peer and received from it, without
// keepalives. Both are 0 for unknown peers.
func (d *Device) Activity(k Key) (sent, received uint64) {
	p := d.peers.byKey(k)
	if p == nil {
		return 0, 0
	}
	return p.sent.Load(), p.received.Load()
}

// Close removes the interface, with its addresses and routes, and all sockets.
// It may be called more than once.
func (d *Device) Close() error {
	// The order matters: calls that wait for the UAPI socket hold mu, and
	// wireguard-go must not be configured while it closes.
	if d.uapi != nil {
		d.uapi.close()
	}
	if d.link != nil {
		d.link.close() // or it would take this for somebody else's deed
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	var errs []error
	switch {
	case d.wg != nil:
		d.wg.Close()
	case d.tunnel != nil:
		errs = append(errs, d.tunnel.Close())
	}
	if d.ctl != nil {
		errs = append(errs, d.ctl.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close interface %s: %w", d.config.Name, err)
	}
	return nil
}
