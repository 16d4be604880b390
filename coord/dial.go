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
	// Log gets failed attempts at Debug; nil drops them.
	Log *slog.Logger

	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)
	connect func(ctx context.Context, addr netip.AddrPort) (net.Conn, error)
}

// Dial connects to the first server that answers with an accepted key. It
// fails with the ReachError or, before any other, the PinError that says most.
func (d *Dialer) Dial(ctx context.Context) (*Conn, error) {
	cert, err := deviceCertificate(d.Device)
	if err != nil {
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
	cert   tls.Certificate
}

// server tries all addresses of one server within its share of the time left.
func (d *Dialer) server(ctx context.Context, t target, shares int) (*Conn, error) {
	deadline, _ := ctx.Deadline()
	ctx, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(shares))
	defer cancel()
	addrs, err := d.resolve(ctx, &t)
	if err != nil {
		return nil, &ReachError{Stage: StageDNS, Server: t.server, Err: err}
	}
	conn, err := d.race(ctx, t, addrs)
	if err != nil {
		return nil, err
	}
	c := newConn(conn, t.server)
	c.hosts = hosts(c.RemoteAddr().Addr(), addrs)
	return c, nil
}

// hosts is the address in use and, when the name has one, an address of the
// other family.
func hosts(used netip.Addr, all []netip.AddrPort) []netip.Addr {
	list := []netip.Addr{used}
	for _, a := range all {
		if a.Addr().Is4() != used.Is4() {
			return append(list, a.Addr())
		}
	}
	return list
}

// resolve gives the addresses of t and sets t.host.
func (d *Dialer) resolve(ctx context.Context, t *target) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(t.server)
	if err != nil {
		return nil, fmt.Errorf("%q is not host:port", t.server)
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return nil, fmt.Errorf("%q is not a port", service)
	}
	t.host = host
	addrs := make([]netip.Addr, 1)
	if addrs[0], err = netip.ParseAddr(host); err != nil {
		if addrs, err = d.lookupHost(ctx, host); err != nil {
			return nil, err
		}
	}
	all := make([]netip.AddrPort, 0, maxAddresses)
	for _, a := range alternate(addrs)[:min(len(addrs), maxAddresses)] {
		all = append(all, netip.AddrPortFrom(a.Unmap(), uint16(port)))
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

// outcome is the end of one attempt.
type outcome struct {
	conn *tls.Conn
	err  error
}

// race gives the first address that completes TLS. All attempts have ended
// when it returns.
func (d *Dialer) race(ctx context.Context, t target, addrs []netip.AddrPort) (*tls.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	outcomes := make(chan outcome, len(addrs))
	var attempts sync.WaitGroup
	won := outcome{err: &ReachError{Stage: StageDNS, Server: t.server, Err: errNoAddress}}
	started, ended := 0, 0
	for won.conn == nil && ended < len(addrs) {
		var next <-chan time.Time
		if started < len(addrs) {
			addr := addrs[started]
			attempts.Go(func() { outcomes <- d.attempt(ctx, t, addr) })
			started++
			next = time.After(headStart)
		}
		select {
		case <-next:
		case o := <-outcomes:
			ended++
			if o.err == nil || rank(o.err) > rank(won.err) {
				won = o
			}
		}
	}
	cancel()
	attempts.Wait()
	close(outcomes)
	for late := range outcomes {
		if late.conn != nil {
			_ = late.conn.NetConn().Close()
		}
	}
	if failed, ok := errors.AsType[*ReachError](won.err); ok {
		failed.Tried = addrs
	}
	return won.conn, won.err
}

// attempt does TCP and TLS with one address.
func (d *Dialer) attempt(ctx context.Context, t target, addr netip.AddrPort) outcome {
	ctx, cancel := context.WithTimeout(ctx, addressTimeout)
	defer cancel()
	raw, err := d.dialTCP(ctx, addr)
	if err != nil {
		return outcome{err: &ReachError{Stage: StageTCP, Server: t.server, Err: err}}
	}
	conn := tls.Client(raw, d.config(t))
	err = conn.HandshakeContext(ctx)
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
	if d.connect != nil {
		return d.connect(ctx, addr)
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
