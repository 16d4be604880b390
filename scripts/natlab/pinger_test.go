package natlab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sync/errgroup"
)

const echoBody = 32

// pinger sends ICMP echo requests at a steady pace from a machine, through its
// kernel as ping does, and notes when each left and when its reply came.
type pinger struct {
	conn  *icmp.PacketConn
	to    netip.Addr
	id    int
	start time.Time
	done  chan struct{}
	once  sync.Once
	group errgroup.Group
	first chan struct{} // closed by the first reply

	mu     sync.Mutex
	echoes []echo
}

// echo is one request; back is zero as long as no reply came. Both count from
// the pinger's start.
type echo struct {
	sent, back time.Duration
	ok         bool
}

// startPing begins at once.
func startPing(t *testing.T, from *Host, to netip.Addr, interval time.Duration) *pinger {
	t.Helper()
	p := &pinger{to: to, id: 0x4c42, done: make(chan struct{}), first: make(chan struct{}), start: time.Now()}
	err := from.inside(func() (err error) {
		p.conn, err = icmp.ListenPacket("ip4:icmp", "0.0.0.0")
		return err
	})
	if err != nil {
		t.Fatalf("ping from %s: %v", from.Name(), err)
	}
	p.group.Go(func() error { return p.send(interval) })
	p.group.Go(func() error { p.receive(); return nil })
	t.Cleanup(func() { p.stop(t) })
	return p
}

func (p *pinger) send(interval time.Duration) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for seq := 0; ; seq++ {
		body := &icmp.Echo{ID: p.id, Seq: seq, Data: make([]byte, echoBody)}
		msg, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: body}).Marshal(nil)
		if err != nil {
			return fmt.Errorf("encode echo request: %w", err)
		}
		p.mu.Lock()
		p.echoes = append(p.echoes, echo{sent: time.Since(p.start)})
		p.mu.Unlock()
		// Without a route the request is lost, as any other.
		p.conn.WriteTo(msg, &net.IPAddr{IP: p.to.AsSlice()})
		select {
		case <-p.done:
			return nil
		case <-tick.C:
		}
	}
}

func (p *pinger) receive() {
	buf := make([]byte, 1500)
	for {
		n, _, err := p.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n < 8 || buf[0] != byte(ipv4.ICMPTypeEchoReply) || int(binary.BigEndian.Uint16(buf[4:])) != p.id {
			continue
		}
		p.reply(int(binary.BigEndian.Uint16(buf[6:])), time.Since(p.start))
	}
}

func (p *pinger) reply(seq int, at time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if seq >= len(p.echoes) || p.echoes[seq].ok {
		return
	}
	p.echoes[seq].ok, p.echoes[seq].back = true, at
	select {
	case <-p.first:
	default:
		close(p.first)
	}
}

// firstReply waits for the first reply and returns when it came.
func (p *pinger) firstReply(limit time.Duration) (time.Duration, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.first:
	case <-timer.C:
		return 0, fmt.Errorf("no ping reply from %s within %v", p.to, limit)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	best := limit
	for _, e := range p.echoes {
		if e.ok {
			best = min(best, e.back)
		}
	}
	return best, nil
}

// now is the time on the pinger's clock.
func (p *pinger) now() time.Duration { return time.Since(p.start) }

// stop ends the pings, gives the last of them time to come back, and returns
// all.
func (p *pinger) stop(t *testing.T) []echo {
	t.Helper()
	p.once.Do(func() {
		close(p.done)
		time.Sleep(300 * time.Millisecond)
		p.conn.Close()
	})
	if err := p.group.Wait(); err != nil {
		t.Error(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.echoes
}

// lost counts the requests without a reply.
func lost(echoes []echo) int {
	count := 0
	for _, e := range echoes {
		if !e.ok {
			count++
		}
	}
	return count
}

// lostShare is their share of the requests, of which there have to be some.
func lostShare(t *testing.T, echoes []echo) float64 {
	t.Helper()
	if len(echoes) == 0 {
		t.Fatal("no ping was sent: this proves nothing")
	}
	return float64(lost(echoes)) / float64(len(echoes))
}

// longestGap is the longest time between two replies, or from the last one to
// the last request.
func longestGap(echoes []echo) time.Duration {
	var gap, last time.Duration
	for _, e := range echoes {
		if e.ok {
			gap = max(gap, e.back-last)
			last = max(last, e.back)
		}
	}
	return max(gap, echoes[len(echoes)-1].sent-last)
}

func TestLongestGap(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name   string
		echoes []echo
		gap    time.Duration
		lost   int
	}{
		{"steady", []echo{{0, 40 * ms, true}, {100 * ms, 140 * ms, true}, {200 * ms, 240 * ms, true}}, 100 * ms, 0},
		{"hole", []echo{{0, 40 * ms, true}, {100 * ms, 0, false}, {200 * ms, 240 * ms, true}}, 200 * ms, 1},
		{"dead at the end", []echo{{0, 40 * ms, true}, {100 * ms, 0, false}, {900 * ms, 0, false}}, 860 * ms, 2},
		{"late replies together", []echo{{0, 500 * ms, true}, {100 * ms, 510 * ms, true}}, 500 * ms, 0},
	} {
		if gap, count := longestGap(c.echoes), lost(c.echoes); gap != c.gap || count != c.lost {
			t.Errorf("%s: gap %v, lost %d, want %v, %d", c.name, gap, count, c.gap, c.lost)
		}
	}
}
