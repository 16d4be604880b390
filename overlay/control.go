package overlay

import (
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/tun"
)

var errNoServer = errors.New("not connected to the coordination server")

// outboxSize bounds the signals that wait for the stream; more are refused.
const outboxSize = 128

// Waits between attempts to reach the server.
const (
	firstRetry  = 200 * time.Millisecond
	lastRetry   = 2 * time.Second
	dialTimeout = 10 * time.Second
)

// control keeps the stream to the coordination server: it dials, resumes,
// hands events in and carries records and signals out.
type control struct {
	device  ed25519.PrivateKey
	nonce   punch.Nonce
	servers func() []string
	verify  func(trust.Hash) error
	proxy   *url.URL // nil: none
	// candidates are the own ones, with the newest tokens.
	candidates func() []punch.Candidate
	// takes is what this node takes beyond the plain WireGuard format.
	takes func() tun.Capabilities
	// relays are those this node keeps a link to, its home first; nil: none ever.
	relays func() []trust.RelayTrip
	// relayPort is where this node relays for others, 0 nowhere; nil: nowhere ever.
	relayPort func() uint16
	// onWelcome and onEvent are called in order from one goroutine.
	onWelcome func(*coord.Welcome, *coord.Conn, []byte)
	onEvent   func(coord.Event)
	// onState is told at every change of connection; nil means connected.
	onState func(error)
	log     *slog.Logger

	kick   chan struct{}
	stale  chan struct{} // the record is to be published anew; never lost
	outbox chan coord.Report

	mu     sync.Mutex
	stream *coord.Stream
	server string // host:port of the stream
	local  netip.AddrPort
	remote netip.AddrPort
	serial uint64
}

// run connects, again and again, until ctx ends.
func (c *control) run(ctx context.Context) error {
	resume, wait := "", firstRetry
	for ctx.Err() == nil {
		start := time.Now()
		err := c.connect(ctx, &resume)
		if ctx.Err() != nil {
			return nil
		}
		c.log.Debug("server connection ended", "err", err)
		c.onState(err)
		if time.Since(start) > lastRetry {
			wait = firstRetry
		}
		if c.pause(ctx, wait) {
			wait = firstRetry
		} else {
			wait = min(2*wait, lastRetry)
		}
	}
	return nil
}

func (c *control) dialer() *coord.Dialer {
	return &coord.Dialer{Servers: c.servers(), Device: c.device, Verify: c.verify, Proxy: c.proxy, Log: c.log}
}

// once makes a connection for a request outside the stream.
func (c *control) once(ctx context.Context, do func(context.Context, *coord.Conn) error) error {
	conn, err := c.dialer().Dial(ctx)
	if err != nil {
		return err
	}
	return errors.Join(do(ctx, conn), conn.Close())
}

// pause waits with jitter; true when a network change cut it short.
func (c *control) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d/2 + rand.N(d))
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-c.kick:
		return true
	}
	return false
}

// connect holds one connection until it ends.
func (c *control) connect(ctx context.Context, resume *string) error {
	select {
	case <-c.kick: // older than this attempt
	default:
	}
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	stop := c.cancelOnKick(dctx, cancel)
	conn, err := c.dialer().Dial(dctx)
	if err != nil {
		stop()
		return err
	}
	stream, err := conn.Stream(dctx, *resume)
	stop()
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	c.attach(stream, conn)
	defer c.detach()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.send(gctx, stream) })
	g.Go(func() error {
		<-gctx.Done()
		return stream.Close()
	})
	g.Go(func() error { return c.receive(stream, conn, resume) })
	return g.Wait()
}

// cancelOnKick gives a dial up when the network changes under it.
func (c *control) cancelOnKick(ctx context.Context, cancel func()) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-c.kick:
			cancel()
			c.redial()
		case <-done:
		case <-ctx.Done():
		}
	})
	return func() { close(done); wg.Wait() }
}

func (c *control) attach(s *coord.Stream, conn *coord.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stream, c.server, c.local, c.remote = s, conn.Server(), conn.LocalAddr(), conn.RemoteAddr()
	for len(c.outbox) > 0 {
		<-c.outbox // frames of the old connection
	}
	select {
	case <-c.stale: // the Welcome asks for it again
	default:
	}
}

// connected names the server of the last connection.
func (c *control) connected() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.server
}

func (c *control) detach() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stream = nil
}

func (c *control) receive(s *coord.Stream, conn *coord.Conn, resume *string) error {
	for {
		e, err := s.Next()
		if err != nil {
			return err
		}
		switch {
		case e.Welcome != nil:
			c.onWelcome(e.Welcome, conn, s.STUNKey())
			c.publish()
		default:
			c.onEvent(e)
		}
		if e.Resume != "" {
			*resume = e.Resume
		}
	}
}

func (c *control) send(ctx context.Context, s *coord.Stream) error {
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-c.stale:
			err = c.sendRecord(s)
		case r := <-c.outbox:
			err = s.Signal(*r.Signal)
		}
		if err != nil {
			return err
		}
	}
}

func (c *control) sendRecord(s *coord.Stream) error {
	p, err := c.record()
	if err != nil {
		c.log.Warn("record not published", "err", err)
		return nil
	}
	return s.Publish(*p)
}

// signal queues a sealed message; it never blocks.
func (c *control) signal(to trust.Key, data []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stream == nil {
		return errNoServer
	}
	select {
	case c.outbox <- coord.Report{Signal: &coord.Signal{Peer: to, Data: data}}:
		return nil
	default:
		return errNoServer
	}
}

// publish has the record of the next moment signed and sent; it never blocks.
func (c *control) publish() {
	select {
	case c.stale <- struct{}{}:
	default: // it will be
	}
}

// record signs the record of this moment. Its serial is the time, but never
// below one that was given out: peers refuse lower ones for ever, and clocks
// are set back.
func (c *control) record() (*coord.Publish, error) {
	list, takes := c.candidates(), c.takes()
	var relays []trust.RelayTrip
	if c.relays != nil {
		relays = c.relays()
	}
	var port uint16
	if c.relayPort != nil {
		port = c.relayPort()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serial = max(c.serial+1, uint64(time.Now().UnixMilli()))
	rec := trust.Record{Serial: c.serial, Nonce: c.nonce, RelayPort: port, Capabilities: uint16(takes), Relays: relays}
	return newPublish(c.device, rec, list)
}

// published is the serial of the last record, 0 before the first.
func (c *control) published() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.serial
}

// serialGap is more than the serials that a crash can keep out of the cache.
const serialGap = 10_000

// resumeSerial goes on after the serial that an earlier run saved.
func (c *control) resumeSerial(saved uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serial = max(c.serial, min(saved, math.MaxUint64/2)+serialGap)
}

// newPublish completes a record and signs it, with those of the candidates that
// may be published: server-reflexive ones with their tokens, global IPv6
// addresses, and those that somebody mapped. Private addresses travel only in
// sealed signals.
func newPublish(device ed25519.PrivateKey, rec trust.Record, list []punch.Candidate) (*coord.Publish, error) {
	rec.Device = trust.Key(device.Public().(ed25519.PublicKey))
	var tokens [][]byte
	hosts := 0
	for _, cand := range list {
		switch {
		case cand.Type == punch.ServerReflexive && len(cand.Token) > 0:
			tokens = append(tokens, cand.Token)
		case cand.Type == punch.Host && globalIPv6(cand.Addr.Addr()) && hosts < maxHostIPv6:
			hosts++
		case cand.Type == punch.PortMapped:
		default:
			continue
		}
		rec.Candidates = append(rec.Candidates, trust.Endpoint{Addr: cand.Addr, Type: uint8(cand.Type)})
	}
	doc, err := trust.SignRecord(rec, device)
	return &coord.Publish{Record: doc, Tokens: tokens}, err
}

// maxHostIPv6 is how many global IPv6 host addresses a record may name.
const maxHostIPv6 = 2

func globalIPv6(a netip.Addr) bool {
	return a.Is6() && !a.Is4In6() && a.IsGlobalUnicast() && !a.IsPrivate()
}

// networkChanged reconnects at once when the way to the server, or to the proxy
// before it, is another one or when there was none.
func (c *control) networkChanged() {
	c.mu.Lock()
	connected, local, remote := c.stream != nil, c.local, c.remote
	c.mu.Unlock()
	if !connected || sourceFor(remote) != local.Addr() {
		c.reconnect()
	}
}

// reconnect drops the connection and makes a new one at once.
func (c *control) reconnect() {
	c.mu.Lock()
	s := c.stream
	c.stream = nil // what is queued now would be lost
	c.mu.Unlock()
	if s != nil {
		_ = s.Close()
	}
	c.redial()
}

// redial makes the next attempt happen now.
func (c *control) redial() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// sourceFor is the local address that packets to a server leave from; invalid
// when there is no route.
func sourceFor(to netip.AddrPort) netip.Addr {
	u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return netip.Addr{}
	}
	defer u.Close()
	a, _ := netip.AddrFromSlice(u.LocalAddr().(*net.UDPAddr).IP)
	return a.Unmap()
}
