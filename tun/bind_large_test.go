package tun

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// largePeer is a peer that takes large messages.
func largePeer(k Key) Peer {
	p := peerOf(k, true)
	p.Capabilities = Large
	return p
}

// openLarge is a bind whose peer takes large messages, as it does itself.
func openLarge(t testing.TB, c Config, k Key) *opened {
	c.MTU = 1400
	o := openBind(t, c)
	o.peers.large = true
	o.peers.set([]Peer{largePeer(k)})
	return o
}

// largePair is two such, with paths to each other, and a session of the second's.
func largePair(t *testing.T, c Config, v6 bool) (a, b *opened, toB *endpoint) {
	a, b = openLarge(t, c, keyB), openLarge(t, c, keyA)
	b.path(t, keyA, a.at(v6))
	b.peers.learn(3, b.peers.byKey(keyA))
	return a, b, a.path(t, keyB, b.at(v6)).(*endpoint)
}

// arrives expects messages in order; credits are given back.
func (o *opened) arrives(t *testing.T, want [][]byte) {
	t.Helper()
	for i := range want {
		m := o.next(t)
		if !bytes.Equal(m.data, want[i]) {
			t.Fatalf("message %d: %d bytes, want %d", i, len(m.data), len(want[i]))
		}
		o.inbound.settle(&o.peers.byKey(keyA).in, 1)
	}
}

// Messages of all sizes arrive whole and in order, in both families, with and
// without offloads.
func TestBindCarriesLarge(t *testing.T) {
	for _, off := range []string{"", "-gso", "-gro", "-gso,-gro"} {
		for _, v6 := range []bool{false, true} {
			a, b, toB := largePair(t, Config{Offloads: off}, v6)
			for round := range 3 {
				var out [][]byte
				for i, n := range []int{62000, 62016, 96, 5502, 5502, 5502, 1432, 1432, 1433, 64, maxPacket, 80, 30000} {
					out = append(out, dataMessage(3, uint64(round*100+i), n))
				}
				if err := a.Send(out, toB); err != nil {
					t.Fatal(err)
				}
				b.arrives(t, out)
			}
			if n := b.drops.fragments.Load() + b.drops.incomplete.Load() + b.drops.foreign.Load(); n != 0 {
				t.Errorf("%q v6=%v: %d drops", off, v6, n)
			}
		}
	}
}

// A peer that does not take large messages never gets a fragment.
func TestBindCutsForTheCapable(t *testing.T) {
	a, b, toB := largePair(t, Config{}, false)
	m := [][]byte{dataMessage(3, 1, 5000)}
	a.peers.set([]Peer{peerOf(keyB, true)})
	b.peers.set(nil) // fragments are refused: what arrives came whole
	if err := a.Send(m, toB); err != nil {
		t.Fatal(err)
	}
	if got := b.next(t); !bytes.Equal(got.data, m[0]) {
		t.Fatalf("%d bytes", len(got.data))
	}
}

// A path in use follows the interface.
func TestDatagram(t *testing.T) {
	o := openBind(t, Config{MTU: 1280}, peerOf(keyA, true))
	at := netip.MustParseAddrPort("192.0.2.1:1")
	e := o.path(t, keyA, at).(*endpoint)
	if e.datagram() != 1312 {
		t.Errorf("%d bytes", e.datagram())
	}
	if o.mtu.Store(600); e.datagram() != 632 {
		t.Errorf("%d bytes after a change", e.datagram())
	}
	if e := newEndpoint(at, nil); e.datagram() != defaultDatagram {
		t.Errorf("%d bytes of an unknown path", e.datagram())
	}
}

// Trains the kernel refuses go as single datagrams, without loss, and after a
// while trains are tried again.
func TestSegmentationComesBack(t *testing.T) {
	a, b, toB := largePair(t, Config{}, false)
	s := a.open.Load().v4
	send := func(counter uint64, flat bool) {
		t.Helper()
		out := [][]byte{dataMessage(3, counter, 62000), dataMessage(3, counter+1, 100), dataMessage(3, counter+2, 62000)}
		if err := a.Send(out, toB); err != nil {
			t.Fatal(err)
		}
		b.arrives(t, out)
		if got := toB.flat.holds(a.now()); got != flat {
			t.Fatalf("flat: %v", got)
		}
	}
	send(1, false)
	if err := s.set(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil { // with it UDP_SEGMENT fails
		t.Fatal(err)
	}
	send(11, true)
	if err := s.set(unix.SOL_SOCKET, unix.SO_NO_CHECK, 0); err != nil {
		t.Fatal(err)
	}
	send(21, true)
	toB.flat.until.Add(-int64(refusalTime))
	send(31, false)
	s.flat.note(a.now())
	if a.segments(toB, s) {
		t.Error("the device refused, and trains go on")
	}
	s.flat.until.Add(-int64(refusalTime))
	if !a.segments(toB, s) {
		t.Error("the device refused for ever")
	}
}

// A train that is refused in the middle of a batch goes on where it was refused.
func TestSendResumes(t *testing.T) {
	s := newSpace(t)
	s.setMTU(t, "lo", 1500)
	var a, b *opened
	var toB *endpoint
	s.do(t, func() error {
		a, b, toB = largePair(t, Config{}, false)
		return nil
	})
	a.mtu.Store(4000) // more than the link does
	var out [][]byte
	for i, n := range []int{1400, 1400, 1400, 9000, 62000, 1400, 100} {
		out = append(out, dataMessage(3, uint64(i), n))
	}
	if err := a.Send(out, toB); err != nil {
		t.Fatal(err)
	}
	b.arrives(t, out)
	if !toB.flat.holds(a.now()) {
		t.Error("nothing was refused")
	}
}

// While others send fragments of every bad kind, a stream goes on, and they get
// nothing of the memory.
func TestBindWithstandsFragments(t *testing.T) {
	a, b, toB := largePair(t, Config{}, false)
	stranger := sender(t)
	good := fragmentsOf(t, dataMessage(3, 500, 62000), 1432)
	var bad [][]byte
	for i := range byte(100) {
		bad = append(bad, good[i%43], []byte{0x80 | i&0x7f, i, i, i, 3, 0, 0, 0, i}, []byte{0x80, 0, 0x10, 0x40}, good[0][:9])
	}
	for round := range uint64(20) {
		for _, p := range bad {
			if _, err := stranger.WriteToUDPAddrPort(p, b.at(false)); err != nil {
				t.Fatal(err)
			}
		}
		// Someone on the path can forge what only a peer should send.
		for _, p := range [][]byte{good[0], fragmentsOf(t, dataMessage(4, round, 5000), 1432)[0], renamed(good[:1])[0]} {
			if err := a.send(p, b.at(false), netip.AddrPort{}, 0); err != nil {
				t.Fatal(err)
			}
		}
		out := [][]byte{dataMessage(3, round, 62000), dataMessage(3, round+1000, 96), dataMessage(3, round+2000, 5502)}
		if err := a.Send(out, toB); err != nil {
			t.Fatal(err)
		}
		b.arrives(t, out)
	}
	if n, want := b.drops.fragments.Load()+b.drops.foreign.Load(), uint64(20*len(bad)/2); n < want {
		t.Errorf("%d dropped, want at least %d", n, want)
	}
}

// What the sockets drop because they are full is counted once, over reopening.
func TestBindCountsOverflow(t *testing.T) {
	x, y := benchPair(t)
	x.out = x.out[:1]
	port, counted := y.b.port(), uint32(0)
	for range 2 {
		s := y.b.open.Load().v4
		if err := s.set(unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			t.Fatal(err)
		}
		for range 50 {
			x.send(t)
		}
		counted += 50 - y.drain(t, s)
		x.send(t) // the next one says what was lost before it
		if n := y.drain(t, s); n != 1 {
			t.Fatalf("%d messages", n)
		}
		if counted == 0 || y.b.overflow.Load() != counted {
			t.Fatalf("%d lost, %d counted", counted, y.b.overflow.Load())
		}
		if err := y.b.Close(); err != nil {
			t.Fatal(err)
		}
		fns, _, err := y.b.Open(port)
		if err != nil {
			t.Fatal(err)
		}
		y.fn = fns[0]
	}
}

// drain receives until nothing comes any more.
func (h *half) drain(t *testing.T, s *socket) (n uint32) {
	t.Helper()
	for {
		var ready int
		var failed error
		if err := s.raw.Control(func(fd uintptr) {
			ready, failed = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50)
		}); err != nil {
			t.Fatal(err)
		}
		if errors.Is(failed, unix.EINTR) { // the runtime signals its threads
			continue
		}
		if ready == 0 {
			return n
		}
		k, err := h.fn(h.bufs, h.sizes, h.eps)
		if err != nil {
			t.Fatal(err)
		}
		n += uint32(k)
	}
}

// The meter hears of every message, keepalives too, and a report that is due is
// asked for.
func TestBindMeters(t *testing.T) {
	a := newAssembly(Config{})
	p := a.b.peers.byKey(keyA)
	var told []*peer
	a.b.reported = func(p *peer) { told = append(told, p) }
	at, session := assemblyPaths[keyA], assemblySessions[keyA]
	for i := range uint64(3000) {
		if i%10 == 7 {
			continue
		}
		n := 1432
		switch i % 3 {
		case 0:
			n = keepaliveSize
		case 1:
			n = 5000
		}
		parts := fragmentsOf(t, dataMessage(session, i, n), 1432)
		if i%2 == 0 {
			a.each(at, parts)
		} else {
			a.arrive(at, slices.Concat(parts...), len(parts[0]))
		}
	}
	received, missing := p.meter.totals()
	if received != 2700 || missing < 150 || missing > 300 {
		t.Errorf("%d received, %d missing", received, missing)
	}
	a.b.base = a.b.base.Add(-time.Hour)
	told = nil
	a.arrive(at, dataMessage(session, 3001, 64), 64)
	if len(told) != 1 || told[0] != p {
		t.Errorf("told %v", told)
	}
}

// Kernels before 6.13 say EINVAL of a train whose datagrams are longer than the
// path takes, and of a source that is gone. Only the latter costs the source,
// and that does not cost the trains.
func TestRefusedTrainKeepsItsSource(t *testing.T) {
	o := openBind(t, Config{}, peerOf(keyA, true))
	e := o.path(t, keyA, netip.MustParseAddrPort("192.0.2.1:1")).(*endpoint)
	source := netip.MustParseAddr("192.0.2.7")
	e.pin(source)
	c, s := batch{to: e, source: source}, &socket{}
	if !o.adapt(&c, s, unix.EINVAL, true) || e.SrcIP() != source || !e.flat.holds(o.now()) {
		t.Error("a refused train: the source is gone, or trains go on")
	}
	if !o.adapt(&c, s, unix.EINVAL, false) || e.SrcIP().IsValid() || e.flat.holds(o.now()) {
		t.Error("a refused datagram: the source stays, or trains do not come back")
	}
}
