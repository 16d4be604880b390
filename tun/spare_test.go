package tun

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// spareOf opens one spare socket.
func (o *opened) spareOf(t testing.TB) uint16 {
	t.Helper()
	ports, err := o.openSpares(1)
	if err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

// over makes the path of a peer go through a spare socket.
func (o *opened) over(t testing.TB, k Key, to netip.AddrPort, port uint16) *endpoint {
	t.Helper()
	if err := o.setPath(k, to, netip.AddrPortFrom(netip.Addr{}, port)); err != nil {
		t.Fatal(err)
	}
	e, err := o.ParseEndpoint(to.String())
	if err != nil {
		t.Fatal(err)
	}
	return e.(*endpoint)
}

func loopbackAt(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// sparePair is a largePair whose path goes through a spare socket on each side.
func sparePair(t *testing.T, c Config) (a, b *opened, toB, toA *endpoint) {
	a, b = openLarge(t, c, keyB), openLarge(t, c, keyA)
	b.peers.learn(3, b.peers.byKey(keyA))
	pa, pb := a.spareOf(t), b.spareOf(t)
	return a, b, a.over(t, keyB, loopbackAt(pb), pa), b.over(t, keyA, loopbackAt(pa), pb)
}

// filesOpen is how many files this process has open.
func filesOpen(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// Messages of all sizes go through spare sockets, whole and in order, with and
// without offloads, both ways, and come from the endpoint of the path.
func TestSpareCarries(t *testing.T) {
	for _, off := range []string{"", "-gso", "-gro", "-gso,-gro"} {
		t.Run("offloads"+off, func(t *testing.T) {
			a, b, toB, toA := sparePair(t, Config{Offloads: off})
			for round := range 3 {
				var out [][]byte
				for i, n := range []int{62000, 62016, 96, 5502, 5502, 5502, 1432, 1432, 1433, 64, maxPacket, 80, 30000} {
					out = append(out, dataMessage(3, uint64(round*100+i), n))
				}
				exchange(t, [2]*opened{a, b}, [2]*endpoint{toB, toA}, out)
			}
			b.lostNone(t)
			if gso := toB.spare.now.Load().gso; gso != a.open.Load().v4.gso {
				t.Errorf("trains through the spare socket: %v", gso)
			}
		})
	}
}

// Nothing but STUN is taken from a socket that is only tried, and it says where
// it came; as a path it takes what a main socket takes.
func TestSpareIsTriedFirst(t *testing.T) {
	heard := make(chan netip.AddrPort, 100)
	b := openBind(t, Config{Receive: func(_ []byte, _, at netip.AddrPort) { heard <- at }}, peerOf(keyA, true))
	port, c := b.spareOf(t), sender(t)
	send := func(p []byte) {
		t.Helper()
		if _, err := c.WriteToUDPAddrPort(p, loopbackAt(port)); err != nil {
			t.Fatal(err)
		}
	}
	initiation := wireGuard(typeInitiation, 1, initiationSize)
	others := [][]byte{inFlow(1, stunMessage(40)), {controlByte, 1}, {signalByte, 1}, {0x20}}
	for _, p := range others {
		send(p)
	}
	for range 50 { // more than its buffer holds
		send(stunMessage(100))
		if at := <-heard; at != loopbackAt(port) {
			t.Fatalf("came to %v, want %v", at, loopbackAt(port))
		}
	}
	b.nothing(t)
	if n := b.drops.foreign.Load(); n != uint64(len(others)) {
		t.Errorf("%d dropped, want %d", n, len(others))
	}

	far := netip.MustParseAddrPort("127.0.0.1:9")
	b.over(t, keyA, far, port)
	send(initiation)
	m := b.next(t)
	if err := b.Send([][]byte{initiation}, m.ep); err != nil { // a cookie, to a stranger
		t.Fatal(err)
	}
	buf := make([]byte, 200)
	if _, from, err := c.ReadFromUDPAddrPort(buf); err != nil || from != loopbackAt(port) {
		t.Errorf("answered from %v: %v", from, err)
	}
	if b.peers.table(b.peers.spare(port))[m.ep.(*endpoint).to] != nil {
		t.Error("a stranger is kept")
	}
}

// Send leaves from the socket of the port given, with a TTL where one is given.
func TestSendFromSpare(t *testing.T) {
	o, c := openBind(t, Config{}), sender(t)
	to := c.LocalAddr().(*net.UDPAddr).AddrPort()
	for _, port := range []uint16{o.spareOf(t), o.spareOf(t), 0} {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 7}), port)
		if err := o.send(stunMessage(40), to, from, 9); err != nil {
			t.Fatal(err)
		}
		if port == 0 {
			port = o.port()
		}
		_, got, err := c.ReadFromUDPAddrPort(make([]byte, 100))
		if want := netip.AddrPortFrom(from.Addr(), port); err != nil || got != want {
			t.Errorf("from %v, want %v: %v", got, want, err)
		}
	}
	if err := o.send(stunMessage(40), to, netip.AddrPortFrom(netip.Addr{}, 1), 0); !errors.Is(err, errNoSocket) {
		t.Errorf("from a port that is not open: %v", err)
	}
	if err := o.send(stunMessage(40), netip.MustParseAddrPort("[::1]:9"), netip.AddrPortFrom(netip.Addr{}, o.spareOf(t)), 0); !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("to IPv6: %v", err)
	}
}

// Paths to one address over different local ports are different endpoints; the
// one named last is what wireguard-go gets by the address. Copies go over the port
// that is asked for.
func TestPathsToOneAddress(t *testing.T) {
	a, b := openBind(t, Config{}, peerOf(keyB, true)), openBind(t, Config{}, peerOf(keyA, true))
	first, second := b.spareOf(t), b.spareOf(t)
	ends := make(map[uint16]*endpoint)
	for _, port := range []uint16{first, 0, second} {
		ends[port] = b.over(t, keyA, a.at(false), port)
		if again := b.over(t, keyA, a.at(false), port); again != ends[port] {
			t.Errorf("port %d: another endpoint for the same path", port)
		}
	}
	for port, e := range ends {
		b.peers.setCopy(keyA, a.at(false), port)
		if also := b.peers.byKey(keyA).also.Load(); also != e {
			t.Errorf("port %d: copies go to another endpoint", port)
		}
	}
	b.peers.setCopy(keyA, netip.AddrPort{}, 0)
	hello := wireGuard(typeData, 1, 64)
	for port, e := range ends {
		at := port
		if at == 0 {
			at = b.port()
		}
		if err := a.send(hello, loopbackAt(at), netip.AddrPort{}, 0); err != nil {
			t.Fatal(err)
		}
		if m := b.next(t); m.ep != e {
			t.Errorf("port %d: from endpoint %v", port, m.ep)
		}
		if err := b.Send([][]byte{hello}, e); err != nil {
			t.Fatal(err)
		}
		if m := a.next(t); m.ep.(*endpoint).to != loopbackAt(at) {
			t.Errorf("port %d: sent from %v", port, m.ep.DstToString())
		}
	}
}

// Copies go through a spare socket, too.
func TestCopiesThroughSpare(t *testing.T) {
	a, b, toB, _ := sparePair(t, Config{})
	direct := a.path(t, keyB, b.at(false))
	a.peers.setCopy(keyB, toB.to, toB.spare.local())
	m := [][]byte{dataMessage(3, 1, 9000)}
	if err := a.Send(m, direct); err != nil {
		t.Fatal(err)
	}
	b.arrives(t, slices.Concat(m, m))
	a.peers.spare(toB.spare.port).close()
	if err := a.Send(m, direct); err != nil {
		t.Errorf("with copies that fail: %v", err)
	}
	b.arrives(t, m)
}

// There are bounds, and whatever is opened is closed.
func TestSpareLimits(t *testing.T) {
	before := filesOpen(t)
	o := openBind(t, Config{}, peerOf(keyA, true))
	open := filesOpen(t)
	for _, n := range []int{-1, maxTried + 1} {
		if _, err := o.openSpares(n); !errors.Is(err, errSpares) {
			t.Errorf("%d sockets: %v", n, err)
		}
	}
	ports, err := o.openSpares(maxTried)
	if err != nil || len(ports) != maxTried || len(o.peers.spares) != maxTried || slices.Contains(ports, 0) {
		t.Fatalf("%d ports: %v", len(ports), err)
	}
	if _, err := o.openSpares(1); !errors.Is(err, errSpares) {
		t.Errorf("one more: %v", err)
	}
	o.over(t, keyA, netip.MustParseAddrPort("192.0.2.1:1"), ports[0]) // one less is tried
	if more, err := o.openSpares(1); err != nil {
		t.Error(err)
	} else {
		o.peers.dismiss(more)[0].close()
	}
	closeSpares(o.peers.dismiss(append(ports, ports[1], 1)))
	if n := filesOpen(t); n != open+1 || len(o.peers.spares) != 1 {
		t.Errorf("%d files, want %d; %d sockets", n, open+1, len(o.peers.spares))
	}
	if _, err := o.openSpares(maxTried); err != nil {
		t.Error(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o.pumps.Wait()
	if n := filesOpen(t); n != before {
		t.Errorf("%d files after closing, want %d", n, before)
	}
	if _, err := o.openSpares(1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// A kept socket stays while messages go through it, and goes with the last path.
func TestSpareGoesWithItsPath(t *testing.T) {
	to := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), uint16(i+1))
	}
	for name, end := range map[string]func(o *opened, port uint16){
		"the peer has gone": func(o *opened, _ uint16) { o.peers.set(nil) },
		"nine other paths": func(o *opened, _ uint16) {
			for i := range maxEndpoints + 1 {
				o.path(t, keyA, to(i))
			}
		},
		"closed, after another path": func(o *opened, port uint16) {
			o.path(t, keyA, to(1))
			closeSpares(o.peers.dismiss([]uint16{port}))
		},
		"closed, after there was none": func(o *opened, port uint16) {
			o.handle(keyA, handleA)
			closeSpares(o.peers.dismiss([]uint16{port}))
		},
	} {
		o := openBind(t, Config{}, peerOf(keyA, true))
		port := o.spareOf(t)
		e := o.over(t, keyA, to(0), port)
		o.over(t, keyA, to(10), port) // and a second path over it
		o.over(t, keyA, to(0), port)
		if closeSpares(o.peers.dismiss([]uint16{port})); o.peers.spare(port) != e.spare {
			t.Fatalf("%s: closed in use", name)
		}
		files := filesOpen(t)
		end(o, port)
		if o.peers.spare(port) != nil || e.spare.now.Load() != nil || filesOpen(t) != files-1 {
			t.Errorf("%s: still open", name)
		}
		if err := o.Send([][]byte{wireGuard(typeData, 1, 64)}, e); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: sent: %v", name, err)
		}
		if err := o.setPath(keyA, to(0), netip.AddrPortFrom(netip.Addr{}, port)); !errors.Is(err, errNoSocket) {
			t.Errorf("%s: a path over a closed socket: %v", name, err)
		}
		if got, _ := o.ParseEndpoint(to(0).String()); got == e {
			t.Errorf("%s: the endpoint is still named", name)
		}
	}
}

// After a rebind a path goes on over the same port, and what was tried still is.
func TestSpareReopens(t *testing.T) {
	a, b, toB, toA := sparePair(t, Config{})
	tried := b.spareOf(t)
	if err := b.SetMark(0); err != nil {
		t.Fatal(err)
	}
	port := b.port()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b.pumps.Wait()
	if err := b.Send([][]byte{wireGuard(typeData, 1, 64)}, toA); !errors.Is(err, net.ErrClosed) {
		t.Errorf("sent while closed: %v", err)
	}
	b.start(t, port)
	if one := b.peers.spare(tried); one == nil || one.kept.Load() || one.now.Load() == nil || b.peers.spare(toA.spare.port) != toA.spare {
		t.Error("not reopened as they were")
	}
	m := [][]byte{dataMessage(3, 1, 62000)}
	if err := a.Send(m, toB); err != nil {
		t.Fatal(err)
	}
	b.arrives(t, m)
	back := [][]byte{dataMessage(3, 2, 64)}
	if err := b.Send(back, toA); err != nil {
		t.Fatal(err)
	}
	if got := a.next(t); got.ep != toB {
		t.Errorf("from %v", got.ep)
	}
	if now := toA.spare.now.Load(); now.gso != b.open.Load().v4.gso {
		t.Error("reopened without trains")
	}
}

// A stream through one spare socket does not keep the others from being heard.
func TestSpareHearsBesideAStream(t *testing.T) {
	var heard atomic.Int32
	var streams, reader sync.WaitGroup
	done, over := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(over); reader.Wait() }) // after the bind's
	b := openBind(t, Config{Receive: func([]byte, netip.AddrPort, netip.AddrPort) { heard.Add(1) }}, peerOf(keyA, true))
	kept, tried, c := b.spareOf(t), b.spareOf(t), sender(t)
	b.over(t, keyA, loopbackAt(9), kept)
	reader.Go(func() {
		for {
			select {
			case <-b.got:
			case <-over:
				return
			}
		}
	})
	for range 2 {
		streams.Go(func() {
			c, err := net.Dial("udp4", loopbackAt(kept).String())
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			for {
				select {
				case <-done:
					return
				default:
					_, _ = c.Write(wireGuard(typeData, 1, 1432))
				}
			}
		})
	}
	for i := range int32(20) {
		if _, err := c.WriteToUDPAddrPort(stunMessage(40), loopbackAt(tried)); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, "STUN is heard", func() bool { return heard.Load() > i })
	}
	close(done)
	streams.Wait()
}

// Sockets are opened, used, kept and closed while packets come and the main ones
// are reopened.
func TestSpareChurn(t *testing.T) {
	a, b := openBind(t, Config{}, peerOf(keyB, true)), openBind(t, Config{}, peerOf(keyA, true))
	var work sync.WaitGroup
	for range 3 {
		work.Go(func() {
			for range 30 {
				ports, err := b.openSpares(20)
				if errors.Is(err, net.ErrClosed) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				for _, port := range ports {
					_ = a.send(stunMessage(40), loopbackAt(port), netip.AddrPort{}, 0)
					_ = b.send(stunMessage(40), a.at(false), netip.AddrPortFrom(netip.Addr{}, port), 0)
				}
				_ = b.setPath(keyA, a.at(false), netip.AddrPortFrom(netip.Addr{}, ports[0]))
				if e, err := b.ParseEndpoint(a.at(false).String()); err == nil {
					_ = b.Send([][]byte{wireGuard(typeData, 1, 64)}, e)
				}
				_ = a.send(wireGuard(typeData, 1, 64), loopbackAt(ports[0]), netip.AddrPort{}, 0)
				closeSpares(b.peers.dismiss(ports))
			}
		})
	}
	port := b.port()
	for range 5 {
		time.Sleep(5 * time.Millisecond)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		b.pumps.Wait()
		b.start(t, port)
	}
	work.Wait()
	if n := len(b.peers.spares); n > maxEndpoints {
		t.Errorf("%d sockets left", n)
	}
}

// spareHalves is benchPair with a spare socket on both sides.
func spareHalves(t testing.TB) (x, y *half) {
	x, y = benchPair(t)
	o, p := &opened{bind: x.b}, &opened{bind: y.b}
	px, py := o.spareOf(t), p.spareOf(t)
	x.to = o.over(t, keyB, loopbackAt(py), px)
	p.over(t, keyA, loopbackAt(px), py)
	y.fn = y.spare
	return x, y
}

func TestSpareAllocatesNothing(t *testing.T) {
	x, y := spareHalves(t)
	batches := largeBatches()
	batches["plain"] = x.out
	for name, out := range batches {
		for _, gro := range []int{1, 0} {
			for _, s := range y.b.peers.spares {
				if err := s.now.Load().set(unix.IPPROTO_UDP, unix.UDP_GRO, gro); err != nil {
					t.Fatal(err)
				}
			}
			x.out = out
			if n := testing.AllocsPerRun(200, func() { x.send(t); y.receive(t, len(out)) }); n >= 1 {
				t.Errorf("%s, gro %d: %v allocations", name, gro, n)
			}
		}
	}
}

// Through a spare socket a path over a relay's address is none.
func TestSpareKnowsNoRelay(t *testing.T) {
	a, _, _ := relayedAssembly()
	s := &spare{port: 7, paths: make(map[netip.AddrPort]*endpoint)}
	if a.b.peers.sender(relayAddrs[1], nil) == nil || a.b.peers.sender(relayAddrs[1], s) != nil {
		t.Error("the relay's endpoint is not the main socket's alone")
	}
}

// The peer sends through the socket that it chose, we through another one.
func TestAnotherSpareCarries(t *testing.T) {
	b := openBind(t, Config{Receive: func([]byte, netip.AddrPort, netip.AddrPort) {}}, peerOf(keyA, true))
	mine, theirs, c := b.spareOf(t), b.spareOf(t), sender(t)
	b.over(t, keyA, netip.MustParseAddrPort("127.0.0.1:9"), mine)
	b.peers.learn(5, b.peers.byKey(keyA))
	if _, err := c.WriteToUDPAddrPort(wireGuard(typeData, 5, 200), loopbackAt(theirs)); err != nil {
		t.Fatal(err)
	}
	b.next(t)
}
