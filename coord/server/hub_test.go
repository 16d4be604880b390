package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/store"
	"overlay/coord/trust"
)

// listener is the far end of a stream over a pipe: it keeps what it gets.
type listener struct {
	*node
	device trust.Key
	conn   net.Conn

	mu     sync.Mutex
	events []coord.Event
	frames [][]byte
	ended  bool
}

func (l *listener) listen() {
	for {
		b, err := coord.ReadFrame(l.conn, coord.MaxEvent)
		var e coord.Event
		if err == nil {
			err = json.Unmarshal(b, &e)
		}
		l.mu.Lock()
		l.ended = err != nil
		if err != nil {
			l.mu.Unlock()
			return
		}
		l.events, l.frames = append(l.events, e), append(l.frames, b)
		l.mu.Unlock()
	}
}

func (l *listener) take() []coord.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.events
	l.events, l.frames = nil, nil
	return out
}

func countSignals(l *listener) int {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, e := range l.events {
		if e.Signal != nil {
			n++
		}
	}
	return n
}

// bareHub is a hub without store for a fake clock.
func bareHub(t testing.TB) *hub {
	t.Helper()
	h := newHub(nil, slog.New(slog.DiscardHandler), time.Now)
	ctx, cancel := context.WithCancel(context.Background())
	group, ctx := errgroup.WithContext(ctx)
	h.group = group
	group.Go(func() error { h.deliver(ctx); return nil })
	group.Go(func() error { h.watchClocks(ctx); return nil })
	t.Cleanup(func() {
		h.stop()
		cancel()
		_ = group.Wait()
	})
	return h
}

func (h *hub) addMember(device trust.Key) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.put(nodeRecord{Device: device, Cap: trust.Document("cap"), Cert: trust.Document("cert")})
}

func connect(t testing.TB, h *hub, n *node) *listener {
	t.Helper()
	near, far := net.Pipe()
	l := &listener{node: n, device: public(n.device), conn: far}
	if !h.attach(&stream{device: l.device, conn: near}, coord.Welcome{}, "") {
		t.Fatal("not attached")
	}
	var wg sync.WaitGroup
	wg.Go(l.listen)
	t.Cleanup(func() { _ = far.Close(); wg.Wait() })
	return l
}

func twoMembers(t testing.TB) (*hub, *listener, *listener) {
	t.Helper()
	h := bareHub(t)
	a, b := newNode(t), newNode(t)
	h.addMember(public(a.device))
	h.addMember(public(b.device))
	return h, connect(t, h, a), connect(t, h, b)
}

// A node that comes back within the grace was never away; one that does not is
// offline after it.
func TestGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, b := twoMembers(t)
		time.Sleep(time.Second)
		a.take()
		_ = b.conn.Close()
		time.Sleep(grace - time.Second)
		b2 := connect(t, h, b.node)
		time.Sleep(2 * grace)
		if e := a.take(); len(e) != 0 {
			t.Errorf("a short break was told: %+v", e)
		}
		_ = b2.conn.Close()
		time.Sleep(grace + 2*tick)
		e := a.take()
		if len(e) != 1 || len(e[0].Delta.Nodes) != 1 || e[0].Delta.Nodes[0].Online {
			t.Errorf("a long break: %+v", e)
		}
		if online, seen := h.presence(b.device); online || seen.IsZero() {
			t.Error("presence", online, seen)
		}
	})
}

// Changes that follow each other closely are one delta, and every receiver
// gets the same bytes.
func TestCoalescing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, b := twoMembers(t)
		time.Sleep(time.Second)
		a.take()
		b.take()
		const n = 50
		for range n {
			h.addMember(public(newKey(t)))
		}
		time.Sleep(time.Second)
		nodes := 0
		a.mu.Lock()
		defer a.mu.Unlock()
		b.mu.Lock()
		defer b.mu.Unlock()
		for i, e := range a.events {
			nodes += len(e.Delta.Nodes)
			if !bytes.Equal(a.frames[i], b.frames[i]) {
				t.Error("receivers got different bytes")
			}
		}
		if nodes != n || len(a.events) > 3 {
			t.Errorf("%d nodes in %d deltas", nodes, len(a.events))
		}
	})
}

// Both ends notice a dead connection: the server pings, and hangs up on a node
// that never answers.
func TestPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, _ := twoMembers(t)
		time.Sleep(readDeadline - time.Second)
		pings := 0
		for _, e := range a.take() {
			if e.Ping != nil {
				pings++
			}
		}
		if pings != 2 {
			t.Errorf("%d pings", pings)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if a.mu.Lock(); !a.ended {
			t.Error("a silent node keeps its stream")
		}
		a.mu.Unlock()
	})
}

// A node that takes no data is disconnected, and nobody waits for it.
func TestSlowReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, _ := twoMembers(t)
		slow := newNode(t)
		h.addMember(public(slow.device))
		near, far := net.Pipe() // nobody reads at the far end
		defer func() { _ = far.Close() }()
		if !h.attach(&stream{device: public(slow.device), conn: near}, coord.Welcome{}, "") {
			t.Fatal("not attached")
		}
		began := time.Now()
		for range maxQueue + 10 {
			h.touchAll()
			time.Sleep(2 * coalesce)
		}
		if spent := time.Since(began); spent > (maxQueue+20)*2*coalesce {
			t.Errorf("the others waited: %v", spent)
		}
		if _, err := far.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the slow stream lives: %v", err)
		}
		if len(a.take()) < maxQueue {
			t.Error("the others missed deltas")
		}
	})
}

func (h *hub) touchAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.members {
		h.touch(m)
	}
}

// More nodes than fit into one frame come in several; only the last can be
// resumed from.
func TestBigNetmap(t *testing.T) {
	parts := make([]part, 40)
	for i := range parts {
		n := coord.Node{Device: trust.Key{byte(i)}, Cert: make([]byte, frameRoom/20)}
		parts[i] = part{n.Device, single(n).head}
	}
	rest := coord.Netmap{State: trust.Document("state")}
	frames := netmapFrames(true, rest, parts, resumePoint{"boot", 7})
	if len(frames) < 3 {
		t.Fatalf("%d frames", len(frames))
	}
	got := 0
	for i, f := range frames {
		var e coord.Event
		b := wire(t, f, trust.Key{3})
		if err := json.Unmarshal(b, &e); err != nil || len(b) > coord.MaxEvent {
			t.Fatalf("frame %d of %d bytes: %v", i, len(b), err)
		}
		m := e.Delta
		if i == 0 {
			m = e.Netmap
		}
		if (e.Resume == "boot-7") != (i == len(frames)-1) || (len(m.State) > 0) != (i == 0) {
			t.Errorf("frame %d: resume %q, state %q", i, e.Resume, m.State)
		}
		got += len(m.Nodes)
	}
	if got != len(parts)-1 {
		t.Errorf("%d nodes of %d", got, len(parts)-1)
	}
}

// wire is a frame's body as one receiver gets it.
func wire(t testing.TB, f *frame, self trust.Key) []byte {
	t.Helper()
	var out bytes.Buffer
	near, far := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		s := &stream{conn: near, device: self}
		if err := s.write([]*frame{f}); err != nil {
			t.Error(err)
		}
		_ = near.Close()
	})
	_, err := io.Copy(&out, far)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	b, err := coord.ReadFrame(&out, coord.MaxEvent)
	if err != nil || out.Len() > 0 {
		t.Fatalf("%v, %d bytes too many", err, out.Len())
	}
	return b
}

// The ring is bounded, and a resume from before it gets everything.
func TestRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, _, _ := twoMembers(t)
		time.Sleep(time.Second)
		for range ringCount + 5 {
			h.touchAll()
			h.flush()
		}
		if len(h.ring) > ringCount || h.ringSize > ringBytes {
			t.Errorf("ring holds %d frames of %d bytes", len(h.ring), h.ringSize)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		whole := func(back uint64) bool {
			f := h.since(resumePoint{h.boot, h.revision - back}.String())
			return bytes.HasPrefix(f[0].head, []byte(`{"netmap"`))
		}
		if whole(0) || whole(5) || !whole(maxQueue) || !whole(h.revision) {
			t.Error("resume", whole(0), whole(5), whole(maxQueue), whole(h.revision))
		}
	})
}

// A hub that lost the store's history catches up by reading all of it.
func TestHubCatchesUp(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b, c := o.joined(t, "bob"), o.joined(t, "carl")
	s.stop()
	db, err := store.OpenBolt(s.dir + "/" + storeFile)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	h := newHub(db, slog.New(slog.DiscardHandler), time.Now)
	if err := h.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.flush()
	gone := public(newKey(t))
	h.addMember(gone) // as if it had been there before
	if err := h.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h.knows(gone) || !h.knows(public(b.device)) || !h.knows(public(c.device)) {
		t.Error("members", h.knows(gone), h.knows(public(b.device)))
	}
	if len(h.pending.removed) != 1 || h.pending.removed[0] != gone {
		t.Errorf("removed %v", h.pending.removed)
	}
}
