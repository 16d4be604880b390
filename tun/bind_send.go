package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// Bounds of a send.
const (
	maxSegments  = 64    // datagrams of one UDP_SEGMENT send
	maxTrain     = 65507 // bytes of one, the largest UDP payload of IPv4
	fullWait     = 4     // ms to wait for a full socket, once per call
	sendTries    = 4     // with less each time: no source address, no segmentation
	controlSpace = 96    // source address, segment size and hop limit
)

// errMesh says that UDP was to be sent into the overlay itself.
var errMesh = errors.New("address is inside the overlay")

// Send passes messages of wireguard-go to an endpoint. A handle drops them. An
// initiation of the side that should not initiate is held for a moment. It
// waits for a full socket a few milliseconds at most.
func (b *bind) Send(bufs [][]byte, ep conn.Endpoint) error {
	e, ok := ep.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if len(bufs) == 0 || len(bufs[0]) < keepaliveSize {
		return nil
	}
	content := 0
	for _, m := range bufs {
		if isData(m) {
			content++
		}
	}
	if e.peer != nil {
		b.book(bufs[0], e.peer, content)
	}
	if e.drop {
		b.drops.handled.Add(uint64(len(bufs)))
		if e.peer != nil {
			b.tell(e.peer)
		}
		return nil
	}
	if e.peer != nil {
		if bufs[0][0] == typeInitiation && len(bufs[0]) == initiationSize {
			if b.leave(e.peer) {
				return nil
			}
			if !e.peer.initiate.Load() {
				b.holds.keep(bufs[0], e)
				return nil
			}
		}
		b.spoke(e.peer, content, bufs[0][0] == typeInitiation)
	}
	return b.pass(bufs, e)
}

// pass transmits messages on a path, and on the one that gets copies. One that
// carries them is enough.
func (b *bind) pass(bufs [][]byte, e *endpoint) error {
	err := b.transmit(bufs, e)
	if e.peer != nil {
		if also := e.peer.also.Load(); also != nil && also != e && b.transmit(bufs, also) == nil {
			return nil
		}
	}
	if errors.Is(err, errDown) {
		b.drops.handled.Add(uint64(len(bufs)))
		return nil
	}
	return err
}

// book gives credits back and learns from handshakes. A response means that
// the peer's initiation was accepted: ours, if one is held, is not needed.
func (b *bind) book(first []byte, p *peer, content int) {
	if content > 0 {
		b.out.settle(&p.out, content)
		return
	}
	switch first[0] {
	case typeResponse:
		b.holds.drop(p)
		p.answers()
		p.answered.Store(b.now())
		b.peers.learn(indexOf(first), p)
	case typeInitiation:
		b.peers.learn(indexOf(first), p)
	}
}

// spoke counts what is sent on a path, and tells the node when the peer was not
// spoken to for a while.
func (b *bind) spoke(p *peer, content int, initiation bool) {
	if content == 0 && !initiation {
		return
	}
	p.sent.Add(uint64(content))
	now := b.now()
	if last := p.lastSent.Swap(now); now-last >= int64(silence) || last == 0 {
		b.tell(p)
	}
}

// transmitHeld sends an initiation whose time has come.
func (b *bind) transmitHeld(message []byte, to *endpoint) {
	b.spoke(to.peer, 0, true)
	if err := b.pass([][]byte{message}, to); err != nil {
		b.config.logger().Debug("held initiation not sent", "to", to.to, "err", err)
	}
}

// transmit sends messages on a path; cut into fragments, when they are longer
// than its datagrams and the peer takes those.
func (b *bind) transmit(bufs [][]byte, e *endpoint) error {
	o := batch{bufs: bufs, to: e}
	if e.peer != nil && e.peer.large.Load() {
		o.limit = e.datagram()
	}
	if e.relay != nil {
		return b.relay(&o)
	}
	return b.ship(&o)
}

// ship sends a batch to a UDP address. It goes on without the source address and
// without segmentation when the kernel refuses those.
func (b *bind) ship(o *batch) error {
	e := o.to
	s, err := b.socket(e)
	if err != nil {
		return fmt.Errorf("send to %s: %w", e.to, err)
	}
	t := b.trains.Get().(*train)
	defer b.trains.Put(t)
	at, tries := place{}, 0
	for at.message < len(o.bufs) {
		o.source, o.segment = e.SrcIP(), b.segments(e, s)
		t.load(o, at)
		failed, err := s.give(t, len(o.bufs) == 1 && isProbe(o.bufs[0]))
		rest, group := t.rest()
		t.unload()
		switch at = rest; {
		case err != nil:
			return net.ErrClosed
		case failed == 0:
			continue
		case failed == unix.EAGAIN:
			b.drops.full.Add(uint64(len(o.bufs) - at.message))
			return nil
		case tries == sendTries || !b.adapt(o, s, failed, group):
			return fmt.Errorf("send to %s: %w", e.to, failed)
		}
		tries++
	}
	return nil
}

// socket is what sends to e.
func (b *bind) socket(e *endpoint) (*socket, error) {
	open := b.open.Load()
	if open == nil {
		return nil, net.ErrClosed
	}
	if e.spare != nil {
		if s := e.spare.now.Load(); s != nil {
			return s, nil
		}
		return nil, net.ErrClosed
	}
	if s := open.of(e.to.Addr()); s != nil {
		return s, nil
	}
	return nil, unix.EAFNOSUPPORT
}

// segments reports whether datagrams to e may travel as groups.
func (b *bind) segments(e *endpoint, s *socket) bool {
	if !s.gso {
		return false
	}
	now := b.now()
	return !s.flat.holds(now) && !e.flat.holds(now)
}

// adapt gives up what the kernel may have refused, and reports whether there was
// such a thing.
func (b *bind) adapt(o *batch, s *socket, failed syscall.Errno, group bool) bool {
	switch {
	case o.source.IsValid() && badSource(failed) && !(group && failed == unix.EINVAL):
		o.to.pin(netip.Addr{})
		o.to.flat.forget() // a train fails with a bad source too
	case group && failed == unix.EIO:
		s.flat.note(b.now())
	case group && (failed == unix.EINVAL || failed == unix.EMSGSIZE):
		o.to.flat.note(b.now())
	default:
		return false
	}
	return true
}

// badSource reports whether an error can come from a local address that is
// gone or does not fit the route any more.
func badSource(errno syscall.Errno) bool {
	return errno == unix.EINVAL || errno == unix.EADDRNOTAVAIL || errno == unix.ENETUNREACH
}

// send sends one datagram of ours, from a local address where that is valid, from
// a spare socket where from has a port, and with a TTL or hop limit of its own when
// ttl is not 0; or into a flow.
func (b *bind) send(p []byte, to, from netip.AddrPort, ttl int) error {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if b.config.meshed(to.Addr()) {
		return b.sendFlow(p, to, ttl)
	}
	e := newEndpoint(to, nil)
	if port := from.Port(); port != 0 {
		if e.spare = b.peers.spare(port); e.spare == nil {
			return fmt.Errorf("send to %s from port %d: %w", to, port, errNoSocket)
		}
	}
	s, err := b.socket(e)
	if err != nil {
		return fmt.Errorf("send to %s: %w", to, err)
	}
	e.pin(from.Addr())
	err = b.sendOne(p, e, s, ttl)
	if errno := syscall.Errno(0); from.Addr().IsValid() && errors.As(err, &errno) && badSource(errno) {
		e.pin(netip.Addr{})
		err = b.sendOne(p, e, s, ttl)
	}
	if err != nil {
		return fmt.Errorf("send to %s: %w", to, err)
	}
	return nil
}

func (b *bind) sendOne(p []byte, e *endpoint, s *socket, ttl int) error {
	t := b.trains.Get().(*train)
	defer b.trains.Put(t)
	t.load(&batch{bufs: [][]byte{p}, to: e, source: e.SrcIP()}, place{})
	if ttl > 0 {
		c := control{b: t.control[0][:0]}
		c.source(e.SrcIP())
		c.hops(e.to.Addr().Is4(), ttl)
		c.attach(&t.msgs[0].head)
	}
	errno, err := s.give(t, isProbe(p))
	t.unload()
	switch {
	case err != nil:
		return net.ErrClosed
	case errno != 0:
		return errno
	}
	return nil
}
