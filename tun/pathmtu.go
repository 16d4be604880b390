package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// MessageOverhead is what WireGuard adds to a packet, in bytes.
const MessageOverhead = keepaliveSize

// probeSize is the length above which a STUN message is sent to find out whether
// a datagram of its size arrives.
const probeSize = 576

// paddedTo is what WireGuard pads packets to a multiple of, in bytes.
const paddedTo = 16

// innerMTU is the largest packet whose WireGuard message fits into a datagram.
func innerMTU(datagram int) int { return (datagram - keepaliveSize) / paddedTo * paddedTo }

// SetPathMTU tells the size of the largest datagram that arrives on a path of a
// peer, in bytes of UDP payload, over a relay without the flow's header; 0: not
// known. Longer messages are cut, if the peer takes fragments. Otherwise, if it is
// the path in use, the kernel gets routes to the peer with an MTU that fits.
// Unknown peers and paths are ignored.
func (d *Device) SetPathMTU(k Key, to netip.AddrPort, size int) {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	e := d.peers.pathOf(k, to)
	if e == nil {
		return
	}
	e.limit.Store(int32(size))
	e.flat.forget()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.narrow()
}

// narrow gives the peers whose messages cannot be cut routes that fit their paths.
// d.mu is held.
func (d *Device) narrow() {
	if d.link == nil || d.closed {
		return
	}
	hosts := make(map[netip.Prefix]int)
	for k, p := range d.known {
		size := d.peers.narrowest(k)
		if size == 0 || size >= d.config.MTU+MessageOverhead-3 { // in multiples of four
			continue
		}
		for _, a := range p.AllowedIPs {
			hosts[a] = innerMTU(size)
		}
	}
	if err := d.link.setHosts(hosts); err != nil {
		d.log.Warn("routes do not fit the paths", "err", err)
	}
}

// narrowest is the size of datagrams to a peer whose messages are not cut, as its
// path has it; 0: not known, or they are cut.
func (t *peers) narrowest(k Key) int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	p := t.keys[k]
	if p == nil || p.large.Load() || p.current == nil || p.current.limit.Load() == 0 {
		return 0
	}
	return int(p.current.limit.Load())
}

// isProbe reports whether b is to arrive in one piece, or not at all.
func isProbe(b []byte) bool { return len(b) > probeSize && frameOf(b) == frameSTUN }

// whole calls send while the kernel cuts nothing into IP fragments, whatever it
// believes of the path, but lets everything leave that the interface takes. All
// else may be cut: the kernel then has an MTU from routers, which is better than
// none until a probe is answered.
func (s *socket) whole(send func(fd uintptr)) error {
	s.probing.Lock()
	defer s.probing.Unlock()
	level, option, probe := discovery(s.local().Addr().Is6())
	return s.raw.Control(func(fd uintptr) {
		before, err := unix.GetsockoptInt(int(fd), level, option)
		if err == nil {
			err = unix.SetsockoptInt(int(fd), level, option, probe)
		}
		send(fd)
		if err == nil {
			_ = unix.SetsockoptInt(int(fd), level, option, before) // as it was
		}
	})
}

// DontFragment has the datagrams of a UDP socket leave in one piece, or not at all,
// whatever the kernel believes of the path: those that are larger than the MTU of
// the interface fail with EMSGSIZE.
func DontFragment(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("forbid fragments: %w", err)
	}
	local, _ := c.LocalAddr().(*net.UDPAddr)
	level, option, probe := discovery(local != nil && local.AddrPort().Addr().Is6())
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, probe) })
	if err = errors.Join(err, set); err != nil {
		return fmt.Errorf("forbid fragments: %w", err)
	}
	return nil
}

// discovery is the socket option for path MTU discovery, and its value with which
// probes leave (IP_PMTUDISC_PROBE in ip(7)).
func discovery(six bool) (level, option, probe int) {
	if six {
		return unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
	}
	return unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
}

// give runs a train on a socket.
func (s *socket) give(t *train, probe bool) (errno syscall.Errno, err error) {
	if probe {
		err = s.whole(t.run)
	} else {
		err = s.raw.Control(t.run)
	}
	return t.errno, err
}

// Lost counts the messages to a peer of which it says that they did not arrive. A
// peer with the plain WireGuard format says nothing. 0 for unknown peers.
func (d *Device) Lost(k Key) uint64 {
	if p := d.peers.byKey(k); p != nil {
		return p.lost.Load()
	}
	return 0
}

// misses adds what a peer newly says that it misses, of a cumulative counter modulo
// 2^32. One caller at a time.
func (p *peer) misses(total uint32) {
	newly := total - p.told
	p.told = total
	if p.heard && newly < reportLimit {
		p.lost.Add(uint64(newly))
	}
	p.heard = true
}
