package relay

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
)

const leg = 15 * time.Millisecond // one way between a node and the relay

// world is a relay, a node and the network between them, in memory and under a
// fake clock. The test holds mu but while time passes.
type world struct {
	mu     sync.Mutex
	t      *testing.T
	ctx    context.Context
	server *Server
	verify func([]byte) (Identity, error)
	addrs  []netip.AddrPort // of the relay
	node   netip.AddrPort   // the node's mapping

	udp, tcp  bool // what passes
	deadAddrs map[netip.AddrPort]bool
	detours   map[netip.AddrPort]time.Duration
	loseUp    func(b []byte) bool
	lostDown  func(b []byte, relay netip.AddrPort) bool
	mangle    func(b []byte) [][]byte // of what the relay answers

	client    *Client
	cfg       ClientConfig
	states    []string
	last      State
	peers     []string
	sent      []kind           // over UDP
	asked     []netip.AddrPort // where all but OPENs went
	dials     int
	conns     []net.Conn
	stuck     *stuckConn // the newest of them, node side
	sendErr   error
	delivered []int
}

func relayKey(n byte) (k [32]byte) {
	k[1], k[31] = n, 0x40
	return k
}

func nodeKeys(t testing.TB, n byte) (private [32]byte, public punch.Key, device ed25519.PrivateKey) {
	t.Helper()
	private = relayKey(n)
	c, err := NewClient(ClientConfig{PrivateKey: private, Relay: punch.Key{9}})
	if err != nil {
		t.Fatal(err)
	}
	return private, c.public, ed25519.NewKeyFromSeed(append([]byte{n}, make([]byte, 31)...))
}

// credentialsOf name a node to verifyNode.
func credentialsOf(public punch.Key, device ed25519.PrivateKey) []byte {
	return slices.Concat(device.Public().(ed25519.PublicKey), public[:])
}

func verifyNode(b []byte) (id Identity, err error) {
	if len(b) < 64 {
		return id, errors.New("no credentials")
	}
	copy(id.WireGuard[:], b[copy(id.Device[:], b):])
	return id, nil
}

func newWorld(t *testing.T) *world {
	w := &world{
		t: t, verify: verifyNode, udp: true, tcp: true,
		addrs:     []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:3478")},
		node:      netip.MustParseAddrPort("198.51.100.7:40000"),
		deadAddrs: map[netip.AddrPort]bool{},
	}
	w.restart()
	private, public, device := nodeKeys(t, 1)
	w.cfg = ClientConfig{
		Relay: w.server.PublicKey(), PrivateKey: private, Device: device,
		Credentials: credentialsOf(public, device), Boot: 7,
		Send: w.send, Dial: w.dial,
		Deliver: w.deliver, OnState: w.onState, OnPeer: w.onPeer,
	}
	client, err := NewClient(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.client = client
	return w
}

// restart replaces the relay by one that knows nobody.
func (w *world) restart() {
	server, err := NewServer(ServerConfig{
		PrivateKey: relayKey(99),
		Verify: func(b []byte) (Identity, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.verify(b)
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.server = server
	for _, c := range w.conns {
		_ = c.Close()
	}
	w.conns = nil
}

// run runs the client in a bubble, and what is to happen to it.
func (w *world) run(happen func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	w.ctx = ctx
	w.client.SetAddrs(w.addrs)
	w.mu.Lock()
	done := make(chan error, 1)
	go func() { done <- w.client.Run(ctx) }()
	server := w.server
	go func() { _ = server.Run(ctx) }()
	happen()
	w.mu.Unlock()
	cancel()
	if err := <-done; err != nil {
		w.t.Errorf("Run: %v", err)
	}
	for _, c := range w.conns {
		_ = c.Close()
	}
	synctest.Wait()
}

func (w *world) deliver(run []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.delivered = append(w.delivered, numbers(w.t, run)...)
}

func (w *world) onPeer(k punch.Key, here bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.peers = append(w.peers, fmt.Sprint(name(k), " ", here))
}

func (w *world) onState(s State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = s
	if n := len(w.states); n == 0 && s.Transport != None || n > 0 && w.states[n-1] != s.Transport.String() {
		w.states = append(w.states, s.Transport.String())
	}
}

func name(k punch.Key) string { return fmt.Sprintf("%x", k[:4]) }

// socketName is how the kernel would write an address: any name that is its own.
func socketName(a netip.AddrPort) (s sockaddr) {
	ip := a.Addr().As16()
	copy(s[copy(s[:], ip[:]):], []byte{byte(a.Port() >> 8), byte(a.Port())})
	return s
}

// send carries a datagram from the node to the relay, and the answer back.
func (w *world) send(b []byte, to netip.AddrPort) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, kindOf(b))
	if kindOf(b) != kindOpen {
		w.asked = append(w.asked, to)
	}
	if h, ok := parseHello(b); ok && !h.trial && w.last.Transport == TLS {
		w.t.Error("the relay is moved to UDP before the node listens there")
	}
	if w.sendErr != nil {
		return w.sendErr
	}
	if !w.udp || w.deadAddrs[to] || w.loseUp != nil && w.loseUp(b) {
		return nil
	}
	from := w.node
	b = slices.Clone(b)
	time.AfterFunc(leg+w.detours[to], func() {
		if reply := w.handle(b, from); reply != nil {
			w.reply(reply, from, to)
		}
	})
	return nil
}

func (w *world) handle(b []byte, from netip.AddrPort) []byte {
	w.mu.Lock()
	s := w.server
	w.mu.Unlock()
	t := &transport{addr: from, name: socketName(from)}
	if kindOf(b) == kindAdmit {
		reply, _ := s.admit(b, func(k cookie) bool { return s.cookies.valid(k, from, s.clock()) }, t)
		return reply
	}
	return s.control(nil, b, t)
}

func (w *world) reply(b []byte, node, relay netip.AddrPort) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lostDown != nil && w.lostDown(b, relay) {
		return
	}
	all := [][]byte{b}
	if w.mangle != nil {
		all = w.mangle(b)
	}
	time.AfterFunc(leg, func() {
		w.mu.Lock()
		passes := w.udp && node == w.node
		w.mu.Unlock()
		if !passes {
			return
		}
		for _, b := range all {
			w.client.Receive(b, relay)
		}
	})
}

// dial takes the three round trips of TCP, TLS and the upgrade.
func (w *world) dial(ctx context.Context) (net.Conn, [16]byte, error) {
	w.mu.Lock()
	w.dials++
	binding := [16]byte{byte(w.dials), 1}
	wait := 6 * leg
	if !w.tcp {
		wait = time.Hour
	}
	w.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, [16]byte{}, ctx.Err()
	case <-time.After(wait):
	}
	near, far := net.Pipe()
	w.mu.Lock()
	defer w.mu.Unlock()
	server := w.server
	go func() { _ = server.ServeConn(w.ctx, far, binding) }()
	w.conns = append(w.conns, near)
	w.stuck = &stuckConn{Conn: near}
	return w.stuck, binding, nil
}

// stuckConn can stop to carry what is written, as when the network loses it.
type stuckConn struct {
	net.Conn
	stuck atomic.Bool
}

func (c *stuckConn) Write(b []byte) (int, error) {
	if c.stuck.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// after lets time pass.
func (w *world) after(d time.Duration) {
	w.mu.Unlock()
	time.Sleep(d)
	synctest.Wait()
	w.mu.Lock()
}

func (w *world) wantStates(want ...string) {
	w.t.Helper()
	if !slices.Equal(w.states, want) {
		w.t.Errorf("states %q, want %q (now %+v)", w.states, want, w.last)
	}
}

// carries checks that the relay sends to the node the way the client says.
func (w *world) carries() {
	w.t.Helper()
	n := w.server.bySession(w.client.session.id)
	if n == nil || n.active.Load() == nil {
		w.t.Errorf("the relay does not know the node, which is at %+v", w.last)
		return
	}
	a := n.active.Load()
	if tls := a.conn != nil; tls != (w.last.Transport == TLS) || !tls && a.addr != w.node {
		w.t.Errorf("the relay sends to %v (tls %v), the client is at %+v", a.addr, tls, w.last)
	}
}

func (w *world) count(k kind) (n int) {
	for _, s := range w.sent {
		if s == k {
			n++
		}
	}
	return n
}

// synced runs a test of a world in a bubble.
func synced(t *testing.T, happen func(w *world)) {
	t.Helper()
	syncedWith(t, func(*world) {}, happen)
}

// syncedWith is synced for a world that is prepared before the client runs.
func syncedWith(t *testing.T, prepare, happen func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		prepare(w)
		w.run(func() { happen(w) })
	})
}

// sink is a transport of a node that takes everything.
type sink struct{ frames int }

func (s *sink) offer([]byte)           { s.frames++ }
func (s *sink) offerTrain([]byte, int) { s.frames++ }
func (s *sink) close()                 {}

// admitOther makes another node known to the relay.
func (w *world) admitOther(public punch.Key, device ed25519.PrivateKey) {
	w.t.Helper()
	shared, err := relaySession(w.server.private, public)
	if err != nil {
		w.t.Fatal(err)
	}
	a := admission{
		hello: hello{id: shared.id, seq: newSequence(1, 1)}, node: public, credentials: credentialsOf(public, device),
	}
	b, err := a.build(&shared, w.server.PublicKey(), device)
	if err != nil {
		w.t.Fatal(err)
	}
	t := streamTransport(&sink{}, netip.MustParseAddrPort("203.0.113.9:555"))
	w.mu.Unlock()
	defer w.mu.Lock()
	if _, n := w.server.admit(b, func(cookie) bool { return true }, t); n == nil {
		w.t.Fatal("the other node is not admitted")
	}
}
