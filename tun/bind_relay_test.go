package tun

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// forwarder is a relay for two ends without admission: what one sends goes to
// the other, over UDP or as over a connection. Every end has it as link 1 and the
// same flow.
type forwarder struct {
	c    *net.UDPConn
	ends [2]*relayEnd
}

type relayEnd struct {
	at      netip.AddrPort
	link    func(Link)
	deliver func(run []byte)
	stream  atomic.Bool // the forwarder sends to it so
	runs    chan []byte
}

// newForwarder runs until the test ends.
func newForwarder(t *testing.T, c *net.UDPConn, ends ...*relayEnd) *forwarder {
	f := &forwarder{c: c, ends: [2]*relayEnd(ends)}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i, e := range f.ends {
		e.runs = make(chan []byte, 1000)
		f.set(i, false)
		wg.Go(func() {
			for {
				select {
				case run := <-e.runs:
					e.deliver(run)
				case <-done:
					return
				}
			}
		})
	}
	wg.Go(func() {
		b := make([]byte, maxFrame)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			for i, e := range f.ends {
				if e.at == from {
					f.forward(1-i, bytes.Clone(b[:n]))
				}
			}
		}
	})
	t.Cleanup(func() {
		close(done)
		_ = c.Close()
		wg.Wait()
	})
	return f
}

func (f *forwarder) forward(to int, frame []byte) {
	if e := f.ends[to]; e.stream.Load() {
		e.runs <- runOf(frame)
	} else {
		_, _ = f.c.WriteToUDPAddrPort(frame, e.at)
	}
}

// set makes an end use a connection, or UDP, both ways.
func (f *forwarder) set(i int, stream bool) {
	l := Link{Addr: f.c.LocalAddr().(*net.UDPAddr).AddrPort()}
	if stream {
		l = Link{Send: func(run []byte) {
			for n := frameSize(run); n > 0; n = frameSize(run) {
				f.forward(1-i, bytes.Clone(run[frameLength:][:n]))
				run = run[frameLength+n:]
			}
		}}
	}
	f.ends[i].link(l)
	f.ends[i].stream.Store(stream)
}

// way makes k reachable over link 1.
func (o *opened) way(k Key) *endpoint {
	e := o.peers.setWays(k, []Way{{1, wayHeader(1)}})[0]
	e.mtu.Store(&o.mtu)
	return e
}

// relayedPair is two binds whose peers take large messages, with a forwarder
// between them, a way to each other and a session of the second's.
func relayedPair(t *testing.T, ca, cb Config) (a, b *opened, toB, toA *endpoint, f *forwarder) {
	a, b = openLarge(t, ca, keyB), openLarge(t, cb, keyA)
	b.peers.learn(3, b.peers.byKey(keyA))
	end := func(o *opened) *relayEnd {
		return &relayEnd{
			at:      o.at(false),
			link:    func(l Link) { o.peers.setLink(1, l) },
			deliver: func(run []byte) { o.deliver(1, run) },
		}
	}
	f = newForwarder(t, sender(t), end(a), end(b))
	return a, b, a.way(keyB), b.way(keyA), f
}

// exchange sends messages from the first of two to the other, which get there whole
// and in order, and an answer back, which comes from the endpoint of the path.
func exchange(t *testing.T, both [2]*opened, to [2]*endpoint, out [][]byte) {
	t.Helper()
	check(t, both[0].Send(out, to[0]))
	both[1].arrives(t, out)
	back := wireGuard(typeResponse, 9, responseSize)
	check(t, both[1].Send([][]byte{back}, to[1]))
	if m := both[0].next(t); m.ep != to[0] || !bytes.Equal(m.data, back) {
		t.Fatalf("answer of %d bytes from %v", len(m.data), m.ep)
	}
}

// lostNone wants nothing to have been dropped on arrival.
func (b *opened) lostNone(t *testing.T) {
	t.Helper()
	if n := b.drops.fragments.Load() + b.drops.incomplete.Load() + b.drops.foreign.Load(); n != 0 {
		t.Errorf("%d drops", n)
	}
}

// Messages of all sizes go through a relay, by any mixture of transports, with
// and without offloads.
func TestRelayCarries(t *testing.T) {
	for _, off := range []string{"", "-gso", "-gro"} {
		t.Run("offloads"+off, func(t *testing.T) {
			a, b, toB, toA, f := relayedPair(t, Config{Offloads: off}, Config{Offloads: off})
			for round := range 4 {
				f.set(0, round&1 != 0)
				f.set(1, round&2 != 0)
				// Batches that the forwarder's socket has room for.
				for i, batch := range [][]int{{62000, 96}, {5502, 5502, 1432, 1432, 1433, 64}, {maxPacket}, {80}} {
					var out [][]byte
					for j, n := range batch {
						out = append(out, dataMessage(3, uint64(round*100+i*10+j), n))
					}
					exchange(t, [2]*opened{a, b}, [2]*endpoint{toB, toA}, out)
				}
			}
			b.lostNone(t)
		})
	}
}

// STUN and signals go both ways in a flow, but nothing with a TTL of its own.
func TestSendIntoFlow(t *testing.T) {
	got := make(chan heard, 10)
	c := Config{Receive: func(b []byte, from, at netip.AddrPort) {
		if at.IsValid() {
			t.Errorf("arrived at %v", at)
		}
		got <- heard{string(b), from}
	}}
	a, _, toB, toA, f := relayedPair(t, c, c)
	for _, m := range [][]byte{stunMessage(100), {signalByte, 1, 2}} {
		for i := range 4 {
			f.set(0, i&1 != 0)
			f.set(1, i&2 != 0)
			if err := a.send(m, toB.to, netip.AddrPort{}, 0); err != nil {
				t.Fatal(err)
			}
			if one := <-got; one.data != string(m) || one.from != toA.to {
				t.Errorf("%d bytes from %v", len(one.data), one.from)
			}
		}
	}
	if err := a.send(stunMessage(100), toB.to, netip.AddrPort{}, 3); !errors.Is(err, errHops) {
		t.Errorf("with a TTL: %v", err)
	}
	a.peers.setLink(1, Link{})
	if err := a.send(stunMessage(100), toB.to, netip.AddrPort{}, 0); !errors.Is(err, errDown) {
		t.Errorf("with a link that is down: %v", err)
	}
	if err := a.send(stunMessage(100), netip.AddrPortFrom(handleA, relayedPort|2), netip.AddrPort{}, 0); !errors.Is(err, errMesh) {
		t.Errorf("to no way: %v", err)
	}
}

// The links of both sides go from UDP to a connection and back in the middle of a
// stream, and nothing is lost.
func TestLinkChangesLoseNothing(t *testing.T) {
	a, b, toB, _, f := relayedPair(t, Config{}, Config{})
	const count, change = 4000, 100
	window, ended := make(chan struct{}, 64), make(chan error, 1)
	go func() {
		for i := range count {
			window <- struct{}{}
			if i%change == 0 {
				f.set(i/change%2, i/change%4 < 2)
			}
			if err := a.Send([][]byte{dataMessage(7, uint64(i), 200)}, toB); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()
	seen := make([]bool, count)
	for range count {
		m := b.next(t)
		if c := counterOf(m.data); seen[c] {
			t.Fatalf("message %d twice", c)
		}
		seen[counterOf(m.data)] = true
		<-window
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// Copies go by the other path too, in both directions, also when only they get
// through; credits are given back once.
func TestCopies(t *testing.T) {
	a, b, toB, toA, _ := relayedPair(t, Config{}, Config{})
	direct, from := a.path(t, keyB, b.at(false)).(*endpoint), b.path(t, keyA, a.at(false))
	p := a.peers.byKey(keyB)
	m := dataMessage(7, 1, 5000)
	for _, c := range []struct {
		to, also *endpoint
		want     int
	}{{direct, nil, 1}, {direct, toB, 2}, {toB, direct, 2}, {toB, toB, 1}, {toB, nil, 1}} {
		p.also.Store(nil)
		if c.also != nil {
			a.peers.setCopy(keyB, c.also.to, 0)
		}
		a.out.take(&p.out, 3, 3*len(m))
		if err := a.Send([][]byte{dataMessage(3, 1, 5000)}, c.to); err != nil {
			t.Fatal(err)
		}
		if p.out.held != 2 {
			t.Fatalf("%d credits held, want 2", p.out.held)
		}
		a.out.settle(&p.out, 2)
		var eps []any
		for range c.want {
			eps = append(eps, b.next(t).ep)
		}
		b.nothing(t)
		if c.want == 2 && (!slices.Contains(eps, any(from)) || !slices.Contains(eps, any(toA))) {
			t.Errorf("from %v", eps)
		}
		b.inbound.settle(&b.peers.byKey(keyA).in, 2)
	}
	a.peers.setLink(1, Link{})
	a.peers.setCopy(keyB, direct.to, 0)
	if err := a.Send([][]byte{m[:64]}, toB); err != nil || a.drops.handled.Load() != 0 {
		t.Fatalf("only a copy gets through: %v", err)
	}
	b.next(t)
	a.peers.setCopy(keyB, netip.AddrPort{}, 0)
	if err := a.Send([][]byte{m[:64]}, toB); err != nil || a.drops.handled.Load() != 1 {
		t.Fatalf("a link that is down: %v, %d dropped", err, a.drops.handled.Load())
	}
	b.nothing(t)
	a.peers.setLink(1, Link{Addr: netip.MustParseAddrPort("198.51.100.1:1")})
	a.peers.setCopy(keyB, toB.to, 0)
	dropping, _ := a.ParseEndpoint(a.handle(keyB, handleA).String())
	if err := a.Send([][]byte{m[:64]}, dropping); err != nil {
		t.Fatal(err)
	}
	if n := p.sent.Load(); n != 7 {
		t.Errorf("%d messages counted as sent", n)
	}
}

// Frames for a connection are bounded, and so is what one call gets.
func TestStreamIsBounded(t *testing.T) {
	for _, large := range []bool{true, false} {
		a := openLarge(t, Config{}, keyB)
		a.mtu.Store(20000) // more than a frame may have
		a.peers.byKey(keyB).large.Store(large)
		way := a.way(keyB)
		var frames [][]byte
		a.peers.setLink(1, Link{Send: func(run []byte) {
			if len(run) > streamSize {
				t.Errorf("%d bytes at once", len(run))
			}
			for n := frameSize(run); n > 0; n = frameSize(run) {
				frames = append(frames, bytes.Clone(run[frameLength:][:n]))
				run = run[frameLength+n:]
			}
			if len(run) > 0 {
				t.Errorf("%d bytes are no frame", len(run))
			}
		}})
		out := [][]byte{dataMessage(3, 1, 62000), dataMessage(3, 2, maxFrame-flowHeader), dataMessage(3, 3, 62000), dataMessage(3, 4, 64)}
		if err := a.Send(out, way); err != nil {
			t.Fatal(err)
		}
		want, dropped := allInFlow(1, [][]byte{out[1], out[3]}), uint64(2)
		if large {
			dropped, want = 0, nil
			for _, m := range out {
				want = append(want, allInFlow(1, fragmentsOf(t, m, maxFrame-flowHeader))...)
			}
		}
		mustEqual(t, frames, want)
		if n := a.drops.full.Load(); n != dropped {
			t.Errorf("%d dropped, want %d", n, dropped)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if err := a.Send(out, way); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	}
}

// Deliver returns when the bind is closed, whatever it waits for, and works again
// when that is reopened.
func TestDeliverAndClose(t *testing.T) {
	b := openBind(t, Config{}, peerOf(keyA, true))
	b.peers.setLink(1, Link{Send: func([]byte) {}})
	way, p := b.way(keyA), b.peers.byKey(keyA)
	b.peers.learn(5, p)
	run := runOf(inFlow(1, wireGuard(typeData, 5, 64)))
	for range 3 {
		b.deliver(1, run)
		if m := b.next(t); m.ep != way {
			t.Fatalf("from %v", m.ep)
		}
		if err := b.inboundFull(p); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for range 100 {
					b.deliver(1, run) // parked peers let some through
				}
			})
		}
		time.Sleep(5 * time.Millisecond)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		b.pumps.Wait()
		b.deliver(1, run)
		for len(b.got) > 0 {
			<-b.got
		}
		b.start(t, 0)
		b.inbound.settle(&p.in, creditLimit)
	}
	b.deliver(0, run)
	b.deliver(1, nil)
	b.nothing(t)
}

// inboundFull leaves no credit for what arrives.
func (b *bind) inboundFull(p *peer) error {
	b.inbound.take(&p.in, creditLimit, creditBytes)
	b.inbound.mu.Lock()
	defer b.inbound.mu.Unlock()
	if !b.inbound.full() {
		return errors.New("there is room")
	}
	return nil
}

// relayedHalves is benchPair whose messages go by link 1: each is the other's
// relay.
func relayedHalves(t testing.TB) (x, y *half) {
	x, y = benchPair(t)
	o, p := &opened{bind: x.b}, &opened{bind: y.b}
	x.b.peers.setLink(1, Link{Addr: p.at(false)})
	y.b.peers.setLink(1, Link{Addr: o.at(false)})
	x.to = o.way(keyB)
	p.way(keyA)
	return x, y
}

// streamHalves is benchPair with a connection: what is sent has been received
// when the call returns.
func streamHalves(t testing.TB) (x, y *half) {
	x, y = benchPair(t)
	o, p := &opened{bind: x.b}, &opened{bind: y.b}
	x.b.peers.setLink(1, Link{Send: func(run []byte) { y.b.deliver(1, run) }})
	x.to = o.way(keyB)
	p.way(keyA)
	runs := y.b.open.Load().runs
	r := newReceiver(y.b, runs, runs.done)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			n, err := r.receive(y.bufs, y.sizes, y.eps)
			if err != nil {
				return
			}
			y.b.inbound.settle(&y.b.peers.byKey(keyA).in, n)
		}
	}()
	t.Cleanup(func() {
		_ = y.b.Close()
		<-ended
	})
	return x, y
}

// Through a relay nothing is allocated either, over UDP and over a connection,
// whole and in fragments, with and without copies.
func TestRelayAllocatesNothing(t *testing.T) {
	x, y := relayedHalves(t)
	sx, sy := streamHalves(t)
	batches := largeBatches()
	batches["plain"] = x.out
	for name, out := range batches {
		for _, gro := range []int{1, 0} {
			if err := y.b.open.Load().v4.set(unix.IPPROTO_UDP, unix.UDP_GRO, gro); err != nil {
				t.Fatal(err)
			}
			// The race detector's pools forget; once for each time a train is sent.
			for _, copies := range []int{0, 1} {
				x.b.peers.setCopy(keyB, netip.AddrPort{}, 0)
				if copies == 1 {
					x.b.peers.setCopy(keyB, (&opened{bind: y.b}).at(false), 0)
				}
				x.out = out
				if n := testing.AllocsPerRun(200, func() { x.send(t); y.receive(t, (1+copies)*len(out)) }); n >= float64(1+copies) {
					t.Errorf("%s, gro %d, %d copies: %v allocations", name, gro, copies, n)
				}
			}
		}
		sx.out = out
		if n := testing.AllocsPerRun(200, func() { sx.send(t) }); n >= 1 {
			t.Errorf("%s over a connection: %v allocations", name, n)
		}
	}
	if n := sy.b.drops.foreign.Load() + sy.b.drops.fragments.Load() + y.b.drops.foreign.Load(); n > 0 {
		t.Errorf("%d dropped", n)
	}
}
