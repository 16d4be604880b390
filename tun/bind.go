package tun

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// batchSize is how many messages go to wireguard-go at a time, and come back.
const batchSize = conn.IdealBatchSize

// portTries bounds the search for a port that is free in both families.
const portTries = 100

// logger is Config.Log, or a silent one.
func (c *Config) logger() *slog.Logger {
	if c.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Log
}

// meshed reports whether a is inside the overlay, where no UDP goes.
func (c *Config) meshed(a netip.Addr) bool {
	return slices.ContainsFunc(c.Mesh, func(p netip.Prefix) bool { return p.Contains(a) })
}

// sockets are the sockets of one Open; a family the host lacks is nil.
type sockets struct {
	v4, v6 *socket
	runs   *handover // what Deliver brings
	pool   *pool     // what comes to spare sockets
}

func (s *sockets) of(a netip.Addr) *socket {
	if a.Is4() {
		return s.v4
	}
	return s.v6
}

func (s *sockets) all() []*socket {
	return slices.DeleteFunc([]*socket{s.v4, s.v6}, func(s *socket) bool { return s == nil })
}

// drops counts what was not passed on.
type drops struct {
	handled atomic.Uint64 // sent to a peer without a path, or through a relay whose link is down
	full    atomic.Uint64 // sent while the socket stayed full, or too long for a relay
	foreign atomic.Uint64 // received, neither STUN nor WireGuard nor ours, or of no flow

	fragments  atomic.Uint64 // received, of no session and path of a peer, or broken
	incomplete atomic.Uint64 // messages of which some fragments came, but not all
}

// bind is a conn.Bind on UDP sockets of its own, one per family on one port.
// What it receives is told apart segment by segment: STUN, signals and what
// relays say go to Config.Receive, WireGuard to wireguard-go, the rest nowhere.
// What comes in a flow counts as from the handle of that path, whichever way the
// relay sent it. Safe for concurrent use.
type bind struct {
	config  Config
	peers   *peers
	inbound *credit // messages received and not yet written to the TUN
	out     *credit // messages read from the TUN and not yet sent
	base    time.Time
	mtu     atomic.Int32            // of the interface, minMTU to Config.MTU
	mark    atomic.Uint32           // of SetMark
	open    atomic.Pointer[sockets] // nil: closed
	trains  sync.Pool               // *train
	streams sync.Pool               // *stream
	holds   *holds
	bells   bells // of the receivers and of the TUN's reader
	drops   drops

	reported func(*peer)   // told, when receiving, that a report to a peer is due; may be nil
	overflow atomic.Uint32 // datagrams the sockets dropped because they were full
	tried    sync.Once
	found    trial // of tried
}

var _ conn.Bind = (*bind)(nil)

// newBind makes a closed bind.
func newBind(c Config, t *peers) *bind {
	b := &bind{config: c, peers: t, inbound: newCredit(), out: newCredit(), base: time.Now()}
	b.mtu.Store(int32(max(c.MTU, minMTU)))
	b.trains.New = func() any { return newTrain() }
	b.streams.New = func() any { return &stream{run: make([]byte, 0, streamSize)} }
	b.holds = newHolds(b.transmitHeld)
	return b
}

// Open binds both families to port, or to Config.Port, or to a free one. A
// family the host does not have is left out; a port taken in one is an error.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	if b.open.Load() != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	if port == 0 {
		port = b.config.Port
	}
	s, err := b.listen(port)
	for range portTries {
		if port != 0 || !errors.Is(err, unix.EADDRINUSE) {
			break
		}
		s, err = b.listen(port)
	}
	if err != nil {
		return nil, 0, err
	}
	if !b.open.CompareAndSwap(nil, s) {
		s.close()
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	b.peers.clearSources()
	b.holds.start()
	var fns []conn.ReceiveFunc
	for _, s := range s.all() {
		s.bell = b.bells.hang(s.raw, s.conn.SetReadDeadline)
		fns = append(fns, newReceiver(b, newIntake(b, s), s.done).receive)
	}
	s.pool.bell = b.bells.hang(s.pool.raw, s.pool.file.SetReadDeadline)
	b.reopenSpares(s.pool)
	fns = append(fns, newReceiver(b, s.pool, s.pool.done).receive, newReceiver(b, s.runs, s.runs.done).receive)
	return fns, b.port(), nil
}

// listen opens what the host has.
func (b *bind) listen(port uint16) (*sockets, error) {
	s := &sockets{runs: newHandover(b)}
	var err4, err6 error
	s.v4, err4 = b.openSocket("udp4", port)
	if err4 != nil && !absent(err4) {
		return nil, err4
	}
	if s.v4 != nil {
		port = s.v4.port()
	}
	s.v6, err6 = b.openSocket("udp6", port)
	if err6 != nil && (!absent(err6) || s.v4 == nil) {
		s.close()
		return nil, err6
	}
	var err error
	if s.pool, err = newPool(b); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// absent reports whether an error means that the host lacks the family.
func absent(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EPROTONOSUPPORT)
}

func (s *sockets) close() {
	for _, s := range s.all() {
		s.close()
	}
	if s.pool != nil {
		s.pool.close()
	}
}

// Close ends the ReceiveFuncs and forgets held initiations. Open may follow.
func (b *bind) Close() error {
	b.holds.stop()
	if s := b.open.Swap(nil); s != nil {
		for _, one := range s.all() {
			b.bells.take(one.bell)
		}
		b.bells.take(s.pool.bell)
		b.peers.shutSpares()
		s.close()
		close(s.runs.done)
	}
	return nil
}

// SetMark sets the firewall mark of what the sockets send.
func (b *bind) SetMark(mark uint32) error {
	open := b.open.Load()
	if open == nil {
		return net.ErrClosed
	}
	for _, s := range open.all() {
		if err := s.set(unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			return fmt.Errorf("mark udp socket with %d: %w", mark, err)
		}
	}
	b.mark.Store(mark)
	return b.peers.markSpares(mark)
}

// BatchSize is the number of messages of one call.
func (b *bind) BatchSize() int { return batchSize }

// port is the port both families are bound to, 0 when closed.
func (b *bind) port() uint16 {
	open := b.open.Load()
	switch {
	case open == nil:
		return 0
	case open.v4 != nil:
		return open.v4.port()
	default:
		return open.v6.port()
	}
}

// ParseEndpoint returns the endpoint registered for an address by setPath or
// handle. Of an address nobody registered it makes one that is nobody's; inside
// the mesh such a one drops.
func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, fmt.Errorf("parse endpoint %q: %w", s, err)
	}
	if a.Addr().Zone() != "" {
		return nil, fmt.Errorf("parse endpoint %q: link-local zones are not supported", s)
	}
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	if e := b.peers.at(a); e != nil {
		return e, nil
	}
	e := newEndpoint(a, nil)
	e.drop = b.config.meshed(a.Addr())
	return e, nil
}

// setPath registers an address as the path of a peer, used from a local address
// where that is valid, over a spare socket where from has a port. It comes before
// the write through wgctrl, which then finds the endpoint by its address. Inside
// the mesh nothing is registered.
func (b *bind) setPath(k Key, to, from netip.AddrPort) error {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if b.config.meshed(to.Addr()) {
		return nil
	}
	if port := from.Port(); port != 0 {
		if err := b.keep(port); err != nil {
			return fmt.Errorf("use port %d: %w", port, err)
		}
	}
	e := b.peers.path(k, to, from.Port())
	switch {
	case e == nil && from.Port() != 0:
		return fmt.Errorf("use port %d: %w", from.Port(), errNoSocket)
	case e == nil:
		return ErrUnknownPeer
	}
	e.mtu.Store(&b.mtu)
	e.pin(from.Addr())
	return nil
}

// handle makes a new dropping endpoint for a peer: its overlay address with a
// port not used before. A stranger gets the zero value.
func (b *bind) handle(k Key, a netip.Addr) netip.AddrPort {
	if e := b.peers.handle(k, a); e != nil {
		return e.to
	}
	return netip.AddrPort{}
}

// now is the time since the bind was made, in nanoseconds, never 0.
func (b *bind) now() int64 { return int64(time.Since(b.base)) + 1 }

// demand tells the node that packets wait for a peer without a path, at most
// once a second.
func (b *bind) demand(p *peer) {
	now, last := b.now(), p.demanded.Load()
	if last != 0 && now-last < int64(silence) || !p.demanded.CompareAndSwap(last, now) {
		return
	}
	b.tell(p)
}

func (b *bind) tell(p *peer) {
	if b.config.Demand != nil {
		b.config.Demand(p.key)
	}
}
