package tun

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketBuffer is the size asked for, in bytes, each way.
const socketBuffer = 7 << 20

// socket is one UDP socket. It is non-blocking; the runtime polls it.
type socket struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	gso  bool          // UDP_SEGMENT works
	flat refusal       // of UDP_SEGMENT, by the device it went to
	bell *bell         // of its receiver
	done chan struct{} // closed by close

	overflow uint32     // what it dropped, as its receiver last heard
	probing  sync.Mutex // around socket.whole, so that one does not end the other
}

func (b *bind) openSocket(network string, port uint16) (*socket, error) {
	s, err := newSocket(network, &net.UDPAddr{Port: int(port)})
	if err != nil {
		return nil, fmt.Errorf("open %s port %d: %w", network, port, err)
	}
	if err := s.prepare(network, &b.config, b.trial()); err != nil {
		s.close()
		return nil, fmt.Errorf("prepare %s socket: %w", network, err)
	}
	return s, nil
}

// newSocket binds a socket and sets no options.
func newSocket(network string, a *net.UDPAddr) (*socket, error) {
	c, err := net.ListenUDP(network, a)
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return &socket{conn: c, raw: raw, bell: &bell{}, done: make(chan struct{})}, nil
}

// prepare sets the options. Buffers and offloads are worth trying only.
func (s *socket) prepare(network string, c *Config, found trial) error {
	_ = s.set(unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
	_ = s.set(unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	_ = s.set(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
	_ = s.set(unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer)
	_ = s.set(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	if !c.switched(offGRO) && !found.gro {
		_ = s.set(unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	}
	s.gso = !c.switched(offGSO) && s.canSegment() && (c.switched(forceGSO) || !manglesTrains(release()) && !found.gso)
	if network == "udp4" {
		return s.set(unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
	return s.set(unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
}

func (s *socket) set(level, option, value int) error {
	var err error
	if e := s.raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) }); e != nil {
		return e
	}
	return err
}

func (s *socket) canSegment() bool {
	var err error
	e := s.raw.Control(func(fd uintptr) { _, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT) })
	return e == nil && err == nil
}

// local is where the socket is bound.
func (s *socket) local() netip.AddrPort { return s.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

func (s *socket) port() uint16 { return s.local().Port() }

func (s *socket) close() {
	close(s.done)
	_ = s.conn.Close() // nothing is buffered in a UDP socket that we could lose
}

// release is the kernel's version, "6.18.44-generic".
func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// manglesTrains reports whether a kernel has the bug of 7.0 to 7.1.4, which
// damages UDP_SEGMENT sends whose segments are all of one size.
func manglesTrains(release string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(release, "%d.%d.%d", &major, &minor, &patch); n < 2 {
		return false
	}
	return major == 7 && (minor == 0 || minor == 1 && patch <= 4)
}
