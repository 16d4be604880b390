package natlab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlay/overlay"
)

// Bars of the issue: traffic again after the machine or its network moved.
const (
	moveMedian = time.Second
	moveWorst  = 3 * time.Second
	noticeBar  = 5 * time.Second

	routeAway = 2 * time.Second
	dripGap   = 50 * time.Millisecond
	dripPart  = 1 << 10
	// dripWait is how long TCP itself may wait before it tries again after the
	// longest sleep.
	dripWait = 150 * time.Second

	whatBack = "traffic again"
)

// TestDefaultRouteLost takes the default route away for a moment. The addresses
// stay, and nothing else tells that all paths are gone and back.
func TestDefaultRouteLost(t *testing.T) {
	needLab(t)
	var all figures
	_, a, b := pair(t, Masquerade, Masquerade)
	r := &roamer{all: &all, a: a, b: b}
	for r.run = range runs(1, 10) {
		echoes := r.during(t, "default route lost", func(ctx context.Context) error {
			if err := a.route(ctx, "del"); err != nil {
				return err
			}
			time.Sleep(routeAway)
			return a.route(ctx, "add")
		})
		all.add("default route lost 2 s", "gap beyond it", longestGap(echoes)-routeAway)
	}
	all.report(t)
	all.of("gap beyond it").atMost(t, moveMedian, moveWorst)
}

// route adds or deletes the default route.
func (h *Host) route(ctx context.Context, what string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var s script
	s.add("ip route %s default via %s dev eth0", what, h.gateway)
	return h.sh(ctx, s)
}

// TestRouterChanges has a router forget its mappings and give others, on the same
// address and on another one. The peer has to know of the new address in 5 s, and
// traffic flows again before.
func TestRouterChanges(t *testing.T) {
	needLab(t)
	var all figures
	_, a, b := pair(t, Masquerade, Masquerade)
	r := &roamer{all: &all, a: a, b: b}
	for i := range runs(1, 10) {
		r.run = i
		port := uint16(20000 + 2*i)
		r.gap(t, "new ports", func(ctx context.Context) error {
			if err := a.home.rebootTo(ctx, port); err != nil {
				return err
			}
			return r.seenAt(ctx, netip.AddrPortFrom(a.home.WAN(), port))
		})
		wan := netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)})
		r.gap(t, "new ports, new address", func(ctx context.Context) error {
			if err := a.home.SetWAN(ctx, wan); err != nil {
				return err
			}
			if err := a.home.rebootTo(ctx, port+1); err != nil {
				return err
			}
			return r.seenAt(ctx, netip.AddrPortFrom(wan, port+1))
		})
	}
	all.report(t)
	all.of(whatGap).atMost(t, moveMedian, moveWorst)
	all.of("known to the peer").atMost(t, 0, noticeBar)
}

// seenAt waits until the peer has a direct path to an address of a.
func (r *roamer) seenAt(ctx context.Context, addr netip.AddrPort) error {
	took, err := r.b.await(ctx, directWait, func(st overlay.Status) bool {
		p := pathTo(st, r.a.nodeName)
		return p.Kind == "direct" && p.Endpoint == addr.String()
	})
	r.all.add("new ports or address", "known to the peer", took)
	return err
}

// rebootTo is Reboot of a router that from then on maps all UDP to one port.
func (h *Home) rebootTo(ctx context.Context, port uint16) error {
	const plain = `oifname "wan" masquerade;`
	rules, err := h.nat.rules()
	if err != nil {
		return err
	}
	if !strings.Contains(rules, plain) {
		return fmt.Errorf("a router of kind %s has no %s", h.nat, plain)
	}
	fixed := fmt.Sprintf(`oifname "wan" meta l4proto udp masquerade to :%d; %s`, port, plain)
	if err := h.apply(ctx, strings.ReplaceAll(rules, plain, fixed)); err != nil {
		return err
	}
	var s script
	s.add("conntrack -F")
	return h.sh(ctx, s)
}

// TestSuspend stops a daemon for a while, as sleep stops a machine: the one that
// starts handshakes and the other, while it pings and while it is pinged. A TCP
// connection lives through all of it.
func TestSuspend(t *testing.T) {
	needLab(t)
	sleeps := slices.Repeat([]time.Duration{10 * time.Second}, 2)
	if !testing.Short() {
		sleeps = append(slices.Repeat([]time.Duration{time.Minute}, 10), 10*time.Minute)
	}
	var all figures
	_, a, b := pair(t, Masquerade, Masquerade)
	mustDirect(t, a, b)
	if bytes.Compare(wireGuardKey(t, a), wireGuardKey(t, b)) > 0 {
		a, b = b, a
	}
	stream := startTrickle(t, a, b)
	for i, d := range sleeps {
		s := suspension{victim: a, peer: b, role: "starts handshakes", pings: (i+i/2)%2 == 0}
		if i%2 == 1 {
			s.victim, s.peer, s.role = b, a, "does not"
		}
		s.run(t, &all, d)
	}
	all.report(t)
	all.of(whatBack).atMost(t, moveMedian, moveWorst)
	stream.finish(t)
}

// suspension is one stop of a victim, which pings its peer or is pinged.
type suspension struct {
	victim, peer *member
	role         string // of the victim
	pings        bool
}

func (s *suspension) run(t *testing.T, all *figures, d time.Duration) {
	t.Helper()
	mustDirect(t, s.victim, s.peer)
	from, to, cell := s.victim, s.peer, fmt.Sprintf("stopped %v, %s, pings", d, s.role)
	if !s.pings {
		from, to, cell = to, from, fmt.Sprintf("stopped %v, %s, is pinged", d, s.role)
	}
	ping := startPing(t, from.Host, to.addr, slowPing)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatalf("%s: before: %v", cell, err)
	}
	time.Sleep(roamSettle)
	pid := s.victim.daemon(t)
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d)
	woken := ping.now()
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	back, err := ping.answerTo(woken, directWait)
	if err != nil {
		t.Errorf("%s: %v", cell, err)
	}
	all.add(cell, whatBack, back-woken)
	mustDirect(t, s.victim, s.peer)
	all.add(cell, "direct again", ping.now()-woken)
	t.Logf("%s: traffic after %v, direct after %v", cell, back-woken, ping.now()-woken)
	ping.stop(t)
}

// answerTo waits for the reply to a request of after a moment of the pinger's
// clock, and returns when it came. Those of before, which waited somewhere, do not
// count.
func (p *pinger) answerTo(after, limit time.Duration) (time.Duration, error) {
	for p.now() < after+limit {
		p.mu.Lock()
		i := slices.IndexFunc(p.echoes, func(e echo) bool { return e.ok && e.sent > after })
		var back time.Duration
		if i >= 0 {
			back = p.echoes[i].back
		}
		p.mu.Unlock()
		if i >= 0 {
			return back, nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return after + limit, fmt.Errorf("no reply from %s to a ping of the last %v", p.to, limit)
}

// drip is a TCP connection on which a little is sent all the time.
type drip struct {
	conn  net.Conn
	group errgroup.Group
	done  chan struct{}
	once  sync.Once
	sent  hash.Hash
	got   hash.Hash
}

func startTrickle(t *testing.T, from, to *member) *drip {
	t.Helper()
	s := &drip{done: make(chan struct{}), sent: sha256.New(), got: sha256.New()}
	var l net.Listener
	err := to.inside(func() (err error) {
		silent := net.ListenConfig{KeepAlive: -1} // Go's own gives up after 150 s
		l, err = silent.Listen(t.Context(), "tcp", netip.AddrPortFrom(to.addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s.group.Go(func() error {
		defer l.Close()
		c, err := l.Accept()
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = io.Copy(s.got, c)
		return err
	})
	err = from.inside(func() (err error) {
		silent := net.Dialer{Timeout: directWait, KeepAlive: -1}
		s.conn, err = silent.DialContext(t.Context(), "tcp", l.Addr().String())
		return err
	})
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	s.group.Go(s.send)
	t.Cleanup(func() { s.end(); s.conn.Close() })
	return s
}

func (s *drip) end() { s.once.Do(func() { close(s.done) }) }

func (s *drip) send() error {
	defer s.conn.Close()
	tick := time.NewTicker(dripGap)
	defer tick.Stop()
	noise, part := rand.NewChaCha8([32]byte{7}), make([]byte, dripPart)
	for {
		select {
		case <-s.done:
			return nil
		case <-tick.C:
		}
		noise.Read(part)
		s.sent.Write(part)
		if _, err := s.conn.Write(part); err != nil {
			return err
		}
	}
}

// finish ends the stream and wants everything to have arrived.
func (s *drip) finish(t *testing.T) {
	t.Helper()
	s.end()
	ended := make(chan error, 1)
	begin := time.Now()
	go func() { ended <- s.group.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatalf("the stream did not survive: %v", err)
		}
	case <-time.After(dripWait):
		t.Fatalf("the stream did not end within %v", dripWait)
	}
	if !bytes.Equal(s.sent.Sum(nil), s.got.Sum(nil)) {
		t.Error("other bytes arrived than were sent")
	}
	t.Logf("the stream ended after %v", time.Since(begin))
}
