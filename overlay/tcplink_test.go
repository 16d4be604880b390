package overlay

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/relay"
)

// tcpWorld is tcpLinks with everything around them in memory.
type tcpWorld struct {
	*tcpLinks
	t       *testing.T
	guard   sync.Mutex // of what attempts note beside each other
	blocked atomic.Bool
	relayed atomic.Bool
	sent    atomic.Uint64
	fail    bool
	dials   []time.Time
	got     [][]byte
	far     net.Conn // of the last connection
	carried []bool   // whether there is a stream, at each change
	numbers []uint16
	end     func()
}

func newTCPWorld(t *testing.T) *tcpWorld {
	w := &tcpWorld{t: t}
	w.blocked.Store(true)
	w.relayed.Store(true)
	w.tcpLinks = newTCPLinks(tcpConfig{
		blocked: func() bool { return w.blocked.Load() },
		looking: func(punch.Key) (time.Duration, bool) { return time.Minute, w.relayed.Load() },
		sent:    func(punch.Key) uint64 { return w.sent.Load() },
		dial:    w.dial,
		carry: func(_ punch.Key, id uint16, s tcpStream) {
			w.guard.Lock()
			defer w.guard.Unlock()
			w.carried, w.numbers = append(w.carried, s.Stream != nil), append(w.numbers, id)
		},
		deliver: func(uint16, []byte) {},
		log:     slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	synctest.Wait()
	w.end = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return w
}

func (w *tcpWorld) dial(ctx context.Context, _ punch.Key, signals <-chan []byte) (net.Conn, error) {
	w.guard.Lock()
	w.dials = append(w.dials, time.Now())
	w.guard.Unlock()
	if w.fail {
		select {
		case b := <-signals:
			w.got = append(w.got, b)
		case <-ctx.Done():
		}
		return nil, errors.New("no")
	}
	near, far := net.Pipe()
	w.guard.Lock()
	defer w.guard.Unlock()
	w.far = far
	return near, nil
}

// traffic sends to a peer for a while.
func (w *tcpWorld) traffic(k punch.Key, d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		if w.sent.Load()%100 == 0 {
			w.demand(k, time.Now())
		}
		w.sent.Add(1)
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
	}
}

func (w *tcpWorld) wantDials(n int) {
	w.t.Helper()
	if len(w.dials) != n {
		w.t.Fatalf("%d attempts, not %d", len(w.dials), n)
	}
}

// TestTCPOnlyWhereOfUse makes no attempt without traffic, where UDP passes, or
// where there is a direct path.
func TestTCPOnlyWhereOfUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTCPWorld(t)
		defer w.end()
		bob := punch.Key{1}
		time.Sleep(time.Minute)
		w.wantDials(0)
		w.blocked.Store(false)
		w.traffic(bob, time.Minute)
		w.blocked.Store(true)
		w.relayed.Store(false)
		w.traffic(bob, time.Minute)
		w.wantDials(0)
		w.relayed.Store(true)
		w.traffic(bob, time.Second)
		w.wantDials(1)
	})
}

// TestTCPKeepsOne connects once, and again a minute later when the connection
// ended.
func TestTCPKeepsOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTCPWorld(t)
		defer w.end()
		bob := punch.Key{1}
		w.traffic(bob, 90*time.Second)
		w.wantDials(1)
		if !slices.Equal(w.carried, []bool{true}) {
			t.Fatalf("carried: %v", w.carried)
		}
		w.far.Close()
		w.traffic(bob, time.Second)
		w.wantDials(2)
		w.far.Close()
		w.traffic(bob, 58*time.Second)
		w.wantDials(2)
		w.traffic(bob, 3*time.Second)
		w.wantDials(3)
		if !slices.Equal(w.carried, []bool{true, false, true, false, true}) || len(slices.Compact(w.numbers)) != 1 {
			t.Fatalf("carried: %v by %v", w.carried, w.numbers)
		}
	})
}

// TestTCPBacksOff doubles the time between attempts up to an hour.
func TestTCPBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTCPWorld(t)
		defer w.end()
		w.fail = true
		w.traffic(punch.Key{1}, 5*time.Hour)
		gap := time.Minute
		for i, at := range w.dials[1:] {
			if took := at.Sub(w.dials[i]); took < gap || took > gap+2*time.Second {
				t.Errorf("attempt %d after %v, not %v", i+1, took, gap)
			}
			gap = min(2*gap, time.Hour)
		}
		if len(w.dials) < 8 {
			t.Errorf("%d attempts in five hours", len(w.dials))
		}
	})
}

// TestTCPMost spreads attempts at many peers, and bounds their number.
func TestTCPMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTCPWorld(t)
		defer w.end()
		for i := range 2 * tcpMost {
			w.demand(punch.Key{byte(i), 1}, time.Now())
		}
		w.traffic(punch.Key{0, 1}, tcpLook-time.Millisecond)
		if n := len(w.dials); n > 2 {
			t.Errorf("%d attempts at once", n)
		}
		w.traffic(punch.Key{0, 1}, time.Minute)
		w.wantDials(tcpMost)
	})
}

// TestTCPAnswers begins an attempt when the peer does, even where UDP passes, but
// not at once again.
func TestTCPAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTCPWorld(t)
		defer w.end()
		w.blocked.Store(false)
		w.fail = true
		bob := punch.Key{1}
		for range 3 {
			w.receive(bob, []byte("offer"))
			synctest.Wait()
		}
		w.wantDials(1)
		if len(w.got) != 1 || string(w.got[0]) != "offer" {
			t.Errorf("the attempt got %q", w.got)
		}
		time.Sleep(tcpGap)
		w.receive(bob, []byte("offer"))
		synctest.Wait()
		w.wantDials(2)
		w.keep(func(punch.Key) bool { return false })
		if len(w.peers) != 0 {
			t.Errorf("%d peers are left", len(w.peers))
		}
	})
}

// TestTCPLeavesWithItsAddress ends the connection whose own address is gone.
func TestTCPLeavesWithItsAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTCPWorld(t)
		defer w.end()
		w.traffic(punch.Key{1}, time.Second)
		w.localChanged(nil)
		synctest.Wait()
		if !slices.Equal(w.carried, []bool{true, false}) {
			t.Errorf("carried: %v", w.carried)
		}
	})
}

// pipeStream is a connection and its far end.
func pipeStream(t *testing.T) (tcpStream, net.Conn) {
	t.Helper()
	near, far := net.Pipe()
	remote := netip.MustParseAddrPort("203.0.113.1:7")
	return tcpStream{Stream: relay.NewStream(near, slog.New(slog.DiscardHandler)), remote: remote}, far
}

// TestTCPWay makes a connection a way to its peer, before relays.
func TestTCPWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newLinksWorld(t)
		defer w.end()
		bob := punch.Key{1}
		w.members(nil, linkPeer{key: bob, online: true})
		w.server()
		w.up("server0", 10*ms)
		relayed := punch.Relay{Addr: handle(bob, 1)}
		w.wantRelays(bob, relayed)

		s, far := pipeStream(t)
		defer far.Close()
		w.links.setTCP(bob, maxLinkID, s)
		synctest.Wait()
		costly := relayed
		costly.Cost = tlsCost
		w.wantRelays(bob, punch.Relay{Addr: handle(bob, maxLinkID), Here: true}, costly)
		if w.device[maxLinkID] != "tls" {
			t.Errorf("link of the device: %q", w.device[maxLinkID])
		}
		if at, ok := w.links.direct(handle(bob, maxLinkID)); !ok || at != s.remote {
			t.Errorf("the handle leads to %v, %v", at, ok)
		}
		if _, ok := w.links.direct(handle(bob, 1)); ok || w.links.describe(handle(bob, maxLinkID)) != "direct tcp" {
			t.Error("handles are taken for each other")
		}
		w.links.setTCP(bob, maxLinkID, tcpStream{})
		synctest.Wait()
		w.wantRelays(bob, relayed)
		if w.device[maxLinkID] != "" {
			t.Errorf("link of the device: %q", w.device[maxLinkID])
		}
	})
}
