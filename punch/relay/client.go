package relay

import (
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

// MaxAddrs is how many addresses of one relay a client tries.
const MaxAddrs = 8

// ClientConfig tells a Client what it needs. Its functions are called without
// locks held; none but Dial may block.
type ClientConfig struct {
	Relay      [32]byte           // the relay's X25519 public key
	PrivateKey [32]byte           // X25519, the node's WireGuard key
	Device     ed25519.PrivateKey // signs admissions
	// Credentials show the relay who the device is; opaque to this package. They
	// have at most MaxCredentials bytes. Those that make an admission longer than
	// MaxAdmission go over TLS only.
	Credentials []byte
	Boot        uint64 // higher at every start of the node

	// Send sends a datagram from the node's UDP port. It is called from Run.
	Send func(b []byte, to netip.AddrPort) error
	// Dial opens a TLS connection to the relay, upgraded to frames, and gives
	// the first 16 bytes of what it exports for the relay. nil: there is no TLS.
	Dial func(ctx context.Context) (net.Conn, [16]byte, error)
	// Tries is how many HELLOs without an answer an address gets, until there are
	// others, or the network changes. 0: no bound.
	Tries int
	// Deliver gets the flow frames that come over TLS: a concatenation of
	// 2-byte length and datagram, which is valid during the call.
	Deliver func(run []byte)
	// OnState is called from Run at every change of the state, in order.
	OnState func(State)
	// OnPeer is called from Run when a peer turns out to be at this relay, or to
	// be no longer.
	OnPeer func(k punch.Key, here bool)

	Log *slog.Logger // nil: silent
}

// Transport is the way to a relay.
type Transport uint8

// The zero Transport is none: the relay is out of reach.
const (
	None Transport = iota
	UDP
	TLS
)

// String gives "udp", "tls" or nothing.
func (t Transport) String() string {
	switch t {
	case UDP:
		return "udp"
	case TLS:
		return "tls"
	default:
		return ""
	}
}

// State is how a client reaches its relay. The zero State is that of a client
// that has not found a way yet.
type State struct {
	Transport Transport
	Addr      netip.AddrPort // the relay's UDP address in use; zero unless Transport is UDP
	RTT       time.Duration  // to the relay, smoothed; 0: unknown
	Observed  netip.AddrPort // ours, as the relay saw it over UDP last; zero: not yet
	Err       error          // why there is no way, or none over UDP; nil when it goes over UDP
}

// Client keeps a node's link to one relay: over UDP, and over TLS while UDP gets
// no answer. It is safe for concurrent use.
type Client struct {
	cfg     ClientConfig
	session session
	public  punch.Key
	start   time.Time
	wake    chan struct{} // holds a token: there is something to do
	lender  blocks

	mu      sync.Mutex
	group   *errgroup.Group // nil: Run does not run
	ctx     context.Context // of Run
	actions []func()        // to be done by Run without the lock, in order
	next    time.Time       // when Run looks again; zero: when woken
	now     time.Time       // of what is going on
	addrs   []netip.AddrPort
	counter uint64
	sent    []request
	active  Transport
	shown   State
	doubted time.Time
	admits  meter
	refusal error // what the relay answered to the newest admission; nil: nothing bad
	udp     udpSide
	tls     tlsSide
	flows   map[punch.Key]*peerFlow
}

// NewClient checks a configuration and derives the keys. The client does nothing
// before Run.
func NewClient(cfg ClientConfig) (*Client, error) {
	private, err := ecdh.X25519().NewPrivateKey(cfg.PrivateKey[:])
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Credentials) > MaxCredentials {
		return nil, fmt.Errorf("credentials of %d bytes: %w", len(cfg.Credentials), errCredentials)
	}
	c := &Client{
		cfg:    cfg,
		public: punch.Key(private.PublicKey().Bytes()),
		start:  time.Now(),
		wake:   make(chan struct{}, 1),
		flows:  make(map[punch.Key]*peerFlow),
	}
	c.udp.patience, c.udp.tried = raceAfter, map[netip.AddrPort]int{}
	if c.session, err = nodeSession(private, cfg.Relay); err != nil {
		return nil, err
	}
	return c, nil
}

// Run keeps the link until ctx ends. It is called once.
func (c *Client) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	c.mu.Lock()
	c.group, c.ctx = group, ctx
	c.mu.Unlock()
	group.Go(func() error { return c.loop(ctx) })
	err := group.Wait()
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

func (c *Client) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer c.stop()
	defer c.goodbye()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.wake:
		case <-timer.C:
		}
		for {
			actions, wait := c.step()
			for _, act := range actions {
				act()
			}
			if len(actions) > 0 {
				continue // they may have changed something
			}
			if wait > 0 {
				timer.Reset(wait)
			} else {
				timer.Stop()
			}
			break
		}
	}
}

// stop ends what Run started.
func (c *Client) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.group = nil
	c.cancelDial()
	c.closeLink()
	if c.tls.fresh != nil {
		c.tls.fresh.close()
	}
}

// step does what is due and says what is to be done without the lock, and how
// long there is nothing to do: 0 until woken.
func (c *Client) step() (actions []func(), wait time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.next = time.Now(), time.Time{}
	c.show() // a HELLO that moves the relay to UDP follows the report
	c.stepUDP()
	c.stepTLS()
	c.stepFlows()
	c.show()
	actions, c.actions = c.actions, nil
	if !c.next.IsZero() {
		wait = max(c.next.Sub(c.now), 1)
	}
	return actions, wait
}

// due reports whether a time has come. One that has not makes Run look again
// then; the zero time never comes.
func (c *Client) due(t time.Time) bool {
	if t.IsZero() {
		return false
	}
	if !c.now.Before(t) {
		return true
	}
	if c.next.IsZero() || t.Before(c.next) {
		c.next = t
	}
	return false
}

// enter begins an event that comes from outside: it takes the lock. It says
// false, and takes none, when Run does not run.
func (c *Client) enter() bool {
	c.mu.Lock()
	if c.group == nil {
		c.mu.Unlock()
		return false
	}
	c.now = time.Now()
	return true
}

// leave ends an event and makes Run look.
func (c *Client) leave() {
	c.mu.Unlock()
	c.poke()
}

func (c *Client) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// SetAddrs replaces the relay's UDP addresses, best first. All are tried, and the
// first to answer is used; more than MaxAddrs are cut off.
func (c *Client) SetAddrs(addrs []netip.AddrPort) {
	addrs = slices.Clone(addrs[:min(len(addrs), MaxAddrs)])
	if c.tlsOnly() {
		addrs = nil
	}
	c.mu.Lock()
	same := slices.Equal(c.addrs, addrs)
	c.addrs = addrs
	if !same {
		clear(c.udp.tried)
	}
	if !same && c.active != UDP {
		c.udp.restart(time.Now(), raceAfter)
	}
	c.mu.Unlock()
	c.poke()
}

// tlsOnly reports whether the relay cannot admit the node over UDP.
func (c *Client) tlsOnly() bool { return len(c.cfg.Credentials) > maxCredentialsUDP }

// NetworkChanged says that the node's addresses or routes are others now: both
// ways are tried at once.
func (c *Client) NetworkChanged() {
	if !c.enter() {
		return
	}
	defer c.leave()
	c.udp.err = nil
	clear(c.udp.tried)
	c.udp.restart(c.now, raceAfter)
	c.tls.backoff, c.tls.next = 0, c.now
	if c.active == TLS {
		c.tls.restart(c.now, patience(c.tls.rtt))
	}
}

// Doubt says that an answer through the relay is missing: it is asked at once,
// and without an answer the other way is tried. It is cheap.
func (c *Client) Doubt() {
	if !c.enter() {
		return
	}
	defer c.leave()
	if c.active == None || c.now.Sub(c.doubted) < doubtPause {
		return
	}
	c.doubted = c.now
	if c.udp.asked == 0 {
		c.udp.restart(c.now, patience(c.udp.rtt))
	}
	if c.active == TLS && c.tls.asked == 0 {
		c.tls.restart(c.now, max(3*c.tls.rtt, minPatienceTLS))
	}
}

// Offer queues copies of flow frames, 2-byte length and datagram each, while the
// link goes over TLS. It never blocks; frames that find no room push out older
// ones.
func (c *Client) Offer(run []byte) {
	c.mu.Lock()
	f := c.tls.link
	c.mu.Unlock()
	if f != nil {
		f.offer(run)
	}
}

// STUN gives the user name and key of Binding requests to this relay.
func (c *Client) STUN() (user, key []byte) { return c.session.id[:], c.session.mac[:] }

// show reports the state when it has changed.
func (c *Client) show() {
	s := State{Transport: c.active, Observed: c.udp.observed}
	switch c.active {
	case UDP:
		s.Addr, s.RTT = c.udp.addr, c.udp.rtt
	case TLS:
		s.RTT, s.Err = c.tls.rtt, c.troubleUDP()
	default:
		s.Err = c.trouble()
	}
	if near(s.RTT, c.shown.RTT) {
		s.RTT = c.shown.RTT
	}
	if s.Transport == c.shown.Transport && s.Addr == c.shown.Addr && s.RTT == c.shown.RTT &&
		s.Observed == c.shown.Observed && text(s.Err) == text(c.shown.Err) {
		return
	}
	if s.Transport != c.shown.Transport {
		c.cfg.Log.Debug("relay link", "transport", s.Transport, "addr", s.Addr, "rtt", s.RTT, "err", s.Err)
	}
	c.shown = s
	c.actions = append(c.actions, func() { c.cfg.OnState(s) })
}

// near reports whether a round trip is about what was reported.
func near(rtt, shown time.Duration) bool {
	return rtt != 0 && shown != 0 && (rtt-shown).Abs() <= max(shown/8, time.Millisecond)
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// jitter spreads a pause by a tenth.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// smooth is a moving average of round trips.
func smooth(old, sample time.Duration) time.Duration {
	if old == 0 {
		return max(sample, 1)
	}
	return old + (sample-old)/8
}
