package overlay

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

const (
	// tcpGap is the least time between two attempts with one peer; after each
	// failure it doubles, up to tcpLongest.
	tcpGap     = time.Minute
	tcpLongest = time.Hour
	// tcpPatience is how long one attempt may take, the peer's answer included.
	tcpPatience = 12 * time.Second
	// tcpAfter is how long a direct path over UDP is looked for first.
	tcpAfter = time.Second
	// tcpTraffic is how long a peer counts as talked to, and tcpLook and tcpGlance
	// how often that is looked at where UDP does not pass, and where it does.
	tcpTraffic = 10 * time.Second
	tcpLook    = 500 * time.Millisecond
	tcpGlance  = 5 * time.Second
	// tcpMost is how many connections, and attempts at one, there may be.
	tcpMost = 64
	// tcpSignals is how many signals wait for an attempt.
	tcpSignals = 8
	// tcpDead is how long sent data may go unacknowledged (RFC 5482).
	tcpDead = 10 * time.Second
)

// tcpConfig is what tcpLinks need of the session.
type tcpConfig struct {
	// blocked says that UDP does not pass here, looking that a peer is reached
	// over a relay, and for how long something better was looked for; sent counts
	// packets to a peer.
	blocked func() bool
	looking func(punch.Key) (time.Duration, bool)
	sent    func(punch.Key) uint64
	dial    func(ctx context.Context, k punch.Key, signals <-chan []byte) (net.Conn, error)
	// carry makes a connection a way to a peer; nil: there is none any more.
	carry   func(k punch.Key, id uint16, s tcpStream)
	deliver func(id uint16, run []byte)
	log     *slog.Logger
}

// tcpStream is a connection to a peer; the zero value is none.
type tcpStream struct {
	*relay.Stream
	local, remote netip.AddrPort
}

// tcpLinks are direct TCP connections to peers, where at least one side's network
// passes no UDP. Each is a way for WireGuard's messages as a relay's connection
// is. The side without UDP begins, when there is traffic; the other one answers.
type tcpLinks struct {
	cfg  tcpConfig
	wake chan struct{}

	mu    sync.Mutex
	ctx   context.Context // of run; nil: it does not run, or ends
	group *errgroup.Group
	peers map[punch.Key]*tcpPeer
	began time.Time // last attempt that look began
}

// tcpPeer is what is known of one peer's connections.
type tcpPeer struct {
	id      uint16 // of the link
	sent    uint64
	until   time.Time     // counts as talked to
	next    time.Time     // no attempt before
	gap     time.Duration // after the next failure
	signals chan []byte   // of the attempt under way; nil: none
	stream  tcpStream
	end     func()
}

func newTCPLinks(c tcpConfig) *tcpLinks {
	return &tcpLinks{cfg: c, wake: make(chan struct{}, 1), peers: map[punch.Key]*tcpPeer{}}
}

func (t *tcpLinks) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// demand says that packets go to a peer. It never blocks.
func (t *tcpLinks) demand(k punch.Key, now time.Time) {
	t.mu.Lock()
	p := t.peer(k)
	fresh := p != nil && now.Before(p.until)
	if p != nil {
		p.until = now.Add(tcpTraffic)
	}
	t.mu.Unlock()
	if p != nil && !fresh {
		t.poke()
	}
}

// peer is that of a key; nil when there are too many. mu is held. The links of
// peers have the highest numbers, those of relays the lowest.
func (t *tcpLinks) peer(k punch.Key) *tcpPeer {
	if p := t.peers[k]; p != nil {
		return p
	}
	used := map[uint16]bool{}
	for _, p := range t.peers {
		used[p.id] = true
	}
	for id := uint16(maxLinkID); id > maxLinkID/2; id-- {
		if !used[id] {
			p := &tcpPeer{id: id}
			t.peers[k] = p
			return p
		}
	}
	return nil
}

// keep forgets the peers that are none any more.
func (t *tcpLinks) keep(member func(punch.Key) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, p := range t.peers {
		if member(k) {
			continue
		}
		if p.end != nil {
			p.end()
		}
		delete(t.peers, k)
	}
}

// receive takes a message of a peer: it wants a connection, or answers.
func (t *tcpLinks) receive(k punch.Key, message []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, now := t.peer(k), time.Now()
	if p == nil {
		return
	}
	if p.signals == nil && !t.begin(k, p, now) {
		return
	}
	select {
	case p.signals <- message:
	default:
	}
}

// begin starts an attempt, if it may. mu is held.
func (t *tcpLinks) begin(k punch.Key, p *tcpPeer, now time.Time) bool {
	if t.ctx == nil || t.ctx.Err() != nil || now.Before(p.next) || p.end == nil && t.busy() >= tcpMost {
		return false
	}
	p.gap = min(max(2*p.gap, tcpGap), tcpLongest)
	p.next = now.Add(p.gap)
	ctx, signals := t.ctx, make(chan []byte, tcpSignals)
	p.signals = signals
	t.group.Go(func() error {
		t.attempt(ctx, k, p, signals)
		return nil
	})
	return true
}

// busy counts the peers with a connection, or an attempt at one. mu is held.
func (t *tcpLinks) busy() int {
	n := 0
	for _, p := range t.peers {
		if p.end != nil || p.signals != nil {
			n++
		}
	}
	return n
}

// attempt makes a connection and keeps it until it ends.
func (t *tcpLinks) attempt(ctx context.Context, k punch.Key, p *tcpPeer, signals chan []byte) {
	began := time.Now()
	dialing, stop := context.WithTimeout(ctx, tcpPatience)
	conn, err := t.cfg.dial(dialing, k, signals)
	stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t.mu.Lock()
	p.signals = nil
	known := t.peers[k] == p
	if err != nil || !known {
		t.mu.Unlock()
		t.cfg.log.Debug("no tcp connection", "peer", tun.Key(k), "err", err)
		if conn != nil {
			_ = conn.Close() // nobody wants it
		}
		return
	}
	if p.end != nil {
		p.end()
	}
	s := tcpStream{relay.NewStream(conn, t.cfg.log), addrPortOf(conn.LocalAddr()), addrPortOf(conn.RemoteAddr())}
	p.gap, p.stream, p.end = 0, s, cancel
	t.mu.Unlock()
	t.cfg.log.Info("direct tcp", "peer", tun.Key(k), "took", time.Since(began).Round(time.Millisecond))
	if err := boundUnacknowledged(conn); err != nil {
		t.cfg.log.Debug("bound unacknowledged data", "err", err)
	}
	t.cfg.carry(k, p.id, s)
	err = s.Run(ctx, func(run []byte) { t.cfg.deliver(p.id, run) })
	t.ended(k, p, s)
	t.cfg.log.Info("direct tcp lost", "peer", tun.Key(k), "after", time.Since(began).Round(time.Millisecond))
	t.cfg.log.Debug("direct tcp lost", "peer", tun.Key(k), "err", err)
}

// ended takes back the way over a connection, unless there is a newer one.
func (t *tcpLinks) ended(k punch.Key, p *tcpPeer, s tcpStream) {
	t.mu.Lock()
	last := p.stream == s
	if last {
		p.stream, p.end = tcpStream{}, nil
	}
	t.mu.Unlock()
	if last {
		t.cfg.carry(k, p.id, tcpStream{})
		t.poke()
	}
}

// localChanged ends the connections from addresses that this machine no longer
// has.
func (t *tcpLinks) localChanged(own []net.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		from := p.stream.local.Addr()
		has := slices.ContainsFunc(own, func(a net.Addr) bool {
			p, err := netip.ParsePrefix(a.String())
			return err == nil && p.Addr().Unmap() == from
		})
		if p.end != nil && !has {
			p.end()
		}
	}
}

// run makes connections where they are of use, until ctx ends.
func (t *tcpLinks) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	t.mu.Lock()
	t.ctx, t.group = ctx, g
	t.mu.Unlock()
	g.Go(func() error {
		timer := time.NewTimer(0)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				t.stop()
				return nil
			case <-timer.C:
			case <-t.wake:
			}
			timer.Stop()
			if wait := t.look(time.Now()); wait > 0 {
				timer.Reset(wait)
			}
		}
	})
	return g.Wait()
}

// stop has no attempt begin that nobody would wait for.
func (t *tcpLinks) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ctx = nil
}

// look begins attempts that are due, and tells when to look again; 0: when
// something goes to a peer.
func (t *tcpLinks) look(now time.Time) time.Duration {
	wait, blocked := tcpGlance, t.cfg.blocked()
	if blocked {
		wait = tcpLook
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	wanted := false
	for k, p := range t.peers {
		if sent := t.cfg.sent(k); sent != p.sent {
			p.sent, p.until = sent, now.Add(tcpTraffic)
		}
		if p.end != nil || p.signals != nil || !now.Before(p.until) {
			continue
		}
		wanted = true
		// One at a time: a node that starts has something for everybody.
		if looked, relayed := t.cfg.looking(k); !blocked || !relayed || looked < tcpAfter || now.Sub(t.began) < tcpLook {
			continue
		}
		if t.begin(k, p, now) {
			t.began = now
		}
	}
	if !wanted {
		return 0
	}
	return wait
}

// boundUnacknowledged makes the kernel give up a connection whose data nobody
// acknowledges, which by default takes it a quarter of an hour.
func boundUnacknowledged(c net.Conn) error {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	failed := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(tcpDead/time.Millisecond))
	})
	return errors.Join(failed, err)
}

func addrPortOf(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(tcp.AddrPort().Addr().Unmap(), tcp.AddrPort().Port())
}
