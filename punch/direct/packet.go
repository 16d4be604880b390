package direct

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

// PacketConn is a UDP port that reaches peers behind NATs; its addresses are of
// type Addr. Listen makes it. It is safe for concurrent use.
type PacketConn struct {
	cfg    Config
	self   punch.Key
	udp    *net.UDPConn
	agent  *punch.Agent
	log    *slog.Logger
	group  *errgroup.Group // what Listen started; Close waits for it
	ending context.Context // ends with Close
	cancel context.CancelFunc

	inbox       chan datagram
	read, write deadline

	mu      sync.Mutex
	routes  map[punch.Key]*route
	senders map[netip.AddrPort]sender
}

// datagram is one that waits to be read.
type datagram struct {
	from punch.Key
	b    []byte
}

// route is the way to a peer, and what went there.
type route struct {
	to     netip.AddrPort // zero: there is none now
	sent   uint64
	wanted time.Time // when the agent was last told that data goes there
}

// sender is who has proven to be at an address.
type sender struct {
	peer  punch.Key
	until time.Time // then it is to be looked up again
}

const (
	provenFor  = time.Second
	maxSenders = 1024
	// tellEvery is how often the agent is told that data goes to a peer.
	tellEvery = time.Second
)

var _ net.PacketConn = (*PacketConn)(nil)

// Listen opens a UDP port and answers the peers that Connect names, until Close.
func Listen(c Config) (*PacketConn, error) {
	if c.Send == nil {
		return nil, fmt.Errorf("listen: %w", errSend)
	}
	self, err := punch.PublicKey(c.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	var own *net.UDPAddr
	if c.Address.IsValid() {
		own = net.UDPAddrFromAddrPort(c.Address)
	}
	udp, err := net.ListenUDP("udp", own)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	p := &PacketConn{
		cfg: c, self: self, udp: udp, log: c.Log, inbox: make(chan datagram, maxWaiting),
		routes: map[punch.Key]*route{}, senders: map[netip.AddrPort]sender{},
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if err := p.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), udp.Close())
	}
	return p, nil
}

// start makes the agent and what runs until Close.
func (p *PacketConn) start() error {
	var nonce punch.Nonce
	rand.Read(nonce[:])
	var err error
	p.agent, err = punch.New(punch.Config{
		PrivateKey: p.cfg.PrivateKey, Mesh: p.cfg.Group,
		Nonces:    [2]punch.Nonce{nonce, nonceOf(p.cfg.Group, p.self)},
		Send:      p.send,
		Signal:    func(to punch.Key, sealed []byte) error { return p.cfg.Send(Signal{to, sealed}) },
		OnPath:    p.onPath,
		Activity:  p.activity,
		Forbidden: func(a netip.AddrPort) bool { return slices.Contains(p.cfg.Servers, a) },
		Loopback:  p.cfg.Address.Addr().IsLoopback(),
		Log:       p.log,
	})
	if err != nil {
		return err
	}
	if err := p.look(); err != nil {
		return err
	}
	servers := make([]punch.Server, len(p.cfg.Servers))
	for i, a := range p.cfg.Servers {
		servers[i].Addr = a
	}
	p.agent.SetServers(servers)
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	p.group, p.ending = errgroup.WithContext(ctx)
	p.group.Go(func() error { return p.agent.Run(p.ending) })
	p.group.Go(p.receive)
	p.group.Go(p.tend)
	return nil
}

// look tells the agent the own addresses.
func (p *PacketConn) look() error {
	own := p.local()
	list, err := localAddrs(own.Addr())
	if err != nil {
		return err
	}
	p.agent.SetLocal(list, own.Port())
	return nil
}

func (p *PacketConn) local() netip.AddrPort {
	a, ok := p.udp.LocalAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.AddrPort().Addr().Unmap(), a.AddrPort().Port())
}

// tend takes signals and looks at the own addresses.
func (p *PacketConn) tend() error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	signals := p.cfg.Signals
	for {
		select {
		case <-p.ending.Done():
			return nil
		case s, ok := <-signals:
			if !ok {
				signals = nil
			} else if err := p.agent.HandleSignal(p.named(s), s.Body); err != nil {
				p.log.Debug("signal dropped", "err", err)
			}
		case <-ticker.C:
			if err := p.look(); err != nil {
				p.log.Debug("own addresses unknown", "err", err)
			}
		}
	}
}

// named gives the sender of a signal: the only peer where the signal names none.
func (p *PacketConn) named(s Signal) punch.Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.Peer == (punch.Key{}) && len(p.routes) == 1 {
		for k := range p.routes {
			return k
		}
	}
	return s.Peer
}

// receive tells STUN and data apart until the socket is closed.
func (p *PacketConn) receive() error {
	b := make([]byte, MaxDatagram)
	var unknown punch.Path // of which Local says nothing
	for {
		n, from, err := p.udp.ReadFromUDPAddrPort(b)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			continue // one host that refuses is no reason to end
		}
		if isSTUN(b[:n]) {
			p.agent.Receive(b[:n], from, unknown.Local)
			continue
		}
		peer, ok := p.sender(from)
		if !ok {
			continue
		}
		select {
		case p.inbox <- datagram{peer, append([]byte(nil), b[:n]...)}:
		default:
		}
	}
}

// isSTUN tells a STUN message by its first byte and its cookie (RFC 7983 and RFC
// 8489 section 5).
func isSTUN(b []byte) bool {
	const header, cookie = 20, 0x2112A442
	return len(b) >= header && b[0] < 4 && binary.BigEndian.Uint32(b[4:]) == cookie
}

// sender tells who is at an address. Only who has proven it is remembered.
func (p *PacketConn) sender(from netip.AddrPort) (punch.Key, bool) {
	now := time.Now()
	p.mu.Lock()
	s, ok := p.senders[from]
	p.mu.Unlock()
	if ok && now.Before(s.until) {
		return s.peer, true
	}
	k, ok := p.agent.PeerAt(from)
	if !ok {
		return k, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.senders) >= maxSenders {
		clear(p.senders)
	}
	p.senders[from] = sender{k, now.Add(provenFor)}
	return k, true
}

func (p *PacketConn) onPath(path punch.Path) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.routes[path.Peer]; r != nil {
		r.to = path.Addr
	}
}

// activity counts what was sent only: data that comes proves nothing, since
// nobody has authenticated it. So the agent checks the path while data goes out.
func (p *PacketConn) activity(k punch.Key) punch.Activity {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.routes[k]; r != nil {
		return punch.Activity{Sent: r.sent}
	}
	return punch.Activity{}
}

// Connect adds a peer and waits until there is a path to it. The peer has to do
// the same, now or later. Without a path the peer stays when ctx ends, and may
// yet be reached.
func (p *PacketConn) Connect(ctx context.Context, k punch.Key) error {
	p.mu.Lock()
	if p.routes[k] == nil {
		p.routes[k] = &route{}
	}
	p.mu.Unlock()
	p.agent.SetPeer(punch.Peer{Key: k, Nonce: nonceOf(p.cfg.Group, k), Online: true})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.ending, cancel)()
	_, err := p.agent.Ping(ctx, k)
	if p.ending.Err() != nil {
		return net.ErrClosed
	}
	return err
}

// Remove forgets a peer.
func (p *PacketConn) Remove(k punch.Key) {
	p.agent.RemovePeer(k)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.routes, k)
	clear(p.senders)
}

// Path is how a peer is reached now. False means that it is not.
func (p *PacketConn) Path(k punch.Key) (punch.Path, bool) { return p.agent.Path(k) }

// ReadFrom implements net.PacketConn. The address is an Addr. What does not fit
// into b is lost.
func (p *PacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	ended := p.read.done()
	if closed(ended) {
		return 0, nil, os.ErrDeadlineExceeded
	}
	select {
	case d := <-p.inbox:
		return copy(b, d.b), Addr{d.from}, nil
	case <-ended:
		return 0, nil, os.ErrDeadlineExceeded
	case <-p.ending.Done():
		return 0, nil, net.ErrClosed
	}
}

// WriteTo implements net.PacketConn. The address is an Addr of a peer that was
// named to Connect. While there is no path the datagram is lost.
func (p *PacketConn) WriteTo(b []byte, to net.Addr) (int, error) {
	a, ok := to.(Addr)
	switch {
	case p.ending.Err() != nil:
		return 0, net.ErrClosed
	case closed(p.write.done()):
		return 0, os.ErrDeadlineExceeded
	case len(b) > MaxDatagram:
		return 0, errSize
	case isSTUN(b):
		return 0, errSTUN
	case !ok:
		return 0, fmt.Errorf("write to %v: %w", to, errUnknown)
	}
	addr, demand, err := p.route(a.Key)
	if err != nil {
		return 0, err
	}
	if demand {
		p.agent.Demand(a.Key)
	}
	if !addr.IsValid() {
		// The agent tells of a path a moment after Connect may have returned.
		path, ok := p.agent.Path(a.Key)
		if !ok {
			return len(b), nil
		}
		addr = path.Addr
	}
	return p.udp.WriteToUDPAddrPort(b, addr)
}

// route gives the way to a peer for one datagram, and says whether to tell the
// agent of it.
func (p *PacketConn) route(k punch.Key) (to netip.AddrPort, demand bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.routes[k]
	if r == nil {
		return to, false, fmt.Errorf("write to %x: %w", k[:4], errUnknown)
	}
	r.sent++
	now := time.Now()
	if demand = now.Sub(r.wanted) >= tellEvery; demand {
		r.wanted = now
	}
	return r.to, demand, nil
}

// Close ends all paths; what waits in ReadFrom and Connect returns.
func (p *PacketConn) Close() error {
	if p.ending.Err() != nil {
		return net.ErrClosed
	}
	p.cancel()
	err := p.udp.Close()
	return errors.Join(err, p.group.Wait())
}

// LocalAddr implements net.PacketConn: the address of the UDP socket.
func (p *PacketConn) LocalAddr() net.Addr { return p.udp.LocalAddr() }

// SetDeadline implements net.PacketConn.
func (p *PacketConn) SetDeadline(t time.Time) error {
	p.read.set(t)
	p.write.set(t)
	return nil
}

// SetReadDeadline implements net.PacketConn.
func (p *PacketConn) SetReadDeadline(t time.Time) error {
	p.read.set(t)
	return nil
}

// SetWriteDeadline implements net.PacketConn. Writing never waits, so only a time
// that has passed has an effect.
func (p *PacketConn) SetWriteDeadline(t time.Time) error {
	p.write.set(t)
	return nil
}
