package relay

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
)

// host is a relay that takes TLS connections on loopback.
type host struct {
	server   *Server
	listener net.Listener
	ctx      context.Context
	serving  sync.WaitGroup
	results  chan error
}

const testExporter = "EXPORTER-test"

func newHost(tb testing.TB) *host {
	tb.Helper()
	server, err := NewServer(ServerConfig{PrivateKey: relayKey(99), Verify: verifyNode})
	if err != nil {
		tb.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h := &host{server: server, listener: listener, ctx: ctx, results: make(chan error, 100)}
	config := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{selfSigned(tb)}}
	h.serving.Go(func() { h.accept(config) })
	tb.Cleanup(func() {
		cancel()
		_ = listener.Close()
		h.serving.Wait()
	})
	return h
}

func selfSigned(tb testing.TB) tls.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (h *host) accept(config *tls.Config) {
	for {
		c, err := h.listener.Accept()
		if err != nil {
			return
		}
		h.serving.Go(func() {
			t := tls.Server(c, config)
			if err := t.HandshakeContext(h.ctx); err != nil {
				h.results <- err
				return
			}
			h.results <- h.server.ServeConn(h.ctx, t, export(t))
		})
	}
}

func export(t *tls.Conn) [16]byte {
	state := t.ConnectionState()
	b, err := state.ExportKeyingMaterial(testExporter, nil, 32)
	if err != nil {
		panic(err)
	}
	return [16]byte(b)
}

func (h *host) dial(ctx context.Context) (net.Conn, [16]byte, error) {
	d := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}}
	c, err := d.DialContext(ctx, "tcp", h.listener.Addr().String())
	if err != nil {
		return nil, [16]byte{}, err
	}
	return c, export(c.(*tls.Conn)), nil
}

// tlsMember is a node with a client that reaches its relay over TLS only.
type tlsMember struct {
	public punch.Key
	client *Client
	device [32]byte
}

// join runs a client until the test ends, and returns when its flows are open.
func (h *host) join(tb testing.TB, n byte, deliver func(run []byte), peers ...punch.Key) *tlsMember {
	tb.Helper()
	private, public, device := nodeKeys(tb, n)
	up, here := make(chan struct{}, 100), make(chan struct{}, 100)
	client, err := NewClient(ClientConfig{
		Relay: h.server.PublicKey(), PrivateKey: private, Device: device, Credentials: credentialsOf(public, device),
		Boot: 7, Dial: h.dial, Deliver: deliver,
		OnState: func(s State) {
			if s.Transport == TLS {
				up <- struct{}{}
			}
		},
		OnPeer: func(_ punch.Key, is bool) {
			if is {
				here <- struct{}{}
			}
		},
	})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(h.ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = client.Run(ctx) })
	tb.Cleanup(func() { cancel(); running.Wait() })
	await(tb, up)
	client.SetPeers(peers)
	for range peers {
		await(tb, here)
	}
	return &tlsMember{public, client, [32]byte(device[32:])}
}

func await(tb testing.TB, c <-chan struct{}) {
	tb.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		tb.Fatal("nothing happens")
	}
}

// framesOf are count flow frames of a size between two nodes.
func framesOf(a, b *tlsMember, count, size int) (run []byte) {
	header := FlowOf(a.public, b.public)
	for i := range count {
		f := numbered(i, size)
		copy(f[framePrefix:], header[:])
		run = append(run, f...)
	}
	return run
}

// reluctant is a node that is admitted and then reads nothing, or no more than
// asked for.
func (h *host) reluctant(t *testing.T, n byte) (*tlsMember, net.Conn) {
	t.Helper()
	private, public, device := nodeKeys(t, n)
	conn, binding, err := h.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c, err := NewClient(ClientConfig{Relay: h.server.PublicKey(), PrivateKey: private})
	if err != nil {
		t.Fatal(err)
	}
	a := admission{
		hello: hello{id: c.session.id, seq: newSequence(1, 1), cookie: binding}, node: public,
		credentials: credentialsOf(public, device),
	}
	b, err := a.build(&c.session, h.server.PublicKey(), device)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(appendFrame(nil, b)); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, framePrefix+pongSize)
	if _, err := io.ReadFull(conn, answer); err != nil || !c.session.sealed(answer[framePrefix:]) {
		t.Fatalf("answer % x (%v)", answer, err)
	}
	return &tlsMember{public, c, [32]byte(device[32:])}, conn
}

// TestSlowReader: one node reads nothing of what another sends it as fast as it
// can; a third gets all that the same sender sends it meanwhile.
func TestSlowReader(t *testing.T) {
	h := newHost(t)
	slow, slowConn := h.reluctant(t, 1)
	const batch, batches, size = 50, 40, 1440
	got := make(chan struct{}, batches)
	var count int
	quick := h.join(t, 2, func(run []byte) {
		for ; len(run) > 0; run = run[framePrefix+size:] {
			if count++; count%batch == 0 {
				got <- struct{}{}
			}
		}
	})
	sender := h.join(t, 3, func([]byte) {}, slow.public, quick.public)
	flood, paced := framesOf(sender, slow, 100, size), framesOf(sender, quick, batch, size)
	for range batches {
		sender.client.Offer(flood)
		sender.client.Offer(paced) // newer than the flood: it is not what is pushed out
		await(t, got)
	}
	n := h.server.bySession(slow.client.session.id)
	f := n.active.Load().conn.(*framed)
	f.mu.Lock()
	queued := f.queue.size
	f.mu.Unlock()
	dropped := h.server.Stats().Drops.Full
	if queued > maxQueued || queued < maxQueued-2*size || dropped == 0 {
		t.Errorf("%d bytes are queued for the slow node, %d frames were dropped", queued, dropped)
	}
	_ = slowConn.Close()
	if err := <-h.results; err == nil {
		t.Error("the slow connection ended without a reason")
	}
	if full := h.server.Stats().Drops.Full; full < dropped {
		t.Errorf("%d frames are counted as dropped of %d", full, dropped)
	}
}

func TestServeConnRefuses(t *testing.T) {
	private, public, device := nodeKeys(t, 1)
	c, err := NewClient(ClientConfig{Relay: punch.Key(mustServer(t).PublicKey()), PrivateKey: private})
	if err != nil {
		t.Fatal(err)
	}
	admit := func(k cookie, credentials []byte) []byte {
		a := admission{hello: hello{id: c.session.id, seq: newSequence(1, 1), cookie: k}, node: public, credentials: credentials}
		b, err := a.build(&c.session, mustServer(t).PublicKey(), device)
		if err != nil {
			t.Fatal(err)
		}
		return appendFrame(nil, b)
	}
	for name, test := range map[string]struct {
		send   []byte
		answer kind
	}{
		"nothing":              {nil, 0},
		"half an admission":    {admit(cookie{1}, credentialsOf(public, device))[:100], 0},
		"of other connection":  {admit(cookie{2}, credentialsOf(public, device)), 0},
		"flow frame first":     {numbered(1, 100), 0},
		"hello first":          {appendFrame(nil, (&hello{id: c.session.id, cookie: cookie{1}}).build(&c.session)), 0},
		"too long":             {appendFrame(nil, make([]byte, maxAdmissionTLS+1)), 0},
		"empty frame":          {[]byte{0, 0}, 0},
		"unknown credentials":  {admit(cookie{1}, []byte("nobody")), kindRefused},
		"admission, then junk": {append(admit(cookie{1}, credentialsOf(public, device)), 0, 0), kindPong},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := mustServer(t)
			near, far := net.Pipe()
			ended := make(chan error, 1)
			go func() { ended <- s.ServeConn(t.Context(), far, cookie{1}) }()
			_ = near.SetDeadline(time.Now().Add(time.Minute))
			if test.send != nil {
				go func() { _, _ = near.Write(test.send) }()
			}
			b, err := io.ReadAll(near)
			if err != nil {
				t.Errorf("%s: the connection did not end: %v", name, err)
			}
			d, _, _ := cutFrame(b)
			if kindOf(d) != test.answer && (d != nil || test.answer != kindPong) { // the junk may be faster than the PONG
				t.Errorf("%s: answered % x", name, b)
			}
			if err := <-ended; err == nil {
				t.Errorf("%s: no error", name)
			}
			if n := s.bySession(c.session.id); n != nil && n.active.Load() != nil {
				t.Errorf("%s: there is still a way to the node", name)
			}
			_ = near.Close()
		})
	}
}

func mustServer(t *testing.T) *Server {
	t.Helper()
	s, err := NewServer(ServerConfig{PrivateKey: relayKey(99), Verify: verifyNode})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestServeConnEnds: with its context, with its node, and when the node comes on
// another connection.
func TestServeConnEnds(t *testing.T) {
	h := newHost(t)
	m, first := h.reluctant(t, 1)
	client := h.join(t, 1, func([]byte) {})
	if client.public != m.public {
		t.Fatal("not the same node")
	}
	if _, err := first.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the older connection goes on: %v", err)
	}
	<-h.results
	h.server.Retain(func([32]byte) bool { return false })
	select {
	case <-h.results:
	case <-time.After(10 * time.Second):
		t.Error("the connection of a device that is not retained goes on")
	}
}

// BenchmarkTLSRelay is the way from node to node over a relay and two TLS
// connections, all in this process.
func BenchmarkTLSRelay(b *testing.B) {
	const size, batch = 1440, 40
	const window = 192 << 10 // bytes on their way: nothing is dropped
	h := newHost(b)
	var delivered atomic.Int64
	progress := make(chan struct{}, 1)
	to := h.join(b, 1, func(run []byte) {
		delivered.Add(int64(len(run)))
		select {
		case progress <- struct{}{}:
		default:
		}
	})
	from := h.join(b, 2, func([]byte) {}, to.public)
	run := framesOf(from, to, batch, size)
	b.SetBytes(batch * size)
	b.ReportAllocs()
	var sent int64
	for b.Loop() {
		for sent-delivered.Load() > window {
			await(b, progress)
		}
		from.client.Offer(run)
		sent += int64(len(run))
	}
	for sent > delivered.Load() {
		await(b, progress)
	}
	b.ReportMetric(float64(sent)*8/b.Elapsed().Seconds()/1e9, "Gbit/s")
}
