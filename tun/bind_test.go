package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

var (
	keyA = Key{1}
	keyB = Key{2}
)

// overlay addresses of the tests.
var (
	meshPrefix = netip.MustParsePrefix("fd00:1::/48")
	innerA     = netip.MustParseAddr("100.64.0.1")
	handleA    = netip.MustParseAddr("fd00:1::a")
)

func peerOf(k Key, initiate bool) Peer {
	a := netip.AddrFrom4([4]byte{100, 64, 0, k[0]})
	return Peer{Key: k, AllowedIPs: []netip.Prefix{netip.PrefixFrom(a, 32)}, Handle: handleA, Initiate: initiate}
}

// message is one a bind received.
type message struct {
	data []byte
	ep   conn.Endpoint
}

// opened is an open bind whose messages arrive on a channel.
type opened struct {
	*bind
	got   chan message
	pumps sync.WaitGroup // over when closed
}

func openBind(t testing.TB, c Config, list ...Peer) *opened {
	c.Mesh = []netip.Prefix{meshPrefix}
	table := newPeers()
	table.set(list)
	o := &opened{bind: newBind(c, table), got: make(chan message, 1000)}
	o.start(t, 0)
	return o
}

func (o *opened) start(t testing.TB, port uint16) {
	fns, _, err := o.Open(port)
	if err != nil {
		t.Fatal(err)
	}
	for _, fn := range fns {
		o.pumps.Go(func() { o.pump(t, fn) })
	}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		o.pumps.Wait()
	})
}

func (o *opened) pump(t testing.TB, fn conn.ReceiveFunc) {
	bufs, sizes, eps := buffers(), make([]int, batchSize), make([]conn.Endpoint, batchSize)
	for {
		n, err := fn(bufs, sizes, eps)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("receive: %v", err)
			}
			return
		}
		for i := range n {
			o.got <- message{bytes.Clone(bufs[i][:sizes[i]]), eps[i]}
		}
	}
}

func buffers() [][]byte {
	bufs := make([][]byte, batchSize)
	for i := range bufs {
		bufs[i] = make([]byte, maxPacket)
	}
	return bufs
}

func (o *opened) at(v6 bool) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(netip.IPv6Loopback(), o.port())
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), o.port())
}

func (o *opened) next(t *testing.T) message {
	t.Helper()
	select {
	case m := <-o.got:
		return m
	case <-time.After(5 * time.Second):
		t.Fatal("nothing received")
		return message{}
	}
}

func (o *opened) nothing(t *testing.T) {
	t.Helper()
	select {
	case m := <-o.got:
		t.Fatalf("received %d bytes", len(m.data))
	case <-time.After(30 * time.Millisecond):
	}
}

func (o *opened) path(t *testing.T, k Key, to netip.AddrPort) conn.Endpoint {
	t.Helper()
	if err := o.setPath(k, to, netip.AddrPort{}); err != nil {
		t.Fatal(err)
	}
	e, err := o.ParseEndpoint(to.String())
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Trains of every shape arrive whole and in order, in both families, with and
// without offloads, and answers carry the endpoint of the path.
func TestBindCarries(t *testing.T) {
	for _, off := range []string{"", "-gso", "-gro", "-gso,-gro", "+gso"} {
		for _, v6 := range []bool{false, true} {
			a, b := openBind(t, Config{Offloads: off}, peerOf(keyB, true)), openBind(t, Config{Offloads: off}, peerOf(keyA, true))
			toB, toA := a.path(t, keyB, b.at(v6)), b.path(t, keyA, a.at(v6))
			var out [][]byte
			for i := range 100 {
				n := 1400
				if i%30 == 29 || i > 90 {
					n = 100 + i
				}
				m := wireGuard(typeData, uint32(i), n)
				m[n-1] = byte(i)
				out = append(out, m)
			}
			if err := a.Send(out, toB); err != nil {
				t.Fatal(err)
			}
			for i := range out {
				m := b.next(t)
				if !bytes.Equal(m.data, out[i]) {
					t.Fatalf("%q v6=%v: message %d differs", off, v6, i)
				}
				if m.ep != toA {
					t.Fatalf("%q v6=%v: endpoint %v, not the registered one", off, v6, m.ep)
				}
			}
			if got := a.peers.byKey(keyB).sent.Load(); got != 100 {
				t.Errorf("sent %d", got)
			}
		}
	}
}

// What comes to a second address of this host is answered from there: STUN from
// within Receive, messages when the path is registered so. A datagram that came
// to another address moves nothing; an address that is gone does no harm.
func TestBindAnswersFromTheAskedAddress(t *testing.T) {
	asked := netip.AddrFrom4([4]byte{127, 0, 0, 9})
	answers := make(chan netip.AddrPort, 1)
	var b *opened
	a := openBind(t, Config{Receive: func(_ []byte, from, _ netip.AddrPort) { answers <- from }}, peerOf(keyB, true))
	b = openBind(t, Config{Receive: func(p []byte, from, at netip.AddrPort) {
		if err := b.send(p, from, at, 0); err != nil {
			t.Error(err)
		}
	}}, peerOf(keyA, true))
	toB, toA := a.path(t, keyB, netip.AddrPortFrom(asked, b.port())), b.path(t, keyA, a.at(false))
	if err := a.send(stunMessage(60), netip.AddrPortFrom(asked, b.port()), netip.AddrPort{}, 0); err != nil {
		t.Fatal(err)
	}
	if from := <-answers; from.Addr() != asked {
		t.Errorf("answer from %v", from)
	}
	hello := wireGuard(typeData, 1, 64)
	answer := func(from netip.Addr) {
		t.Helper()
		if err := b.Send([][]byte{hello}, toA); err != nil {
			t.Fatal(err)
		}
		if m := a.next(t); m.ep.DstIP() != from {
			t.Errorf("data from %s, want %s", m.ep.DstToString(), from)
		}
	}
	b.setPath(keyA, a.at(false), netip.AddrPortFrom(asked, 0))
	if err := a.send(hello, b.at(false), netip.AddrPort{}, 0); err != nil { // to the other address
		t.Fatal(err)
	}
	b.next(t)
	toA.ClearSrc() // as wireguard-go does in the silence of the far side
	answer(asked)
	if toB.SrcIP().IsValid() {
		t.Error("an answer moved the source")
	}
	gone := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 77}), 0) // not this host's
	b.setPath(keyA, a.at(false), gone)
	answer(a.at(false).Addr())
	if err := b.send(hello, a.at(false), gone, 0); err != nil {
		t.Error(err)
	}
	a.next(t)
}

// sender is a plain UDP socket.
func sender(t *testing.T) *net.UDPConn {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// One GRO buffer holds STUN, ours, WireGuard and nonsense mixed.
func TestBindTellsApart(t *testing.T) {
	stuns := make(chan []byte, 10)
	froms := make(chan netip.AddrPort, 10)
	o := openBind(t, Config{Receive: func(b []byte, from, _ netip.AddrPort) { stuns <- bytes.Clone(b); froms <- from }})
	c := sender(t)
	own := bytes.Repeat([]byte{0x90}, initiationSize)
	fragment := bytes.Repeat([]byte{0x80}, initiationSize) // of no session
	unknown := bytes.Repeat([]byte{0x20}, initiationSize)
	stun, first, last := stunMessage(initiationSize), wireGuard(1, 5, initiationSize), wireGuard(4, 6, 77)
	train := slices.Concat(stun, first, own, unknown, fragment, stun, last)
	control := make([]byte, 0, controlSpace)
	k := segmentControl(control, initiationSize)
	if _, _, err := c.WriteMsgUDPAddrPort(train, k, o.at(false)); err != nil {
		t.Skip("no UDP_SEGMENT: ", err)
	}
	for _, want := range [][]byte{first, last} {
		if m := o.next(t); !bytes.Equal(m.data, want) {
			t.Fatalf("%d bytes, want %d", len(m.data), len(want))
		}
	}
	o.nothing(t)
	for range 2 {
		if b := <-stuns; !bytes.Equal(b, stun) {
			t.Fatal("STUN differs")
		}
		if from := <-froms; from != c.LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Fatalf("from %v", from)
		}
	}
	if foreign, fragments := o.drops.foreign.Load(), o.drops.fragments.Load(); foreign != 2 || fragments != 1 {
		t.Fatalf("%d foreign, %d fragments dropped", foreign, fragments)
	}
}

func segmentControl(b []byte, segment int) []byte {
	c := control{b: b}
	c.segment(segment)
	return c.b
}

// Strangers' messages pass, and leave nothing behind.
func TestBindKeepsNoStrangers(t *testing.T) {
	o := openBind(t, Config{})
	for range 5 {
		c := sender(t)
		if _, err := c.WriteToUDPAddrPort(wireGuard(typeData, 1, 64), o.at(false)); err != nil {
			t.Fatal(err)
		}
		if m := o.next(t); m.ep.DstToString() != c.LocalAddr().String() {
			t.Fatalf("from %s", m.ep.DstToString())
		}
	}
	if n := len(o.peers.paths); n != 0 {
		t.Fatalf("%d endpoints kept", n)
	}
	if o.inbound.held != 0 {
		t.Fatalf("%d credits for sessions that do not exist", o.inbound.held)
	}
}

func TestSendTTL(t *testing.T) {
	o := openBind(t, Config{})
	for network, option := range map[string][3]int{
		"udp4": {unix.IPPROTO_IP, unix.IP_RECVTTL, unix.IP_TTL},
		"udp6": {unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, unix.IPV6_HOPLIMIT},
	} {
		addr := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}
		if network == "udp6" {
			addr.IP = net.IPv6loopback
		}
		c, err := net.ListenUDP(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		raw, _ := c.SyscallConn()
		if err := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), option[0], option[1], 1) }); err != nil {
			t.Fatal(err)
		}
		for _, ttl := range []int{0, 3, 255, 0} {
			if err := o.send([]byte("hello"), c.LocalAddr().(*net.UDPAddr).AddrPort(), netip.AddrPort{}, ttl); err != nil {
				t.Fatal(err)
			}
			want := ttl
			if ttl == 0 {
				want = 64
			}
			if got := receivedTTL(t, c, option[2]); got != want {
				t.Errorf("%s: ttl %d, want %d", network, got, want)
			}
		}
	}
}

func receivedTTL(t *testing.T, c *net.UDPConn, kind int) int {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b, oob := make([]byte, 100), make([]byte, 100)
	n, k, _, _, err := c.ReadMsgUDPAddrPort(b, oob)
	if err != nil || string(b[:n]) != "hello" {
		t.Fatalf("read %q: %v", b[:n], err)
	}
	h, data, _, err := unix.ParseOneSocketControlMessage(oob[:k])
	if err != nil || int(h.Type) != kind {
		t.Fatalf("control %v: %v", h, err)
	}
	return int(binary.NativeEndian.Uint32(data))
}

func TestSendRefuses(t *testing.T) {
	o := openBind(t, Config{})
	if err := o.send([]byte{1}, netip.AddrPortFrom(handleA, 9), netip.AddrPort{}, 0); !errors.Is(err, errMesh) {
		t.Errorf("into the mesh: %v", err)
	}
	if err := o.send(make([]byte, 70000), o.at(false), netip.AddrPort{}, 0); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too large: %v", err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if err := o.send([]byte{1}, netip.MustParseAddrPort("127.0.0.1:9"), netip.AddrPort{}, 0); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

func TestHandles(t *testing.T) {
	var demands atomic.Int32
	o := openBind(t, Config{Demand: func(k Key) {
		if k == keyA {
			demands.Add(1)
		}
	}}, peerOf(keyA, true))
	seen := make(map[netip.AddrPort]bool)
	for range 20 {
		h := o.handle(keyA, handleA)
		if seen[h] || h.Addr() != handleA || h.Port() == 0 {
			t.Fatalf("handle %v", h)
		}
		seen[h] = true
	}
	e, err := o.ParseEndpoint(o.handle(keyA, handleA).String())
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Send([][]byte{wireGuard(1, 1, initiationSize)}, e); err != nil {
		t.Fatal(err)
	}
	if demands.Load() != 1 || o.drops.handled.Load() != 1 {
		t.Fatalf("%d demands, %d drops", demands.Load(), o.drops.handled.Load())
	}
	if n := len(o.peers.paths); n > maxEndpoints {
		t.Fatalf("%d endpoints kept", n)
	}
	if h := o.handle(keyB, handleA); h.IsValid() {
		t.Fatalf("handle %v of a stranger", h)
	}
	old, _ := o.ParseEndpoint("[fd00:1::a]:1") // forgotten, but still no path
	if err := o.Send([][]byte{wireGuard(1, 1, initiationSize)}, old); err != nil || o.drops.handled.Load() != 2 {
		t.Fatalf("not dropped: %v", err)
	}
}

func TestDemandAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		demands := 0
		table := newPeers()
		table.set([]Peer{peerOf(keyA, true)})
		b := newBind(Config{Demand: func(Key) { demands++ }}, table)
		p := table.byKey(keyA)
		for _, c := range []struct {
			wait       time.Duration
			content    int
			initiation bool
			want       int
		}{
			{0, 1, false, 1},
			{silence - 1, 1, false, 1},
			{silence - 1, 3, false, 1},
			{silence, 0, false, 1}, // a keepalive is no traffic
			{0, 1, false, 2},
			{silence, 0, true, 3},
		} {
			time.Sleep(c.wait)
			if b.spoke(p, c.content, c.initiation); demands != c.want {
				t.Fatalf("after %v: %d demands, want %d", c.wait, demands, c.want)
			}
		}
		if p.sent.Load() != 6 {
			t.Fatalf("sent %d", p.sent.Load())
		}
	})
}

func TestHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var sent []byte
		h := newHolds(func(m []byte, _ *endpoint) {
			mu.Lock()
			defer mu.Unlock()
			sent = append(sent, m[1])
		})
		a, b := newEndpoint(netip.AddrPort{}, &peer{}), newEndpoint(netip.AddrPort{}, &peer{})
		keep := func(e *endpoint, mark byte) { h.keep(bytes.Repeat([]byte{mark}, initiationSize), e) }
		expect := func(want ...byte) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(sent, want) {
				t.Fatalf("sent %v, want %v", sent, want)
			}
		}
		keep(a, 1) // not started
		h.start()
		keep(a, 2)
		keep(b, 3)
		time.Sleep(holdTime / 2)
		keep(a, 4) // instead of 2
		h.drop(b.peer)
		time.Sleep(holdTime / 2)
		expect()
		time.Sleep(holdTime / 2)
		expect(4)
		keep(a, 5)
		h.stop()
		time.Sleep(2 * holdTime)
		expect(4)
		h.start()
		keep(a, 6)
		time.Sleep(holdTime)
		expect(4, 6)
	})
}

// The side that should not initiate waits; a response it sends meanwhile makes
// its own initiation needless.
func TestBindHoldsInitiations(t *testing.T) {
	a, b := openBind(t, Config{}, peerOf(keyB, false)), openBind(t, Config{}, peerOf(keyA, true))
	toB, toA := a.path(t, keyB, b.at(false)), b.path(t, keyA, a.at(false))
	begin := time.Now()
	initiation := wireGuard(typeInitiation, 7, initiationSize)
	if err := a.Send([][]byte{initiation}, toB); err != nil {
		t.Fatal(err)
	}
	clear(initiation) // the caller's memory, reused
	if m := b.next(t); indexOf(m.data) != 7 || time.Since(begin) < holdTime {
		t.Fatalf("index %d after %v", indexOf(m.data), time.Since(begin))
	}
	if err := b.Send([][]byte{wireGuard(typeInitiation, 8, initiationSize)}, toA); err != nil {
		t.Fatal(err)
	}
	a.next(t) // not held
	for _, kind := range []byte{typeInitiation, typeResponse} {
		n := map[byte]int{typeInitiation: initiationSize, typeResponse: responseSize}[kind]
		if err := a.Send([][]byte{wireGuard(kind, 9, n)}, toB); err != nil {
			t.Fatal(err)
		}
	}
	if m := b.next(t); m.data[0] != typeResponse {
		t.Fatalf("type %d", m.data[0])
	}
	time.Sleep(holdTime)
	b.nothing(t)
	if p := a.peers.byIndex(9); p == nil || p.key != keyB {
		t.Fatal("session index not learned")
	}
}

func TestBindPort(t *testing.T) {
	o := openBind(t, Config{})
	if _, _, err := o.Open(0); !errors.Is(err, conn.ErrBindAlreadyOpen) {
		t.Errorf("second open: %v", err)
	}
	other := newBind(Config{Port: o.port()}, newPeers())
	if _, _, err := other.Open(0); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("taken in both: %v", err)
	}
	c, err := net.ListenUDP("udp6", &net.UDPAddr{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, _, err := other.Open(uint16(c.LocalAddr().(*net.UDPAddr).Port)); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("taken in one: %v", err)
	}
	port := o.port()
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o.start(t, port)
	if o.port() != port {
		t.Errorf("port %d after reopening, want %d", o.port(), port)
	}
	if err := o.SetMark(0); err != nil {
		t.Error(err)
	}
}

// Out of credits, receiving waits; Close ends the wait.
func TestReceiveWaitsForCredits(t *testing.T) {
	o := openBind(t, Config{}, peerOf(keyA, true))
	p := o.peers.byKey(keyA)
	o.peers.learn(5, p)
	c := sender(t)
	for range 3 {
		if _, err := c.WriteToUDPAddrPort(wireGuard(typeData, 5, 64), o.at(false)); err != nil {
			t.Fatal(err)
		}
		o.next(t)
	}
	if _, err := c.WriteToUDPAddrPort(wireGuard(typeData, 5, keepaliveSize), o.at(false)); err != nil {
		t.Fatal(err)
	}
	o.next(t)
	o.inbound.mu.Lock()
	defer o.inbound.mu.Unlock()
	if o.inbound.held != 3 || p.in.held != 3 {
		t.Fatalf("held %d, want 3: keepalives never reach the TUN", o.inbound.held)
	}
}

func TestManglesTrains(t *testing.T) {
	for release, want := range map[string]bool{
		"6.18.44-fc": false, "7.0": true, "7.0.9-arch1": true, "7.1.4": true, "7.1.4-rc1": true,
		"7.1.5": false, "7.2.0": false, "7.10.1": false, "": false, "x": false,
	} {
		if got := manglesTrains(release); got != want {
			t.Errorf("%q: %v", release, got)
		}
	}
}

func TestParseEndpoint(t *testing.T) {
	b := newBind(Config{}, newPeers())
	for _, s := range []string{"", "1.2.3.4", "host:1", "[fe80::1%eth0]:1", "1.2.3.4:70000"} {
		if e, err := b.ParseEndpoint(s); err == nil {
			t.Errorf("%q: %v", s, e)
		}
	}
	e, err := b.ParseEndpoint("[::ffff:1.2.3.4]:5")
	if err != nil || e.DstToString() != "1.2.3.4:5" || !bytes.Equal(e.DstToBytes(), []byte{1, 2, 3, 4, 5, 0}) {
		t.Errorf("%v, %v", e, err)
	}
	if err := b.Send([][]byte{wireGuard(4, 1, 64)}, &conn.StdNetEndpoint{}); !errors.Is(err, conn.ErrWrongEndpointType) {
		t.Errorf("foreign endpoint: %v", err)
	}
}

// A train whose segments the path cannot carry goes again without UDP_SEGMENT.
func TestSendWithoutSegmentation(t *testing.T) {
	a, b := openBind(t, Config{}, peerOf(keyB, true)), openBind(t, Config{})
	toB := a.path(t, keyB, b.at(false))
	n := 33000 // two of these do not fit one UDP_SEGMENT send, three are three sends
	out := [][]byte{wireGuard(4, 1, n), wireGuard(4, 2, n), wireGuard(4, 3, n)}
	if err := a.Send(out, toB); err != nil {
		t.Fatal(err)
	}
	for i := range out {
		if m := b.next(t); indexOf(m.data) != uint32(i+1) || len(m.data) != n {
			t.Fatalf("message %d: %d bytes", indexOf(m.data), len(m.data))
		}
	}
}

func FuzzDeliver(f *testing.F) {
	f.Add(slices.Concat(stunMessage(40), wireGuard(4, 1, 40), []byte{0x80, 1}), 40)
	f.Add(stunMessage(20), 0)
	f.Fuzz(func(t *testing.T, data []byte, segment int) {
		if len(data) > receiveSize {
			return
		}
		stun := 0
		b := newBind(Config{Receive: func(b []byte, _, _ netip.AddrPort) { stun += len(b) }}, newPeers())
		in := newIntake(b, nil)
		r := newReceiver(b, in, nil)
		in.load(netip.AddrPort{}, data, segment)
		packets := [][]byte{make([]byte, 2000), make([]byte, 2000)}
		sizes, eps := make([]int, 2), make([]conn.Endpoint, 2)
		for n := r.deliver(packets, sizes, eps); n > 0; n = r.deliver(packets, sizes, eps) {
			for i := range n {
				if frameOf(packets[i][:sizes[i]]) != frameWireGuard || eps[i] == nil {
					t.Fatal("not WireGuard")
				}
			}
		}
		if len(r.now.data) > 0 || stun > len(data) {
			t.Fatal("not all told apart")
		}
	})
}

func FuzzParseControl(f *testing.F) {
	f.Add(segmentControl(make([]byte, 0, controlSpace), 9))
	f.Fuzz(func(_ *testing.T, b []byte) { parseControl(b) })
}

// Batches go both ways without allocating, whole and in fragments, which come in
// one piece or not.
func TestBindAllocatesNothing(t *testing.T) {
	a, b := benchPair(t)
	batches := largeBatches()
	batches["plain"] = a.out
	for name, out := range batches {
		for _, gro := range []int{1, 0} {
			if err := b.b.open.Load().v4.set(unix.IPPROTO_UDP, unix.UDP_GRO, gro); err != nil {
				t.Fatal(err)
			}
			a.out = out
			if n := testing.AllocsPerRun(200, func() { a.send(t); b.receive(t, len(out)) }); n >= 1 {
				t.Errorf("%s, gro %d: %v allocations", name, gro, n)
			}
		}
	}
}
