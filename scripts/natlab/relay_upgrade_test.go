package natlab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/overlay"
)

const (
	quickPing = 5 * time.Millisecond

	upgradeWait = 75 * time.Second // the longest back-off and something
	fallBackBar = time.Second
	inFlight    = 150 * time.Millisecond

	linePace   = 200 * time.Millisecond
	chunkPace  = 5 * time.Millisecond
	chunkSize  = 64 << 10
	streamWait = 30 * time.Second

	oneWayPace = 2 * time.Millisecond
	oneWaySize = 1000
	oneWayKept = 0.999
)

// TestRelayUpgrade opens and cuts the direct path of a pair, again and again,
// under 5 ms pings: nothing is lost on the way up, little on the way down.
func TestRelayUpgrade(t *testing.T) {
	var all figures
	m, a, b := mix{Masquerade, Masquerade, true}.pair(t, Options{})
	for i := range runs(2, fullRuns) {
		from, to := a, b
		if i%2 == 1 {
			from, to = b, a
		}
		u := &upgrade{mesh: m, a: a, b: b, ping: startPing(t, from.Host, to.addr, quickPing)}
		u.run(t, &all, i)
	}
	all.report(t)
	all.of(whatGap).atMost(t, fallBackBar, fallBackBar)
}

// upgrade is one way up and down.
type upgrade struct {
	*mesh
	a, b *member
	ping *pinger
}

func (u *upgrade) run(t *testing.T, all *figures, i int) {
	t.Helper()
	if _, err := u.ping.firstReply(directWait); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	opened := u.ping.now()
	took := u.up(t)
	time.Sleep(time.Second)
	closed := u.ping.now()
	u.down(t)
	time.Sleep(2 * time.Second)
	echoes := u.ping.stop(t)
	missing := lost(sentBetween(echoes, opened-time.Second, closed-inFlight))
	gap := longestGap(answeredSince(echoes, closed-inFlight))
	t.Logf("run %d: direct after %v, %d lost on the way up, gap on the way down %v", i, took, missing, gap)
	if missing > 0 {
		t.Errorf("run %d: %d pings lost on the way up", i, missing)
	}
	all.add("upgrade", "direct after", took)
	all.add("fall-back", whatGap, gap)
}

// up opens the direct path and waits until both use it.
func (u *upgrade) up(t *testing.T) time.Duration {
	t.Helper()
	u.uncut(t, u.a.Host, u.b.Host)
	return u.await(t, directTo, upgradeWait)
}

// down cuts it and waits until neither does.
func (u *upgrade) down(t *testing.T) time.Duration {
	t.Helper()
	u.cut(t, u.a.Host, u.b.Host)
	return u.await(t, relayedTo, directWait)
}

func (u *upgrade) await(t *testing.T, to func(string) func(overlay.Status) bool, limit time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	err := both(u.a, u.b, func(n *member) error {
		peer := u.a
		if n == u.a {
			peer = u.b
		}
		_, err := n.await(t.Context(), limit, to(peer.nodeName))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(start)
}

// sentBetween are the requests of a time, answeredSince those from a time on
// as if the pinger had started then.
func sentBetween(echoes []echo, from, to time.Duration) (some []echo) {
	for _, e := range echoes {
		if e.sent >= from && e.sent < to {
			some = append(some, e)
		}
	}
	return some
}

func answeredSince(echoes []echo, from time.Duration) (some []echo) {
	for _, e := range echoes {
		if e.sent >= from {
			e.sent, e.back = e.sent-from, e.back-from
			some = append(some, e)
		}
	}
	return some
}

func TestPartsOfPings(t *testing.T) {
	const ms = time.Millisecond
	echoes := []echo{{0, 40 * ms, true}, {100 * ms, 0, false}, {200 * ms, 240 * ms, true}, {300 * ms, 0, false}}
	if got := sentBetween(echoes, 100*ms, 300*ms); len(got) != 2 || lost(got) != 1 {
		t.Errorf("sent between: %v", got)
	}
	if got := answeredSince(echoes, 200*ms); len(got) != 2 || longestGap(got) != 60*ms {
		t.Errorf("since: %v", got)
	}
}

// TestStreamsSurviveMoves has an ssh session and a TCP transfer run while the
// path goes from the relay to a direct one and back.
func TestStreamsSurviveMoves(t *testing.T) {
	m, a, b := mix{Masquerade, Masquerade, true}.pair(t, Options{})
	if err := b.StartSSHD(t.Context()); err != nil {
		t.Fatal(err)
	}
	moved := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error { return chat(t.Context(), a.Host, b, moved) })
	g.Go(func() error { return stream(a.Host, b, moved) })
	u := &upgrade{mesh: m, a: a, b: b}
	for range runs(1, 3) {
		time.Sleep(2 * time.Second)
		u.up(t)
		time.Sleep(2 * time.Second)
		u.down(t)
	}
	time.Sleep(2 * time.Second)
	close(moved)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// chat writes lines into an ssh session and reads each of them back until the
// end.
func chat(ctx context.Context, from *Host, to *member, end <-chan struct{}) error {
	cmd := from.Command(ctx, "ssh", "-o", "HostKeyAlias="+to.Name(), to.addr.String(), "cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start ssh: %w", err)
	}
	tick := time.NewTicker(linePace)
	defer tick.Stop()
	lines := bufio.NewReader(out)
	for i := 0; ; i++ {
		line := fmt.Sprintf("line %d\n", i)
		if _, err := io.WriteString(in, line); err != nil {
			return fmt.Errorf("write to ssh: %w", errors.Join(err, cmd.Wait()))
		}
		if got, err := lines.ReadString('\n'); err != nil || got != line {
			return fmt.Errorf("ssh says %q, not %q: %w", got, line, errors.Join(err, cmd.Wait()))
		}
		select {
		case <-end:
			in.Close()
			return cmd.Wait()
		case <-tick.C:
		}
	}
}

// stream sends random bytes over TCP at a steady pace until the end, and wants
// the very same to arrive.
func stream(from *Host, to *member, end <-chan struct{}) error {
	var l net.Listener
	err := to.inside(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(to.addr, 0).String())
		return err
	})
	if err != nil {
		return err
	}
	defer l.Close()
	var c net.Conn
	err = from.inside(func() (err error) {
		c, err = net.DialTimeout("tcp", l.Addr().String(), directWait)
		return err
	})
	if err != nil {
		return fmt.Errorf("connect for the stream: %w", err)
	}
	got := sha256.New()
	var g errgroup.Group
	g.Go(func() error {
		in, err := l.Accept()
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(got, in)
		return err
	})
	sent, err := trickle(c, end)
	if err = errors.Join(err, c.Close(), g.Wait()); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if !bytes.Equal(sent, got.Sum(nil)) {
		return errors.New("the stream arrived as another")
	}
	return nil
}

func trickle(c net.Conn, end <-chan struct{}) ([]byte, error) {
	hash := sha256.New()
	noise := io.TeeReader(rand.NewChaCha8([32]byte{2}), hash)
	tick := time.NewTicker(chunkPace)
	defer tick.Stop()
	for {
		if err := c.SetDeadline(time.Now().Add(streamWait)); err != nil {
			return nil, err
		}
		if _, err := io.CopyN(c, noise, chunkSize); err != nil {
			return nil, err
		}
		select {
		case <-end:
			return hash.Sum(nil), nil
		case <-tick.C:
		}
	}
}

// TestOneWay sends UDP that nobody answers over a direct path, beside which a
// relay is there: the path does not move.
func TestOneWay(t *testing.T) {
	m, a, b := mix{Masquerade, Masquerade, false}.pair(t, Options{})
	mustDirect(t, a, b)
	time.Sleep(2 * time.Second)
	copies := m.core.tally(t, "copies", fmt.Sprintf("ip daddr %s udp length > %d", m.server.Addr(), oneWaySize))
	ends := [2]*watcher{watchPath(t, a, b), watchPath(t, b, a)}
	sent, got := oneWay(t, a, b, time.Duration(runs(30, 600))*time.Second)
	for _, w := range ends {
		if moves := w.stop(t); len(moves) > 0 {
			t.Errorf("the path of %s moved: %v", w.from.nodeName, moves)
		}
		if n := w.logged(t); n > 0 {
			t.Errorf("the log of %s has %d moves", w.from.nodeName, n)
		}
	}
	t.Logf("%d of %d arrived; %d copies by the relay", got, sent, copies())
	if float64(got) < oneWayKept*float64(sent) {
		t.Errorf("only %d of %d arrived", got, sent)
	}
}

// oneWay sends at a steady pace and counts.
func oneWay(t *testing.T, from, to *member, d time.Duration) (sent, got int) {
	t.Helper()
	var in, out *net.UDPConn
	err := to.inside(func() (err error) {
		in, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.addr, 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	err = from.inside(func() (err error) {
		out, err = net.DialUDP("udp4", nil, in.LocalAddr().(*net.UDPAddr))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var g errgroup.Group
	g.Go(func() error {
		b := make([]byte, 2*oneWaySize)
		for {
			if _, err := in.Read(b); err != nil {
				return nil // closed
			}
			got++
		}
	})
	tick := time.NewTicker(oneWayPace)
	defer tick.Stop()
	for start := time.Now(); time.Since(start) < d; <-tick.C {
		if _, err := out.Write(make([]byte, oneWaySize)); err == nil {
			sent++
		}
	}
	time.Sleep(time.Second)
	in.Close()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	return sent, got
}

// watcher looks at the path of a node to another all the time.
type watcher struct {
	from, to *member
	end      chan struct{}
	group    errgroup.Group
	before   int // lines in the log
	moves    []string
}

func watchPath(t *testing.T, from, to *member) *watcher {
	t.Helper()
	w := &watcher{from: from, to: to, end: make(chan struct{}), before: moveLines(t, from)}
	last := pathTo(from.status(t), to.nodeName)
	ctx := t.Context()
	w.group.Go(func() error {
		for {
			select {
			case <-w.end:
				return nil
			case <-time.After(2 * statusPoll):
			}
			st, err := from.client.Status(ctx)
			if err != nil {
				return err
			}
			if p := pathTo(st, to.nodeName); p.Kind != last.Kind || p.Endpoint != last.Endpoint {
				w.moves = append(w.moves, fmt.Sprintf("%+v", p))
				last = p
			}
		}
	})
	return w
}

func (w *watcher) stop(t *testing.T) []string {
	t.Helper()
	close(w.end)
	if err := w.group.Wait(); err != nil {
		t.Error(err)
	}
	return w.moves
}

// logged is how often the node wrote of a move since the watch began.
func (w *watcher) logged(t *testing.T) int {
	t.Helper()
	return moveLines(t, w.from) - w.before
}

func moveLines(t *testing.T, n *member) int {
	t.Helper()
	text, err := os.ReadFile(n.state() + "/overlay.log")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(text), "msg=path ")
}
