package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

const (
	dialTimeout  = 10 * time.Second // TCP, TLS and the upgrade
	admitTimeout = 5 * time.Second
	minBackoff   = 200 * time.Millisecond
	maxBackoff   = 5 * time.Second
	// TCP repeats by itself, and has more on its way, so it may be silent for
	// longer.
	minPatienceTLS = time.Second
	minDeadTLS     = 3 * time.Second
	lingers        = 2 * time.Second // what is on its way when UDP takes over still arrives
)

var (
	errSilent    = errors.New("no answer over TLS")
	errNotAdmits = errors.New("the relay did not admit the device over TLS in time")
)

// dial is an attempt to connect.
type dial struct{ cancel context.CancelFunc }

// tlsSide is what is known of the way over TLS.
type tlsSide struct {
	link     *framed       // admitted; frames go there
	fresh    *framed       // connected, to be admitted
	dialled  time.Time     // when fresh was
	dial     *dial         // under way
	next     time.Time     // not dialled before
	backoff  time.Duration // after the next failure
	rtt      time.Duration
	asked    int // pings without answer
	first    time.Time
	ping     time.Time // when the next one leaves
	patience time.Duration
	heard    uint64    // what link had received at first
	claim    uint64    // counter of the newest request that made the relay send over TLS
	linger   time.Time // when link is closed, since UDP took over
	err      error
}

// restart asks at once.
func (t *tlsSide) restart(now time.Time, patience time.Duration) {
	t.asked, t.ping, t.patience = 0, now, patience
}

// unanswered says when nothing has come for a time since a ping; zero: there is
// no question.
func (t *tlsSide) unanswered(d time.Duration) time.Time {
	if t.asked == 0 || t.link == nil || t.link.heard.Load() != t.heard {
		return time.Time{}
	}
	return t.first.Add(d)
}

// stepTLS does what is due on the way over TLS.
func (c *Client) stepTLS() {
	t := &c.tls
	if t.fresh != nil && c.due(t.dialled.Add(admitTimeout)) {
		t.fresh.close()
		t.fresh = nil
		c.failed(errNotAdmits)
	}
	if t.link != nil && c.due(t.linger) {
		c.closeLink()
	}
	if c.active == TLS && t.link != nil {
		c.stepPing()
	}
	if c.wantsTLS() && t.dial == nil && t.fresh == nil && (t.next.IsZero() || c.due(t.next)) {
		c.dial()
	}
}

func (c *Client) stepPing() {
	t := &c.tls
	if c.due(t.unanswered(max(5*t.rtt, minDeadTLS))) {
		c.closeLink()
		c.lostTLS(errSilent)
		return
	}
	if !c.due(t.ping) {
		return
	}
	if t.asked > 0 && t.link.heard.Load() != t.heard {
		t.asked = 0 // it carries
		t.ping = c.now.Add(jitter(pingEvery))
		c.due(t.ping)
		return
	}
	c.sendHello(request{link: t.link}, cookie{})
	if t.asked++; t.asked == 1 {
		t.first, t.heard = c.now, t.link.heard.Load()
	}
	t.ping = c.now.Add(time.Second)
}

// wantsTLS reports whether the ways there are do not answer.
func (c *Client) wantsTLS() bool {
	if c.cfg.Dial == nil {
		return false
	}
	switch c.active {
	case UDP:
		return c.tls.link == nil && c.due(c.udp.unanswered(c.udp.patience))
	case TLS:
		return c.due(c.tls.unanswered(c.tls.patience))
	default:
		return len(c.addrs) == 0 || c.due(c.udp.unanswered(c.udp.patience))
	}
}

// dial connects in a goroutine of its own.
func (c *Client) dial() {
	ctx, cancel := context.WithTimeout(c.ctx, dialTimeout)
	d := &dial{cancel}
	c.tls.dial = d
	c.group.Go(func() error {
		defer cancel()
		conn, binding, err := c.cfg.Dial(ctx)
		if !c.connected(d, conn, binding, err) && conn != nil {
			_ = conn.Close() // nobody wants it
		}
		return nil
	})
}

// connected takes the result of a dial, and says false when nobody wants the
// connection.
func (c *Client) connected(d *dial, conn net.Conn, binding [16]byte, err error) bool {
	if !c.enter() {
		return false
	}
	defer c.leave()
	t := &c.tls
	if t.dial != d {
		return false
	}
	t.dial = nil
	if err != nil {
		c.failed(err)
		return false
	}
	link := newFramed(conn, c.group, &c.lender, c.cfg.Log)
	t.fresh, t.dialled = link, c.now
	c.group.Go(func() error { c.readLink(link); return nil })
	c.sendAdmit(request{link: link}, cookie(binding))
	return true
}

// readLink hands on what comes over TLS until the connection ends.
func (c *Client) readLink(link *framed) {
	err := link.read(func(run []byte) error {
		if run[framePrefix] == FlowByte {
			c.cfg.Deliver(run)
		} else if c.enter() {
			c.answer(run[framePrefix:], netip.AddrPort{}, link)
			c.leave()
		}
		return nil
	})
	link.close()
	if !c.enter() {
		return
	}
	defer c.leave()
	switch link {
	case c.tls.fresh:
		c.tls.fresh = nil
		c.failed(err)
	case c.tls.link:
		c.tls.link, c.tls.linger = nil, time.Time{}
		if c.tls.fresh == nil { // else the relay may have closed it in favour of that
			c.lostTLS(err)
		}
	}
}

// pongedTLS takes a PONG over TLS.
func (c *Client) pongedTLS(q request) {
	t := &c.tls
	switch q.link {
	case t.fresh:
		if t.link != nil {
			t.link.close()
		}
		t.link, t.fresh, t.linger, t.backoff, t.err, t.rtt = q.link, nil, time.Time{}, 0, nil, 0
		if c.active == UDP && c.udp.asked == 0 {
			c.udp.next = c.now // UDP answered meanwhile: back to it
		} else {
			c.active = TLS
			c.reopen()
		}
	case t.link:
		c.cancelDial() // of one to take its place
	default:
		return
	}
	t.rtt = smooth(t.rtt, c.now.Sub(q.at))
	t.restart(c.now.Add(jitter(pingEvery)), max(3*t.rtt, minPatienceTLS))
}

// toTLS goes back to the connection that UDP had taken over from.
func (c *Client) toTLS() {
	c.active = TLS
	c.tls.linger = time.Time{}
	c.tls.restart(c.now, max(3*c.tls.rtt, minPatienceTLS))
}

// lostTLS looks for another way after the connection ended.
func (c *Client) lostTLS(err error) {
	c.tls.err = fmt.Errorf("tls to the relay: %w", err)
	if c.active == TLS {
		c.active = None
		c.tls.next = c.now
		c.udp.restart(c.now, raceAfter)
	}
}

// failed makes the next dial wait.
func (c *Client) failed(err error) {
	t := &c.tls
	if t.link == nil {
		c.lostTLS(err)
	}
	t.err = fmt.Errorf("tls to the relay: %w", err)
	t.backoff = min(max(2*t.backoff, minBackoff), maxBackoff)
	if pause := c.now.Add(jitter(t.backoff)); pause.After(t.next) {
		t.next = pause
	}
}

func (c *Client) cancelDial() {
	if c.tls.dial != nil {
		c.tls.dial.cancel()
		c.tls.dial = nil
	}
}

func (c *Client) closeLink() {
	if c.tls.link != nil {
		c.tls.link.close()
		c.tls.link, c.tls.linger = nil, time.Time{}
	}
}

// trouble says why there is no way: what both ways failed of.
func (c *Client) trouble() error {
	udp := c.udp.err
	if c.tlsOnly() {
		udp = errLong
	}
	switch {
	case c.refusal != nil:
		return c.refusal
	case c.tls.err == nil:
		return udp
	case udp == nil:
		return c.tls.err
	default:
		return fmt.Errorf("%w; %w", udp, c.tls.err)
	}
}

// troubleUDP says why there is no way over UDP.
func (c *Client) troubleUDP() error {
	switch {
	case c.tlsOnly():
		return errLong
	case c.refusal != nil:
		return c.refusal
	case c.udp.err != nil:
		return c.udp.err
	default:
		return errNoAnswer
	}
}
