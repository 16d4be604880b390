package coord

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"overlay/coord/trust"
)

// Times and bounds of reaching a server.
const (
	DialTimeout    = 10 * time.Second // all servers and addresses together
	addressTimeout = 5 * time.Second  // TCP and TLS of one address
	headStart      = 250 * time.Millisecond
	maxAddresses   = 8 // of one host; DNS may answer with any number

	// A router that forgot the connection is noticed by the kernel's probes:
	// the server answers them with a reset, or nobody does.
	probeIdle      = 10 * time.Second
	probeInterval  = 5 * time.Second
	probeCount     = 2
	unacknowledged = 10 * time.Second
)

// Dialer reaches a coordination server. It is safe for concurrent use once its
// fields are set.
type Dialer struct {
	// Servers are host:port, tried in this order; the addresses of one host
	// are tried side by side, each with a short head start on the next.
	Servers []string
	// Device proves who connects.
	Device ed25519.PrivateKey
	// Verify judges the SHA-256 of the server's SubjectPublicKeyInfo before
	// the device shows itself. Nil accepts any: the caller then checks
	// Conn.Pin before it sends anything.
	Verify func(pin trust.Hash) error
	// Proxy is an HTTP proxy, http://[user:password@]host[:port], that is asked
	// with CONNECT for a way to the server by the server's name. It is tried
	// first, the direct way a moment later, and the first to succeed is taken.
	// Nil: no proxy.
	Proxy *url.URL
	// Log gets failed attempts at Debug; nil drops them.
	Log *slog.Logger

	// Connect opens TCP to an address of a server or proxy; nil: from any port,
	// with probes that notice a router that forgot the connection.
	Connect func(ctx context.Context, addr netip.AddrPort) (net.Conn, error)

	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Dial connects to the first server that answers with an accepted key. It
// fails with the ReachError or, before any other, the PinError that says most.
func (d *Dialer) Dial(ctx context.Context) (*Conn, error) {
	cert, err := deviceCertificate(d.Device)
	if err != nil {
		return nil, err
	}
	if err := checkProxy(d.Proxy); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	worst := errors.New("no server is known")
	for i, server := range d.Servers {
		c, err := d.server(ctx, target{server: server, cert: cert}, len(d.Servers)-i)
		if err == nil {
			return c, nil
		}
		d.log().Debug("server not reached", "server", server, "err", err)
		if i == 0 || rank(err) > rank(worst) {
			worst = err
		}
	}
	return nil, worst
}

func (d *Dialer) log() *slog.Logger {
	if d.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return d.Log
}

// target is one server while it is tried.
type target struct {
	server string // host:port
	host   string
	port   uint16
	cert   tls.Certificate
	found  *search
}

// server tries all ways to one server within its share of the time left.
func (d *Dialer) server(ctx context.Context, t target, shares int) (*Conn, error) {
	deadline, _ := ctx.Deadline()
	ctx, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(shares))
	if err := t.split(ctx); err != nil {
		cancel()
		return nil, &ReachError{Stage: StageDNS, Server: t.server, Err: err}
	}
	t.found = d.search(ctx, t)
	defer t.found.end(cancel)
	won := d.ways(ctx, t)
	if won.err != nil {
		return nil, won.err
	}
	c := newConn(won.conn, t.server)
	c.proxy = won.proxy
	if c.Proxied() {
		c.hosts = hosts(netip.Addr{}, t.found.sofar())
	} else {
		c.hosts = hosts(c.RemoteAddr().Addr(), t.found.sofar())
	}
	return c, nil
}

// ways goes to the server by the proxy if there is one, and directly.
func (d *Dialer) ways(ctx context.Context, t target) outcome {
	if d.Proxy == nil {
		return d.direct(ctx, t)
	}
	return race(ctx, []attempt{
		func(ctx context.Context) outcome { return d.proxied(ctx, t) },
		func(ctx context.Context) outcome { return d.direct(ctx, t) },
	})
}

// hosts is the address in use, if any, and of every other family the first
// address that the name has.
func hosts(used netip.Addr, all []netip.AddrPort) []netip.Addr {
	var list []netip.Addr
	if used.IsValid() {
		list = append(list, used)
	}
	for _, a := range all {
		same := func(h netip.Addr) bool { return h.Is4() == a.Addr().Is4() }
		if !slices.ContainsFunc(list, same) {
			list = append(list, a.Addr())
		}
	}
	return list
}

// split sets host and port.
func (t *target) split(ctx context.Context) error {
	host, service, err := net.SplitHostPort(t.server)
	if err != nil {
		return fmt.Errorf("%q is not host:port", t.server)
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return fmt.Errorf("%q is not a port", service)
	}
	t.host, t.port = host, uint16(port)
	return nil
}

// search is the look-up of a server's addresses, which goes on beside an
// attempt by a proxy: that one does not need it.
type search struct {
	group sync.WaitGroup
	done  chan struct{}
	addrs []netip.AddrPort // once done
	err   error
}

func (d *Dialer) search(ctx context.Context, t target) *search {
	s := &search{done: make(chan struct{})}
	find := func() {
		s.addrs, s.err = d.resolve(ctx, t.host, t.port)
		close(s.done)
	}
	if _, err := netip.ParseAddr(t.host); err == nil {
		find()
	} else {
		s.group.Go(find)
	}
	return s
}

// wait gives what was found.
func (s *search) wait(ctx context.Context) ([]netip.AddrPort, error) {
	select {
	case <-s.done:
		return s.addrs, s.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// sofar gives what is found already.
func (s *search) sofar() []netip.AddrPort {
	select {
	case <-s.done:
		return s.addrs
	default:
		return nil
	}
}

func (s *search) end(cancel context.CancelFunc) {
	cancel()
	s.group.Wait()
}

// resolve gives the addresses of a host.
func (d *Dialer) resolve(ctx context.Context, host string, port uint16) ([]netip.AddrPort, error) {
	addrs := make([]netip.Addr, 1)
	var err error
	if addrs[0], err = netip.ParseAddr(host); err != nil {
		if addrs, err = d.lookupHost(ctx, host); err != nil {
			return nil, err
		}
	}
	all := make([]netip.AddrPort, 0, maxAddresses)
	for _, a := range alternate(addrs)[:min(len(addrs), maxAddresses)] {
		all = append(all, netip.AddrPortFrom(a.Unmap(), port))
	}
	return all, nil
}

func (d *Dialer) lookupHost(ctx context.Context, host string) ([]netip.Addr, error) {
	if d.lookup != nil {
		return d.lookup(ctx, host)
	}
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// alternate orders addresses so that the families take turns, the family of
// the first one first (RFC 8305 section 4): a broken IPv6 costs one head start.
func alternate(addrs []netip.Addr) []netip.Addr {
	var families [2][]netip.Addr
	for _, a := range addrs {
		i := 0
		if a.Unmap().Is4() != addrs[0].Unmap().Is4() {
			i = 1
		}
		families[i] = append(families[i], a)
	}
	out := make([]netip.Addr, 0, len(addrs))
	for len(out) < len(addrs) {
		for i := range families {
			if len(families[i]) > 0 {
				out = append(out, families[i][0])
				families[i] = families[i][1:]
			}
		}
	}
	return out
}

// attempt is one way to a server.
type attempt func(context.Context) outcome

// outcome is the end of one attempt.
type outcome struct {
	conn  *tls.Conn
	proxy string // host:port of the proxy that leads to the server; empty: none
	err   error
}

// race gives the first attempt that completes TLS; each has a head start on the
// next. All have ended when it returns.
func race(ctx context.Context, attempts []attempt) outcome {
	ctx, cancel := context.WithCancel(ctx)
	outcomes := make(chan outcome, len(attempts))
	var running sync.WaitGroup
	won := outcome{err: errNoAddress}
	started, ended := 0, 0
	for won.conn == nil && ended < len(attempts) {
		var next <-chan time.Time
		if started < len(attempts) {
			try := attempts[started]
			running.Go(func() { outcomes <- try(ctx) })
			started++
			next = time.After(headStart)
		}
		select {
		case <-next:
		case o := <-outcomes:
			ended++
			if o.err == nil || ended == 1 || rank(o.err) > rank(won.err) {
				won = o
			}
		}
	}
	cancel()
	running.Wait()
	close(outcomes)
	for late := range outcomes {
		if late.conn != nil {
			_ = late.conn.NetConn().Close()
		}
	}
	return won
}

// direct tries the addresses of the server side by side.
func (d *Dialer) direct(ctx context.Context, t target) outcome {
	addrs, err := t.found.wait(ctx)
	if err == nil && len(addrs) == 0 {
		err = errNoAddress
	}
	if err != nil {
		return outcome{err: &ReachError{Stage: StageDNS, Server: t.server, Err: err}}
	}
	attempts := make([]attempt, len(addrs))
	for i, addr := range addrs {
		attempts[i] = func(ctx context.Context) outcome { return d.address(ctx, t, addr) }
	}
	won := race(ctx, attempts)
	if failed, ok := errors.AsType[*ReachError](won.err); ok {
		failed.Tried = addrs
	}
	return won
}

// address does TCP and TLS with one address.
func (d *Dialer) address(ctx context.Context, t target, addr netip.AddrPort) outcome {
	ctx, cancel := context.WithTimeout(ctx, addressTimeout)
	defer cancel()
	raw, err := d.dialTCP(ctx, addr)
	if err != nil {
		return outcome{err: &ReachError{Stage: StageTCP, Server: t.server, Err: err}}
	}
	return d.secure(ctx, t, raw)
}

// secure does TLS on a connection that leads to the server.
func (d *Dialer) secure(ctx context.Context, t target, raw net.Conn) outcome {
	conn := tls.Client(raw, d.config(t))
	err := conn.HandshakeContext(ctx)
	if err == nil {
		return outcome{conn: conn}
	}
	_ = raw.Close()
	if _, ok := errors.AsType[*PinError](err); ok {
		return outcome{err: err}
	}
	return outcome{err: &ReachError{Stage: StageTLS, Server: t.server, Err: err}}
}

func (d *Dialer) dialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	if d.Connect != nil {
		return d.Connect(ctx, addr)
	}
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeIdle, Interval: probeInterval, Count: probeCount},
		Control:         boundUnacknowledged,
	}
	return dialer.DialContext(ctx, "tcp", addr.String())
}

// boundUnacknowledged makes the kernel give up a connection whose data nobody
// acknowledges, which by default takes it a quarter of an hour (RFC 5482).
func boundUnacknowledged(_, _ string, c syscall.RawConn) error {
	var err error
	ctl := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacknowledged/time.Millisecond))
	})
	return errors.Join(ctl, err)
}

// config is TLS 1.3 with the standard library's curves (X25519MLKEM768 first).
// The key is checked instead of a chain of certificates, and before the client
// certificate is sent, so that a stranger does not learn who connects.
func (d *Dialer) config(t target) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"http/1.1"},
		ServerName:         t.host,
		Certificates:       []tls.Certificate{t.cert},
		InsecureSkipVerify: true, // VerifyConnection does it
		VerifyConnection: func(cs tls.ConnectionState) error {
			return d.verify(t.server, pinOf(cs.PeerCertificates[0]))
		},
	}
}

func (d *Dialer) verify(server string, pin trust.Hash) error {
	if d.Verify == nil {
		return nil
	}
	err := d.Verify(pin)
	if err == nil {
		return nil
	}
	wrong := &PinError{Server: server, Got: pin, Err: err}
	if said, ok := errors.AsType[*PinError](err); ok {
		wrong.Want, wrong.Err = said.Want, said.Err
	}
	return wrong
}
