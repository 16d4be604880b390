package relay

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const answerTime = 5 * time.Second

// serve serves a socket until the test ends.
func (w *site) serve(t testing.TB, network, addr string) *net.UDPConn {
	t.Helper()
	c := listen(t, network, addr)
	if _, err := openSocket(c); err != nil { // what arrives before that does not say where
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return w.s.ServeUDP(ctx, c) })
	t.Cleanup(func() {
		stop()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func listen(t testing.TB, network, addr string) *net.UDPConn {
	t.Helper()
	a, err := net.ResolveUDPAddr(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenUDP(network, a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func addrOf(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

// station is a member with a socket.
type station struct {
	*guest
	t     testing.TB
	conn  *net.UDPConn
	relay netip.AddrPort
}

// station makes a member's socket and admits it at a relay's address.
func (w *site) station(t testing.TB, number int, relay netip.AddrPort) *station {
	t.Helper()
	host := "127.0.0.1:0"
	if relay.Addr().Is6() {
		host = "[::1]:0"
	}
	s := &station{w.guest(number), t, listen(t, "udp", host), relay}
	s.join()
	return s
}

func (s *station) join() {
	s.t.Helper()
	c, ok := parseChallenge(s.ask(s.hello()))
	if !ok {
		s.t.Fatal("no challenge")
	}
	s.cookie = c.cookie
	reply := s.ask(s.admit())
	if p, ok := parsePong(reply); !ok || !s.session.sealed(reply) || p.observed != addrOf(s.conn) {
		s.t.Fatalf("no pong, but % x", reply)
	}
}

// ask sends a message and returns the answer, which must come from where the
// message went.
func (s *station) ask(msg []byte) []byte {
	s.t.Helper()
	s.send(msg)
	b, from := s.receive()
	if from != s.relay || len(b) > len(msg) {
		s.t.Errorf("%d bytes from %s answer %d to %s", len(b), from, len(msg), s.relay)
	}
	return b
}

func (s *station) send(b []byte) {
	s.t.Helper()
	if _, err := s.conn.WriteToUDPAddrPort(b, s.relay); err != nil {
		s.t.Fatal(err)
	}
}

// sendTrain sends datagrams of one size as the kernel's one message.
func (s *station) sendTrain(b []byte, stride int) {
	s.t.Helper()
	c := control{b: make([]byte, 0, controlSpace)}
	c.segment(stride)
	if _, _, err := s.conn.WriteMsgUDPAddrPort(b, c.b, s.relay); err != nil {
		s.t.Fatal(err)
	}
}

func (s *station) receive() ([]byte, netip.AddrPort) {
	s.t.Helper()
	_ = s.conn.SetReadDeadline(time.Now().Add(answerTime))
	b := make([]byte, 1<<16)
	n, from, err := s.conn.ReadFromUDPAddrPort(b)
	if err != nil {
		s.t.Fatal(err)
	}
	return b[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// expect makes sure that datagrams arrive, in order.
func (s *station) expect(want ...[]byte) {
	s.t.Helper()
	for i, w := range want {
		if b, from := s.receive(); !bytes.Equal(b, w) || from != s.relay {
			s.t.Fatalf("datagram %d is %q from %s, not %q", i, head(b), from, head(w))
		}
	}
}

func head(b []byte) []byte { return b[:min(len(b), 24)] }

// silence makes sure that nothing more came: a message asked after all that was
// sent is answered next.
func (s *station) silence() {
	s.t.Helper()
	if reply := s.ask(s.hello()); kindOf(reply) != kindPong {
		s.t.Errorf("received %q", head(reply))
	}
}

func (s *station) mustOpen(peers ...*station) {
	s.t.Helper()
	members := make([]*guest, len(peers))
	for i, p := range peers {
		members[i] = p.guest
	}
	o, ok := parseOpened(s.ask(s.open(members...)))
	if !ok || o.bitmap != 1<<len(peers)-1 {
		s.t.Fatalf("opened %+v %v", o, ok)
	}
}

// datagram is one of the flow between two stations, padded to a size.
func (s *station) datagram(to *station, text string, size int) []byte {
	h := FlowOf(s.key, to.key)
	b := append(h[:], text...)
	return append(b, make([]byte, max(0, size-len(b)))...)
}

// settled waits until the relay counted datagrams it did not forward.
func (w *site) settled(t testing.TB, what func(Drops) uint64, want uint64) {
	t.Helper()
	for deadline := time.Now().Add(answerTime); what(w.s.Stats().Drops) < want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v, want %d", w.s.Stats().Drops, want)
		}
	}
	if got := what(w.s.Stats().Drops); got != want {
		t.Errorf("%+v, want %d", w.s.Stats().Drops, want)
	}
}

func TestForward(t *testing.T) {
	for _, network := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(network, func(t *testing.T) {
			w := newSite(t, ServerConfig{})
			relay := addrOf(w.serve(t, "udp", network))
			a, b := w.station(t, 1, relay), w.station(t, 2, relay)
			a.mustOpen(b)
			there, back := a.datagram(b, "there", 0), b.datagram(a, "back", 1400)
			a.send(there)
			b.expect(there)
			b.send(back)
			a.expect(back)
			for deadline := time.Now().Add(answerTime); w.s.Stats().Datagrams < 2 && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond) // it counts after it has sent
			}
			if st := w.s.Stats(); st.Datagrams != 2 || st.Bytes != uint64(len(there)+len(back)) || st.Drops != (Drops{}) {
				t.Errorf("%+v", st)
			}
		})
	}
}

// A relay with several addresses and ports answers from the one that was asked,
// and two nodes need not use the same.
func TestForwardBetweenSockets(t *testing.T) {
	w := newSite(t, ServerConfig{})
	any4 := addrOf(w.serve(t, "udp4", "0.0.0.0:0")).Port()
	six := addrOf(w.serve(t, "udp6", "[::1]:0"))
	a := w.station(t, 1, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), any4))
	b := w.station(t, 2, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), any4))
	c := w.station(t, 3, six)
	a.mustOpen(b, c)
	for _, to := range []*station{b, c} {
		d := a.datagram(to, "there", 100)
		a.send(d)
		to.expect(d)
		to.send(d)
		a.expect(d)
	}
}

// Trains arrive datagram by datagram whatever the kernel joins on the way, also
// where it refuses to take a train from the relay.
func TestForwardTrains(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		w := newSite(t, ServerConfig{})
		c := w.serve(t, "udp4", "127.0.0.1:0")
		a, b := w.station(t, 1, addrOf(c)), w.station(t, 2, addrOf(c))
		a.mustOpen(b)
		if refuse { // the kernel segments only what it gives a checksum
			raw, _ := c.SyscallConn()
			if err := raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1) }); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			var train []byte
			var want [][]byte
			for i := range 40 {
				size := 1000
				if i == 39 {
					size = 500
				}
				d := a.datagram(b, string(rune('a'+i)), size)
				train, want = append(train, d...), append(want, d)
			}
			a.sendTrain(train, 1000)
			b.expect(want...)
		}
		if flat := w.active(b.guest).flat.holds(w.s.clock()); flat != refuse {
			t.Errorf("refused %v, remembered %v", refuse, flat)
		}
		if st := w.s.Stats(); st.Datagrams != 120 || st.Drops != (Drops{}) {
			t.Errorf("%+v", st)
		}
	}
}

// The kernel joins what one sender sends whatever it belongs to: every datagram
// goes where it belongs or nowhere.
func TestMixedBuffer(t *testing.T) {
	const size = helloSize
	w := newSite(t, ServerConfig{Answer: func(b []byte, _, _ netip.AddrPort) []byte { return b[:4] }})
	relay := addrOf(w.serve(t, "udp4", "127.0.0.1:0"))
	a, b, c, d := w.station(t, 1, relay), w.station(t, 2, relay), w.station(t, 3, relay), w.station(t, 4, relay)
	a.mustOpen(b, c)
	c.mustOpen(d)
	b1, b2, b3 := a.datagram(b, "b1", size), a.datagram(b, "b2", size), a.datagram(b, "b3", size)
	c1, c2 := a.datagram(c, "c1", size), a.datagram(c, "c2", size)
	stun := append([]byte("stun"), make([]byte, size-4)...)
	junk := append([]byte{FlowByte}, bytes.Repeat([]byte{7}, size-1)...)
	a.sendTrain(slices.Concat(b1, b2, c1, c.datagram(d, "foreign", size), junk, a.hello(), b3, stun, c2, []byte{FlowByte, 1}), size)
	b.expect(b1, b2, b3)
	c.expect(c1, c2)
	if pong, _ := a.receive(); kindOf(pong) != kindPong {
		t.Errorf("received %q", head(pong))
	}
	a.expect([]byte("stun"))
	for _, s := range []*station{a, b, c, d} {
		s.silence()
	}
	if got, want := w.s.Stats().Drops, (Drops{Flow: 1, Source: 1, Malformed: 1}); got != want {
		t.Errorf("%+v", got)
	}
}

// Who is not one of a flow's two nodes cannot send into it.
func TestSpoofedSource(t *testing.T) {
	w := newSite(t, ServerConfig{})
	relay := addrOf(w.serve(t, "udp4", "127.0.0.1:0"))
	a, b, c := w.station(t, 1, relay), w.station(t, 2, relay), w.station(t, 3, relay)
	a.mustOpen(b)
	thief := &station{c.guest, t, listen(t, "udp4", "127.0.0.1:0"), relay}
	for _, s := range []*station{c, thief} {
		s.send(a.datagram(b, "spoofed", 100))
		s.sendTrain(bytes.Repeat(a.datagram(b, "spoofed", 100), 3), 100)
	}
	w.settled(t, func(d Drops) uint64 { return d.Source }, 8)
	a.silence()
	b.silence()
}

func TestOversize(t *testing.T) {
	w := newSite(t, ServerConfig{})
	relay := addrOf(w.serve(t, "udp4", "127.0.0.1:0"))
	a, b := w.station(t, 1, relay), w.station(t, 2, relay)
	a.mustOpen(b)
	longest := a.datagram(b, "longest", MaxFrame)
	a.send(a.datagram(b, "too long", MaxFrame+1))
	a.send(longest)
	a.send(a.datagram(b, "the longest there is", maxTrain))
	b.expect(longest)
	w.settled(t, func(d Drops) uint64 { return d.Oversize }, 2)
	b.silence()
}

// A relay that starts again knows nobody, and everybody is back after a cookie.
func TestRestart(t *testing.T) {
	w := newSite(t, ServerConfig{})
	c := listen(t, "udp4", "127.0.0.1:0")
	ctx, stop := context.WithCancel(t.Context())
	var g errgroup.Group
	g.Go(func() error { return w.s.ServeUDP(ctx, c) })
	a, b := w.station(t, 1, addrOf(c)), w.station(t, 2, addrOf(c))
	a.mustOpen(b)
	stop()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	next := newSite(t, ServerConfig{})
	next.members = w.members
	next.serve(t, "udp4", a.relay.String())
	a.send(a.datagram(b, "to nobody", 100))
	a.join()
	b.join()
	a.mustOpen(b)
	d := a.datagram(b, "again", 100)
	a.send(d)
	b.expect(d)
}

// ServeUDP ends when its socket is closed.
func TestServeUDPEndsWithSocket(t *testing.T) {
	w := newSite(t, ServerConfig{})
	c := listen(t, "udp4", "127.0.0.1:0")
	var g errgroup.Group
	g.Go(func() error { return w.s.ServeUDP(context.Background(), c) })
	w.station(t, 1, addrOf(c))
	_ = c.Close()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if err := w.s.ServeUDP(context.Background(), c); err == nil {
		t.Error("a closed socket is served")
	}
}

// A local address that is gone costs nothing.
func TestBadSourceAddress(t *testing.T) {
	w := newSite(t, ServerConfig{})
	relay := addrOf(w.serve(t, "udp4", "127.0.0.1:0"))
	a, b := w.station(t, 1, relay), w.station(t, 2, relay)
	a.mustOpen(b)
	for _, stride := range []int{100, 0} {
		now := w.active(b.guest)
		way := &transport{addr: now.addr, socket: now.socket, name: now.name, size: now.size, local: netip.MustParseAddr("192.0.2.1")}
		w.node(b.guest).active.Store(way)
		d := a.datagram(b, "there", 100)
		if stride > 0 {
			a.sendTrain(slices.Concat(d, d), stride)
			b.expect(d, d)
		} else {
			a.send(d)
			b.expect(d)
		}
		if !way.unpinned.Load() {
			t.Error("the address is kept")
		}
	}
}

// A socket that takes nothing delays the loop a moment and loses what waits.
func TestFullSocket(t *testing.T) {
	w := newSite(t, ServerConfig{})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	defer func() { _, _ = near.Close(), far.Close() }()
	raw, err := near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	to := &transport{socket: &socket{raw: raw}}
	tr := newTrain(w.s)
	const count = 64 * trainGroups // more than such a socket holds
	for range count {
		tr.add(to, make([]byte, 100), 100)
	}
	tr.flush()
	st := w.s.Stats()
	if st.Datagrams+st.Drops.Full != count || st.Datagrams == 0 || st.Drops.Full == 0 {
		t.Fatalf("%+v", st)
	}
	b := make([]byte, 200)
	if n, err := far.Read(b); n != 100 || err != nil {
		t.Fatal(n, err)
	}
	tr.add(to, b[:100], 100)
	if tr.flush(); w.s.Stats().Datagrams != st.Datagrams+1 {
		t.Errorf("%+v", w.s.Stats())
	}
}

func TestRateLimits(t *testing.T) {
	for _, cfg := range []ServerConfig{{FlowRate: 1000}, {NodeRate: 1000}} {
		w := newSite(t, cfg) // its clock stands still: there is the burst only
		relay := addrOf(w.serve(t, "udp4", "127.0.0.1:0"))
		a, b := w.station(t, 1, relay), w.station(t, 2, relay)
		a.mustOpen(b)
		const size, burst = 1000, minRateBurst / 1000
		var want [][]byte
		for i := range 2 * burst / 20 {
			train := bytes.Repeat(a.datagram(b, string(rune(i)), size), 20)
			a.sendTrain(train, size)
			for n := range 20 {
				if i*20+n < burst {
					want = append(want, train[:size])
				}
			}
			if i*20 < burst {
				b.expect(want...)
				want = nil
			}
		}
		w.settled(t, func(d Drops) uint64 { return d.Rate }, 2*burst/20*20-burst)
		b.silence()
		back := b.datagram(a, "the other direction", size)
		b.send(back)
		a.expect(back)
	}
}
