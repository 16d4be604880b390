package tun

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// Offloads of a TUN with a virtio header (TUNSETOFFLOAD).
const (
	offloadTCP = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	offloadUDP = unix.TUN_F_USO4 | unix.TUN_F_USO6 // Linux 6.2
)

// tunnel is wireguard-go's tun.Device on the file of its own NativeTun: it
// reads until the queue is empty, splits and joins super-packets, and bounds
// what wireguard-go holds. A link that goes down is not told to wireguard-go,
// which would close the Bind and forget all sessions. Write is safe for
// concurrent use; Read has one caller.
type tunnel struct {
	wgtun.Device
	peers      *peers
	bind       *bind
	raw        syscall.RawConn
	bell       *bell
	reader     reader
	writer     writer
	reports    reports
	dropped    dropped
	procs      *procs // nil: the number of processors stays
	events     chan wgtun.Event
	forwarding sync.WaitGroup // forward, until the device closes its events
	done       chan struct{}  // Close was called
	once       sync.Once
}

// offloads is what the kernel and the configuration allow.
type offloads struct {
	header bool // packets begin with a virtio header
	tcp    bool
	udp    bool
}

// dropped counts packets that were not passed on.
type dropped struct {
	contained atomic.Uint64 // read from the kernel, with the protocol of containers
	forged    atomic.Uint64 // received in a container, with a source that is not the peer's
	broken    atomic.Uint64 // containers with a record that is not valid
}

// newTunnel takes over the file of dev. Close closes dev.
func newTunnel(dev wgtun.Device, t *peers, b *bind, c Config) (*tunnel, error) {
	raw, err := dev.File().SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("own tun file: %w", err)
	}
	o, err := setOffloads(raw, c.switched(offTSO))
	if err != nil {
		return nil, fmt.Errorf("set tun offloads: %w", err)
	}
	if name, err := dev.Name(); o.tcp && err == nil {
		if err := limitSuper(name, superSize(c.MTU)); err != nil {
			c.logger().Debug("super-packets stay as large as the kernel likes", "err", err)
		}
	}
	home, err := atHome(dev, raw)
	if err != nil {
		return nil, err
	}
	n := own(home, raw, o, b)
	n.peers = t
	b.reported = n.wakeReport
	n.bell = b.bells.hang(raw, n.File().SetReadDeadline)
	return n, nil
}

// own makes the tunnel, without peers.
func own(dev wgtun.Device, raw syscall.RawConn, o offloads, b *bind) *tunnel {
	n := &tunnel{
		Device: dev, raw: raw,
		bind:   b,
		bell:   &bell{},
		events: make(chan wgtun.Event, 1),
		done:   make(chan struct{}),
	}
	n.reader.init(n, o, &b.config)
	n.writer.init(n, o, &b.config)
	n.forwarding.Go(n.forward)
	return n
}

// setOffloads asks for TCP and, where the kernel has it, UDP super-packets.
func setOffloads(raw syscall.RawConn, off bool) (offloads, error) {
	var o offloads
	var err error
	e := raw.Control(func(fd uintptr) {
		var req *unix.Ifreq
		if req, err = unix.NewIfreq(""); err != nil {
			return
		}
		if err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, req); err != nil {
			return
		}
		if o.header = req.Uint16()&unix.IFF_VNET_HDR != 0; !o.header {
			return
		}
		if off {
			err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, 0)
			return
		}
		o.udp = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloadTCP|offloadUDP) == nil
		o.tcp = o.udp || unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloadTCP) == nil
	})
	return o, errors.Join(e, err)
}

// forward passes events on, but for link-down, and follows the MTU before
// wireguard-go asks for it. It ends when the device closes its channel.
func (n *tunnel) forward() {
	defer close(n.events)
	for e := range n.Device.Events() {
		if e &^= wgtun.EventDown; e == 0 {
			continue
		}
		if e&wgtun.EventMTUUpdate != 0 {
			n.follow()
		}
		select {
		case n.events <- e:
		case <-n.done:
		}
	}
}

// Events is the channel wireguard-go listens to; Close closes it.
func (n *tunnel) Events() <-chan wgtun.Event { return n.events }

// BatchSize is the number of packets of one call.
func (n *tunnel) BatchSize() int { return batchSize }

// Close closes the device; Read and Write return os.ErrClosed from then on.
func (n *tunnel) Close() error {
	var err error
	n.once.Do(func() {
		close(n.done)
		n.bind.bells.take(n.bell)
		n.procs.close()
		err = n.Device.Close()
		n.forwarding.Wait()
	})
	return err
}

// Read returns packets of the kernel and containers of them, at least one. It
// waits while wireguard-go holds too many.
func (n *tunnel) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n.procs.sample()
	n.bind.bells.look(n.bind.now())
	r := &n.reader
	r.begin(bufs, sizes, offset)
	for {
		if r.room, r.bytes = n.bind.out.wait(r.timer, n.done); r.room == 0 {
			r.end()
			return 0, os.ErrClosed
		}
		err := n.raw.Read(r.run)
		n.bell.waiting.Store(false)
		woken := errors.Is(err, os.ErrDeadlineExceeded)
		if woken {
			r.report()
		}
		count := r.end()
		switch {
		case count > 0:
			return count, nil
		case err != nil && !woken || closedTUN(r.errno):
			return 0, os.ErrClosed
		case r.errno != 0:
			return 0, fmt.Errorf("read tun: %w", r.errno)
		}
		r.begin(bufs, sizes, offset)
	}
}

// closedTUN reports whether an error means that the interface is gone.
func closedTUN(errno syscall.Errno) bool { return errno == unix.EBADFD || errno == unix.EBADF }

// sender is whose the packets of a Write are, and the address that says so: that
// of the first whole one. A peer can leave us stumps.
func (n *tunnel) sender(bufs [][]byte, offset int) (netip.Addr, *peer) {
	for _, b := range bufs {
		if packet := b[offset:]; len(packet) > 0 && packetSize(packet) == len(packet) {
			src, _ := innerAddrs(packet)
			return src, n.peers.byAddr(src)
		}
	}
	return netip.Addr{}, nil
}

// Write gives packets of one peer to the kernel, those in containers too.
func (n *tunnel) Write(bufs [][]byte, offset int) (int, error) {
	if len(bufs) == 0 {
		return 0, nil
	}
	n.procs.sample()
	src, p := n.sender(bufs, offset)
	packets, errno := n.writer.write(bufs, offset, p, src)
	n.bind.bells.look(n.bind.now())
	if p != nil {
		p.received.Add(uint64(packets))
		// wireguard-go leaves the header of the message before what was in it.
		n.bind.inbound.settleTo(&p.in, nameOf(bufs[len(bufs)-1]), len(bufs))
	}
	switch {
	case errno == 0 || errno == unix.EIO: // EIO: the link is down, where packets vanish
		return len(bufs), nil
	case closedTUN(errno):
		return len(bufs), os.ErrClosed
	default:
		return len(bufs), fmt.Errorf("write tun: %w", errno)
	}
}
