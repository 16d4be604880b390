package direct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

// Times and bounds of DialTCP.
const (
	// MaxAddresses is how many addresses of one side are tried.
	MaxAddresses = 4
	// connectFor is how long connecting is tried once both sides are ready.
	connectFor = 5 * time.Second
	// An attempt that nobody refuses lasts firstAttempt, and each next one half as
	// long again: a round trip has to fit, and a lost SYN has to be repeated.
	firstAttempt = 500 * time.Millisecond
	// A new attempt begins between minPause and maxPause after a refusal.
	minPause = 100 * time.Millisecond
	maxPause = 300 * time.Millisecond
	// mappedFor is how long the own address is looked for.
	mappedFor = 3 * time.Second
	// Keepalive of the connection, which also holds the NATs' mappings.
	aliveIdle, aliveInterval, aliveCount = 20 * time.Second, 5 * time.Second, 3
)

var (
	errNoTCP     = errors.New("no connection came about")
	errNoMapping = errors.New("no own address to offer")
)

// TCPConfig is what both sides of DialTCP tell. PrivateKey, Peer and Send are
// needed.
type TCPConfig struct {
	PrivateKey [32]byte  // X25519
	Group      [32]byte  // as in Config
	Peer       punch.Key // the other side
	// Servers are STUN servers that are asked over TCP (RFC 8489 section 6.2.2),
	// the first of each family.
	Servers []netip.AddrPort
	// Mapped, where it is not nil, tells instead how the world sees connections
	// from a local port: it opens one with Dial and keeps it until it is closed.
	Mapped func(ctx context.Context, port uint16) (netip.AddrPort, io.Closer, error)
	// Allowed says which addresses of the peer may be tried; nil: all.
	Allowed func(netip.AddrPort) bool
	// Send carries a sealed message to the other side's Signals. It may be lost, and
	// Send must not wait for the other side.
	Send func([]byte) error
	// Signals are what the other side sent; it is not to be closed.
	Signals <-chan []byte
	Log     *slog.Logger // gets what happens, at Debug; nil: silent
}

// DialTCP connects to a peer that does the same at about the same time, through
// NATs that drop what they do not expect without a word: both sides connect at
// once from the port that a server saw, so that each SYN is to the other's NAT
// the answer to its own (RFC 5382 REQ-2, RFC 9293 section 3.5). It waits for the
// peer until ctx ends, and tries for 5 s from then on. NATs that reset what they
// do not expect, or give each destination another port, do not let it through.
//
// Both sides have proven to each other who they are when it returns. What follows
// is neither encrypted nor authenticated.
func DialTCP(ctx context.Context, c TCPConfig) (net.Conn, error) {
	d, err := newDialing(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("dial tcp: %w", err)
	}
	conn, err := d.run(ctx)
	if err = errors.Join(err, d.close()); err != nil {
		if conn != nil {
			_ = conn.Close()
		}
		return nil, fmt.Errorf("dial tcp: %w", err)
	}
	return conn, nil
}

// dialing is one DialTCP.
type dialing struct {
	TCPConfig
	pair     *pairing
	listener net.Listener // on the port that connections leave from, too
	port     uint16
	mapped   []netip.AddrPort
	seen     []io.Closer // connections that keep the own mappings open
}

func newDialing(ctx context.Context, c TCPConfig) (*dialing, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Send == nil {
		return nil, errSend
	}
	pair, err := newPairing(c)
	if err != nil {
		return nil, err
	}
	listener, err := listenReused(ctx)
	if err != nil {
		return nil, err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	return &dialing{TCPConfig: c, pair: pair, listener: listener, port: uint16(port)}, nil
}

func listenReused(ctx context.Context) (net.Listener, error) {
	l := net.ListenConfig{Control: reuse, KeepAliveConfig: keepAlive()}
	l.SetMultipathTCP(false) // it does not open simultaneously
	return l.Listen(ctx, "tcp", ":0")
}

// DialFrom connects to an address from a local TCP port that other connections
// and a listener use, too.
func DialFrom(ctx context.Context, port uint16, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{Port: int(port)}, Control: reuse, KeepAliveConfig: keepAlive()}
	d.SetMultipathTCP(false)
	return d.DialContext(ctx, "tcp", to.String())
}

func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: aliveIdle, Interval: aliveInterval, Count: aliveCount}
}

func (d *dialing) close() error {
	err := d.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	for _, c := range d.seen {
		_ = c.Close() // what it was for is over
	}
	return err
}

// run finds the own addresses, tells them, learns the peer's and connects.
func (d *dialing) run(ctx context.Context) (net.Conn, error) {
	own, err := d.discover(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	ready := make(chan offer, 1)
	g.Go(func() error { return d.exchange(ctx, own, ready) })
	var conn net.Conn
	g.Go(func() (err error) {
		defer cancel()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case theirs := <-ready:
			conn, err = d.connect(ctx, theirs)
			return err
		}
	})
	err = g.Wait() // first: whether conn is read before or after is not specified
	return conn, err
}

// discover lists where the peer may reach this port.
func (d *dialing) discover(ctx context.Context) (offer, error) {
	ctx, cancel := context.WithTimeout(ctx, mappedFor)
	defer cancel()
	if d.Mapped != nil {
		a, keep, err := d.Mapped(ctx, d.port)
		if err != nil {
			d.Log.Debug("own tcp address unknown", "err", err)
		} else {
			d.mapped, d.seen = append(d.mapped, a), append(d.seen, keep)
		}
	} else {
		d.askServers(ctx)
	}
	own := offer{addrs: slices.Clone(d.mapped), mapped: len(d.mapped)}
	hosts, err := localAddrs(netip.IPv6Unspecified())
	if err != nil {
		return own, err
	}
	if len(d.mapped) > 0 && d.mapped[0].Addr().IsLoopback() {
		hosts = nil // both sides are on this machine
	}
	for _, h := range hosts {
		a := netip.AddrPortFrom(h.Addr().Unmap(), d.port)
		if len(own.addrs) < MaxAddresses && a.Addr().IsGlobalUnicast() && !slices.Contains(own.addrs, a) {
			own.addrs = append(own.addrs, a)
		}
	}
	if len(own.addrs) == 0 {
		return own, errNoMapping
	}
	return own, nil
}

// connect tries all addresses of the peer, and takes what comes from there,
// until one connection is agreed.
func (d *dialing) connect(ctx context.Context, theirs offer) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectFor)
	s := &shaking{proof: d.pair.proof(theirs.nonce), leads: d.pair.leads, won: make(chan net.Conn, 1)}
	g, ctx := errgroup.WithContext(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = d.listener.Close() })
	defer stop()
	g.Go(func() error { return d.accept(ctx, s, theirs) })
	for _, to := range theirs.addrs {
		if d.eligible(to, theirs) {
			d.Log.Debug("connecting", "to", to)
			g.Go(func() error { return d.repeat(ctx, s, to) })
		}
	}
	var conn net.Conn
	select {
	case conn = <-s.won:
	case <-ctx.Done():
	}
	cancel()
	_ = g.Wait() // all of it has ended because we did
	if conn == nil {
		select {
		case conn = <-s.won: // at the last moment
		default:
			return nil, errNoTCP
		}
	}
	return conn, nil
}

// eligible says whether an address of the peer is worth an attempt: private ones
// only where both sides are behind one router.
func (d *dialing) eligible(to netip.AddrPort, theirs offer) bool {
	if d.Allowed != nil && !d.Allowed(to) {
		return false
	}
	private := func(a netip.AddrPort) bool { return punch.Private(a.Addr()) }
	// Who says that a server saw it at a private address is believed where a server
	// sees us at one, too.
	inside := slices.Contains(theirs.addrs[:theirs.mapped], to) && slices.ContainsFunc(d.mapped, private)
	if !private(to) || inside {
		return true
	}
	return slices.ContainsFunc(theirs.addrs[:theirs.mapped], func(a netip.AddrPort) bool {
		return slices.ContainsFunc(d.mapped, func(own netip.AddrPort) bool { return own.Addr() == a.Addr() })
	})
}

// repeat connects to one address until ctx ends.
func (d *dialing) repeat(ctx context.Context, s *shaking, to netip.AddrPort) error {
	for limit := firstAttempt; ctx.Err() == nil; limit += limit / 2 {
		once, cancel := context.WithTimeout(ctx, limit)
		conn, err := DialFrom(once, d.port, to)
		late := once.Err() != nil
		cancel()
		if err == nil {
			s.shake(ctx, conn)
		} else {
			d.Log.Debug("not connected", "to", to, "err", err)
		}
		pause := minPause + rand.N(maxPause-minPause)
		if late {
			pause = rand.N(minPause)
		}
		rest(ctx, pause)
	}
	return nil
}

func rest(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// accept takes connections that come from an address of the peer.
func (d *dialing) accept(ctx context.Context, s *shaking, theirs offer) error {
	var g errgroup.Group
	g.SetLimit(2 * MaxAddresses)
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return g.Wait()
		}
		from := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		named := slices.ContainsFunc(theirs.addrs, func(a netip.AddrPort) bool { return a.Addr() == from })
		if !named || !g.TryGo(func() error { s.shake(ctx, conn); return nil }) {
			_ = conn.Close()
		}
	}
}
