package tun

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"sync"
	"testing"
	"time"
)

// pairUp tells two nodes of each other; the lower key starts handshakes.
func pairUp(t *testing.T, a, b *node) {
	t.Helper()
	lower := string(a.self.Key[:]) < string(b.self.Key[:])
	pa, pb := a.self, b.self
	pb.Initiate, pa.Initiate = lower, !lower
	check(t, a.SetPeers([]Peer{pb}))
	check(t, b.SetPeers([]Peer{pa}))
}

// bothKeyOrders runs f with two keys, the lower of which comes first, and last.
func bothKeyOrders(t *testing.T, f func(t *testing.T, k [2]Key)) {
	a, b := newKey(t), newKey(t)
	for _, k := range [][2]Key{{a, b}, {b, a}} {
		t.Run("", func(t *testing.T) { f(t, k) })
	}
}

// beforeRetry is how long an answer may take on a busy machine. wireguard-go itself
// repeats a lost handshake after 5 s, so earlier ones prove that none was lost.
const beforeRetry = 4 * time.Second

// echo answers what arrives at the overlay address until the test ends.
func echo(t *testing.T, s *space, at string) {
	t.Helper()
	c := listenIn(t, s, at)
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
}

// answered asks the echo at to once every 5 ms until it answers.
func answered(t *testing.T, c *net.UDPConn, to string, limit time.Duration) time.Duration {
	t.Helper()
	b := make([]byte, 1500)
	begin := time.Now()
	for time.Since(begin) < limit {
		_, _ = c.WriteToUDPAddrPort([]byte("hello"), netip.MustParseAddrPort(to))
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		if n, _, err := c.ReadFromUDPAddrPort(b); err == nil && string(b[:n]) == "hello" {
			return time.Since(begin)
		}
	}
	t.Fatalf("no answer from %s within %v", to, limit)
	return 0
}

// greet asks for a handshake until there is one, as the node does: on a busy
// machine the first may be lost.
func greet(t *testing.T, a, b *node) {
	t.Helper()
	for range 50 {
		a.StartHandshake(b.self.Key)
		b.StartHandshake(a.self.Key)
		time.Sleep(100 * time.Millisecond)
		stats, err := a.Stats()
		check(t, err)
		if !stats[b.self.Key].LastHandshake.IsZero() {
			return
		}
	}
	t.Fatal("no handshake within 5 s")
}

func at(host string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(host), port)
}

// Both sides have a path and start at the same instant: crossed initiations would
// cost 5 s.
func TestBothStartAtOnce(t *testing.T) {
	for range 3 { // whose key is lower is a matter of luck
		t.Run("", bothStartAtOnce)
	}
}

func bothStartAtOnce(t *testing.T) {
	a, b, client := strangers(t)
	// Else the answer to an initiation that comes before the path would be lost.
	bothAtOnce(a, b, func(from, to *node) { from.head(t, to) })
	bothAtOnce(a, b, func(from, to *node) { from.StartHandshake(to.self.Key) })
	t.Logf("first answer after %v", answered(t, client, "100.99.0.2:7000", beforeRetry))
	eventually(t, time.Second, "activity is counted", func() bool {
		sent, received := a.Activity(b.self.Key)
		return sent > 0 && received > 0
	})

	// A session in use is not touched. On a busy machine a handshake that the other
	// side began before may still come to its end.
	var last, since time.Time
	eventually(t, beforeRetry, "there is a session for good", func() bool {
		if now := handshakeOf(t, a, b); !now.Equal(last) {
			last, since = now, time.Now()
		}
		return !last.IsZero() && time.Since(since) >= 500*time.Millisecond
	})
	a.StartHandshake(b.self.Key)
	b.StartHandshake(a.self.Key)
	time.Sleep(yieldTime + 2*holdTime)
	answered(t, client, "100.99.0.2:7000", beforeRetry)
	if again := handshakeOf(t, a, b); !again.Equal(last) {
		t.Errorf("another session after %v", again.Sub(last))
	}
}

// Each side gets its path whenever it does, and starts: the first answer may come
// before the path, and is lost. Asking again, as the node does, mends that.
func TestBothGetPathsAtOnce(t *testing.T) {
	for range 3 {
		t.Run("", func(t *testing.T) {
			a, b, client := strangers(t)
			bothAtOnce(a, b, func(from, to *node) {
				from.head(t, to)
				for range 8 {
					from.StartHandshake(to.self.Key)
					time.Sleep(100 * time.Millisecond)
				}
			})
			t.Logf("first answer after %v", answered(t, client, "100.99.0.2:7000", beforeRetry))
		})
	}
}

// strangers are two nodes without paths, of which one has a packet for the other:
// wireguard-go began a handshake that was lost.
func strangers(t *testing.T) (a, b *node, client *net.UDPConn) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	waits := make(chan Key, 8)
	a, b = newNode(t, sa, 1, func(c *Config) {
		c.Demand = func(k Key) {
			select {
			case waits <- k:
			default:
			}
		}
	}), newNode(t, sb, 2)
	pairUp(t, a, b)
	echo(t, sb, "100.99.0.2:7000")
	client = listenIn(t, sa, "100.99.0.1:0")
	_, _ = client.WriteToUDPAddrPort([]byte("early"), at("100.99.0.2", 7000))
	select {
	case <-waits:
	case <-time.After(beforeRetry):
		t.Fatal("the packet does not wait")
	}
	return a, b, client
}

// head gives a node its path to the other one.
func (n *node) head(t *testing.T, to *node) {
	addr := "10.9.0.1"
	if to.self.Handle.As16()[15] == 2 {
		addr = "10.9.0.2"
	}
	if err := n.SetEndpoint(to.self.Key, at(addr, to.Port()), netip.AddrPort{}); err != nil {
		t.Error(err)
	}
}

// bothAtOnce runs the same on two nodes at the same time.
func bothAtOnce(a, b *node, f func(from, to *node)) {
	var wg sync.WaitGroup
	wg.Go(func() { f(a, b) })
	wg.Go(func() { f(b, a) })
	wg.Wait()
}

// A node that was killed comes back. The other one still has a session, so it
// does not begin; whichever key is the lower, the one that came back has to.
func TestOneSideLostItsSession(t *testing.T) {
	bothKeyOrders(t, func(t *testing.T, k [2]Key) {
		sa, sb := newSpace(t), newSpace(t)
		joinSpaces(t, sa, sb)
		a := newNode(t, sa, 1, func(c *Config) { c.PrivateKey = k[0] })
		echo(t, sa, "100.99.0.1:7000")
		for i := range 2 {
			b := newNode(t, sb, 2, func(c *Config) { c.PrivateKey = k[1]; c.Port = 41002 })
			pairUp(t, a, b)
			check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), netip.AddrPort{}))
			check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", a.Port()), netip.AddrPort{}))
			a.StartHandshake(b.self.Key)
			b.StartHandshake(a.self.Key)
			client := listenIn(t, sb, "100.99.0.2:0")
			t.Logf("start %d: answer after %v", i, answered(t, client, "100.99.0.1:7000", beforeRetry))
			check(t, b.Close())
			// No program comes back faster than this, and a takes a second
			// initiation within 50 ms for a flood.
			time.Sleep(startInterval)
		}
	})
}

func TestPing(t *testing.T) {
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip("SKIP: no ping program")
	}
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	pairUp(t, a, b)
	check(t, a.SetEndpoint(b.self.Key, at("fd09::2", b.Port()), netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, at("fd09::1", a.Port()), netip.AddrPort{}))
	greet(t, a, b)
	for _, to := range []string{"100.99.0.2", "fd99::2"} {
		sa.do(t, func() error {
			out, err := exec.Command("ping", "-c", "3", "-i", "0.2", "-w", "5", to).CombinedOutput()
			if err != nil {
				t.Errorf("ping %s: %v\n%s", to, err, out)
			}
			return nil
		})
	}
}

// b's packets reach a through a forwarder at 10.9.0.3. They are authentic, and
// stock wireguard-go would from then on answer there.
func TestForeignSourceDoesNotMoveEndpoint(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	pairUp(t, a, b)
	direct := at("10.9.0.2", b.Port())
	check(t, a.SetEndpoint(b.self.Key, direct, netip.AddrPort{}))
	forwarder := listenIn(t, sb, "10.9.0.3:0")
	forwarded := make(chan struct{}, 1)
	go func() {
		buf := make([]byte, 2000)
		for {
			n, from, err := forwarder.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			to := at("10.9.0.1", a.Port())
			if from == to { // a moved: that must show below, not as a loop
				to = direct
			}
			_, _ = forwarder.WriteToUDPAddrPort(buf[:n], to)
			select {
			case forwarded <- struct{}{}:
			default:
			}
		}
	}()
	check(t, b.SetEndpoint(a.self.Key, forwarder.LocalAddr().(*net.UDPAddr).AddrPort(), netip.AddrPort{}))
	echo(t, sa, "100.99.0.1:7000")
	client := listenIn(t, sb, "100.99.0.2:0")
	b.StartHandshake(a.self.Key)
	answered(t, client, "100.99.0.1:7000", 2*time.Second)
	for range 20 {
		answered(t, client, "100.99.0.1:7000", time.Second)
	}
	<-forwarded // b really went through it
	if got := a.endpoint(t, b.self.Key); got != direct {
		t.Errorf("endpoint moved to %v, want %v", got, direct)
	}
	requireWG(t, a.Name(), b.self, direct)
}

// Close has to end whatever goes on: traffic both ways, calls that configure.
func TestCloseInFullSwing(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	pairUp(t, a, b)
	check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", a.Port()), netip.AddrPort{}))
	a.StartHandshake(b.self.Key)
	b.StartHandshake(a.self.Key)
	echo(t, sb, "100.99.0.2:7000")
	client := listenIn(t, sa, "100.99.0.1:0")
	answered(t, client, "100.99.0.2:7000", 2*time.Second)

	var wg sync.WaitGroup
	ended := make(chan struct{})
	for _, busy := range []func() error{
		func() error {
			_, err := client.WriteToUDPAddrPort(make([]byte, 1000), at("100.99.0.2", 7000))
			return err
		},
		func() error { return a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), netip.AddrPort{}) },
		func() error { return a.SetPeers([]Peer{b.self}) },
		func() error { _, err := a.Stats(); return err },
		func() error { a.StartHandshake(b.self.Key); return nil },
		func() error { return a.Send([]byte("x"), at("10.9.0.2", 9), netip.AddrPort{}, 0) },
	} {
		wg.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
					_ = busy() // fails from Close on
				}
			}
		})
	}
	time.Sleep(200 * time.Millisecond)
	closed := make(chan error, 1)
	go func() { closed <- a.Close() }()
	select {
	case err := <-closed:
		check(t, err)
	case <-time.After(10 * time.Second):
		t.Error("Close does not return")
	}
	if err := <-a.ran; err != nil {
		t.Errorf("Run: %v, want nil after Close", err)
	}
	close(ended)
	wg.Wait()
}

// Two nodes that take large messages carry TCP over both families: whole, in far
// fewer messages than packets, with nothing dropped on the way in.
func TestLargeMessages(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	a.self.Capabilities, b.self.Capabilities = a.Capabilities(), b.Capabilities()
	if a.self.Capabilities&b.self.Capabilities&Large == 0 {
		t.Fatal("no virtio header on the TUN of this kernel")
	}
	pairUp(t, a, b)
	check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", a.Port()), netip.AddrPort{}))
	greet(t, a, b)
	a.peers.byKey(b.self.Key).level.now.Store(levelWhole) // where a clean path leads
	const size = 8 << 20
	for _, host := range []string{"100.99.0.2", "fd99::2"} {
		before, _ := a.Activity(b.self.Key)
		transfer(t, sa, sb, host, pattern(size, 7))
		after, received := a.Activity(b.self.Key)
		if packets := uint64(size / 1348); after-before > packets/2 {
			t.Errorf("%s: %d messages for %d packets", host, after-before, packets)
		}
		if received == 0 {
			t.Errorf("%s: nothing received", host)
		}
	}
	for _, d := range []*node{a, b} {
		drops := d.Drops()
		drops.Incomplete = 0 // a full socket may lose fragments
		if drops != (Drops{}) || d.tunnel.dropped.contained.Load() > 0 {
			t.Errorf("dropped: %+v", drops)
		}
	}
	// As long as messages come b tells a how many.
	client := listenIn(t, sa, "100.99.0.1:0")
	eventually(t, 10*time.Second, "reports arrive", func() bool {
		_, _ = client.WriteToUDPAddrPort(make([]byte, 1000), at("100.99.0.2", 9))
		l := &a.peers.byKey(b.self.Key).level
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.last.received > 0
	})
	a.peers.byKey(b.self.Key).level.reset()
	if k := a.Segments(b.self.Key); k != levelPlain {
		t.Errorf("%d segments in a message on a new path, want %d", k, levelPlain)
	}
	plain := b.self
	plain.Capabilities = 0
	check(t, a.SetPeers([]Peer{plain}))
	if k, none := a.Segments(b.self.Key), a.Segments(a.self.Key); k != levelPlain || none != 0 {
		t.Errorf("%d segments in a message to a plain peer, %d to an unknown one", k, none)
	}
	b.tunnel.dropped.forged.Add(3)
	if got := b.Drops(); got.Forged != 3 || got.Broken != 0 {
		t.Errorf("dropped: %+v, want 3 forged", got)
	}
}

// transfer sends data over TCP from one namespace to a host in another.
func transfer(t *testing.T, from, to *space, host string, data []byte) {
	t.Helper()
	var l net.Listener
	to.do(t, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(host, "0"))
		return err
	})
	defer l.Close()
	sent := make(chan error, 1)
	go func() {
		from.do(t, func() error {
			c, err := net.DialTimeout("tcp", l.Addr().String(), beforeRetry)
			if err == nil {
				_, err = c.Write(data)
				err = errors.Join(err, c.Close())
			}
			sent <- err
			return nil
		})
	}()
	check(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(beforeRetry)))
	c, err := l.Accept()
	check(t, err)
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(30*time.Second)))
	got, err := io.ReadAll(c)
	check(t, err)
	check(t, <-sent)
	if !bytes.Equal(got, data) {
		t.Errorf("%s: %d bytes arrived, of %d, or others", host, len(got), len(data))
	}
}
