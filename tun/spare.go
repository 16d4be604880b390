package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Bounds of spare sockets. The limit of open files leaves room for them: Go
// raises the soft one of a process to the hard one by itself.
const (
	maxTried  = 256     // not kept, as many as one hard round may use
	maxSpares = 512     // of all
	spareSize = 4 << 10 // bytes of buffer of one not kept: some checks
)

// errNoSocket says that a local port is none of OpenSockets'.
var errNoSocket = errors.New("no spare socket has this port")

// errSpares says that there are too many spare sockets.
var errSpares = errors.New("too many spare sockets")

// spare is an IPv4 UDP socket besides the main ones, with a mapping of its own in
// every NAT on the way. It is tried first: small, and deaf to all but STUN and
// WireGuard. As the path of a peer it is kept: like a main socket then. It is
// reopened with those, on its port, and stays the same object. Safe for concurrent
// use.
type spare struct {
	port uint16
	kept atomic.Bool
	now  atomic.Pointer[socket] // nil: closed

	paths map[netip.AddrPort]*endpoint // guarded by peers.mu
}

// openSpares opens n spare sockets, or none.
func (b *bind) openSpares(n int) ([]uint16, error) {
	p := b.peers.receiver()
	if p == nil {
		return nil, net.ErrClosed
	}
	if n < 0 || n > maxTried {
		return nil, fmt.Errorf("open %d sockets: %w", n, errSpares)
	}
	list := make([]*spare, 0, n)
	ports := make([]uint16, 0, n)
	for range n {
		s := &spare{paths: make(map[netip.AddrPort]*endpoint)}
		if err := b.openSpare(s, p); err != nil {
			closeSpares(list)
			if b.peers.receiver() != p {
				err = net.ErrClosed // meanwhile
			}
			return nil, err
		}
		list, ports = append(list, s), append(ports, s.port)
	}
	if err := b.peers.admit(list, p); err != nil {
		closeSpares(list)
		return nil, fmt.Errorf("open %d sockets: %w", n, err)
	}
	return ports, nil
}

// openSpare gives s a socket, received by p: on its port, or on a free one.
func (b *bind) openSpare(s *spare, p *pool) error {
	one, err := newSocket("udp4", &net.UDPAddr{Port: int(s.port)})
	if err != nil {
		return fmt.Errorf("open spare socket: %w", err)
	}
	if s.kept.Load() {
		err = one.prepare("udp4", &b.config, b.trial())
	} else {
		_ = one.set(unix.SOL_SOCKET, unix.SO_RCVBUF, spareSize)
		_ = one.set(unix.SOL_SOCKET, unix.SO_SNDBUF, spareSize)
		err = one.set(unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
	if mark := b.mark.Load(); err == nil && mark != 0 {
		err = one.set(unix.SOL_SOCKET, unix.SO_MARK, int(mark))
	}
	if err == nil {
		err = p.add(one.port(), one)
	}
	if err != nil {
		one.close()
		return fmt.Errorf("prepare spare socket: %w", err)
	}
	if s.port == 0 {
		s.port = one.port()
	}
	s.now.Store(one)
	return nil
}

// reopenSpares opens all again, received by p. Who cannot have its port back is
// gone, or, as a path, stays closed.
func (b *bind) reopenSpares(p *pool) {
	t := b.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pool = p
	for port, s := range t.spares {
		if err := b.openSpare(s, p); err != nil {
			b.config.logger().Debug("spare socket lost", "port", port, "err", err)
			if len(s.paths) == 0 {
				delete(t.spares, port)
			}
		}
	}
}

// keep makes the spare socket of a port like a main one.
func (b *bind) keep(port uint16) error {
	s := b.peers.spare(port)
	if s == nil {
		return errNoSocket
	}
	if s.kept.Swap(true) {
		return nil
	}
	if one := s.now.Load(); one != nil {
		return one.prepare("udp4", &b.config, b.trial())
	}
	return net.ErrClosed
}

// local is its port, 0 for none: the main sockets.
func (s *spare) local() uint16 {
	if s == nil {
		return 0
	}
	return s.port
}

func (s *spare) close() {
	if one := s.now.Swap(nil); one != nil {
		one.close()
	}
}

func closeSpares(list []*spare) {
	for _, s := range list {
		s.close()
	}
}

// receiver is what receives from spare sockets, nil when the bind is closed.
func (t *peers) receiver() *pool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.pool
}

// spare is that of a port, nil when there is none.
func (t *peers) spare(port uint16) *spare {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.spares[port]
}

// admit takes all of list, which p receives, or none.
func (t *peers) admit(list []*spare, p *pool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pool != p {
		return net.ErrClosed
	}
	tried := len(list)
	for _, s := range t.spares {
		if !s.kept.Load() {
			tried++
		}
	}
	if tried > maxTried || len(t.spares)+len(list) > maxSpares {
		return errSpares
	}
	for _, s := range list {
		t.spares[s.port] = s
	}
	return nil
}

// dismiss forgets the spare sockets of some ports and returns them, but for those
// that a peer uses.
func (t *peers) dismiss(ports []uint16) []*spare {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*spare
	for _, port := range ports {
		s := t.spares[port]
		if s == nil || s.used() {
			continue
		}
		for _, e := range s.paths {
			e.peer.endpoints = slices.DeleteFunc(e.peer.endpoints, func(one *endpoint) bool { return one == e })
			t.unlist(e)
		}
		delete(t.spares, port)
		list = append(list, s)
	}
	return list
}

// used reports whether a peer's messages go out there. Call with peers.mu held.
func (s *spare) used() bool {
	for _, e := range s.paths {
		if e.peer.current == e || e.peer.also.Load() == e {
			return true
		}
	}
	return false
}

// shutSpares closes all until they are reopened.
func (t *peers) shutSpares() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pool = nil
	for _, s := range t.spares {
		s.close()
	}
}

// markSpares sets the firewall mark of what all send.
func (t *peers) markSpares(mark uint32) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, s := range t.spares {
		one := s.now.Load()
		if one == nil {
			continue
		}
		if err := one.set(unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			return fmt.Errorf("mark spare socket with %d: %w", mark, err)
		}
	}
	return nil
}

// table is where the paths over a spare socket are found, or over the main ones.
func (t *peers) table(s *spare) map[netip.AddrPort]*endpoint {
	if s == nil {
		return t.paths
	}
	return s.paths
}

// leave closes a spare socket that is no path any more. Call with mu held.
func (t *peers) leave(s *spare) {
	if s == nil || len(s.paths) > 0 {
		return
	}
	s.close()
	if t.spares[s.port] == s {
		delete(t.spares, s.port)
	}
}

// OpenSockets opens up to 256 IPv4 UDP sockets on free ports, all of them or
// none, and returns the ports. Each is small: Config.Receive gets what is
// STUN-shaped of what it hears, messages of WireGuard and fragments of them are
// taken as from others, and nothing else; Send sends from it. SetEndpoint makes one
// a path: like the main sockets then, for as long as a peer has it. The others are
// closed by CloseSockets, and all with the Device. No more than 256 that are not
// paths may be open. They are made in the network namespace of the calling thread.
func (d *Device) OpenSockets(n int) ([]uint16, error) { return d.bind.openSpares(n) }

// CloseSockets closes sockets of OpenSockets, but for those through which a
// peer's messages go.
func (d *Device) CloseSockets(ports []uint16) { closeSpares(d.bind.peers.dismiss(ports)) }
