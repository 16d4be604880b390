package tun

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// relayUp puts a forwarder between two nodes, which use it for each other.
func relayUp(t *testing.T, at netip.AddrPort, sb *space, a, b *node) *forwarder {
	t.Helper()
	end := func(d *node, host string) *relayEnd {
		return &relayEnd{
			at:      netip.AddrPortFrom(netip.MustParseAddr(host), d.Port()),
			link:    func(l Link) { d.SetLink(1, l) },
			deliver: func(run []byte) { d.Deliver(1, run) },
		}
	}
	f := newForwarder(t, listenIn(t, sb, at.String()), end(a, "10.9.0.1"), end(b, "10.9.0.2"))
	for _, side := range [][2]*node{{a, b}, {b, a}} {
		side[0].wayTo(t, side[1])
	}
	return f
}

// wayTo makes the way over link 1 the endpoint of a peer.
func (d *node) wayTo(t *testing.T, peer *node) netip.AddrPort {
	t.Helper()
	h := d.SetWays(peer.self.Key, []Way{{1, wayHeader(1)}})[0]
	if want := netip.AddrPortFrom(peer.self.Handle, relayedPort|1); h != want {
		t.Fatalf("handle %v, want %v", h, want)
	}
	check(t, d.SetEndpoint(peer.self.Key, h, netip.AddrPort{}))
	return h
}

// Two nodes talk through a relay: handshake, small packets and large messages,
// over UDP and over a connection; then directly with copies, and back.
func TestThroughRelay(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	for _, d := range []*node{a, b} {
		d.self.Capabilities, d.self.Keepalive = d.Capabilities(), 25*time.Second
	}
	pairUp(t, a, b)
	f := relayUp(t, at("10.9.0.3", 0), sb, a, b)
	greet(t, a, b)
	echo(t, sb, "100.99.0.2:7000")
	client := listenIn(t, sa, "100.99.0.1:0")
	answered(t, client, "100.99.0.2:7000", beforeRetry)
	k := b.self.Key
	handle := at("fd99::2", relayedPort|1)
	requireRelayed := func() {
		t.Helper()
		if got, every := a.endpoint(t, k), a.keepalive(t, k); got != handle || every != 0 {
			t.Fatalf("endpoint %v with a keepalive of %v", got, every)
		}
	}
	requireRelayed()
	changed := b.self
	changed.AllowedIPs = changed.AllowedIPs[:1]
	changed.Initiate = a.peers.byKey(k).initiate.Load()
	check(t, a.SetPeers([]Peer{changed})) // writes the keepalive, too
	requireRelayed()
	for i := range 4 {
		f.set(0, i&1 != 0)
		f.set(1, i&2 != 0)
		a.peers.byKey(k).level.now.Store(levelWhole)
		transfer(t, sa, sb, "100.99.0.2", pattern(1<<20, byte(i)))
	}

	onceEach := func(what string) {
		t.Helper()
		_, before := b.Activity(a.self.Key)
		countOnce(t, sa, sb)
		if _, after := b.Activity(a.self.Key); after-before < datagramsOnce {
			t.Errorf("%s: %d received", what, after-before)
		}
	}
	direct := at("10.9.0.2", b.Port())
	onceEach("relayed")
	check(t, a.SetEndpoint(k, direct, netip.AddrPort{}))
	a.SetCopy(k, handle, netip.AddrPort{})
	if every := a.keepalive(t, k); every != b.self.Keepalive {
		t.Errorf("a keepalive of %v on the direct path", every)
	}
	onceEach("directly, with copies by the relay")
	check(t, a.SetEndpoint(k, handle, netip.AddrPort{}))
	a.SetCopy(k, direct, netip.AddrPort{})
	onceEach("relayed, with direct copies")
	a.SetLink(1, Link{})
	onceEach("with copies only")
	if err := a.SetEndpoint(k, at("fd99::2", relayedPort|2), netip.AddrPort{}); err == nil {
		t.Error("an endpoint that is no way")
	}
}

// datagramsOnce is how many datagrams countOnce sends.
const datagramsOnce = 100

// countOnce sends datagrams from one overlay address to the other: every one
// arrives once.
func countOnce(t *testing.T, sa, sb *space) {
	t.Helper()
	from, to := listenIn(t, sa, "100.99.0.1:0"), listenIn(t, sb, "100.99.0.2:7001")
	defer from.Close()
	defer to.Close()
	seen := make(map[uint32]int)
	b := make([]byte, 4)
	for i := range uint32(datagramsOnce) {
		_, err := from.WriteToUDPAddrPort(binary.BigEndian.AppendUint32(nil, i), at("100.99.0.2", 7001))
		check(t, err)
		check(t, to.SetReadDeadline(time.Now().Add(beforeRetry)))
		if _, _, err := to.ReadFromUDPAddrPort(b); err != nil {
			t.Fatalf("datagram %d: %v", i, err)
		}
		seen[binary.BigEndian.Uint32(b)]++
	}
	check(t, to.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
	if _, _, err := to.ReadFromUDPAddrPort(b); err == nil || len(seen) != datagramsOnce {
		t.Errorf("%d different ones arrived, then %v", len(seen), err)
	}
}

// A node that was killed comes back and says nothing by itself; the other one
// sends in the session it still has, is told, and makes another. wireguard-go
// alone would take 15 s.
func TestRestartedPeer(t *testing.T) {
	bothKeyOrders(t, func(t *testing.T, k [2]Key) {
		sa, sb := newSpace(t), newSpace(t)
		joinSpaces(t, sa, sb)
		a := newNode(t, sa, 1, func(c *Config) { c.PrivateKey = k[0] })
		var mu sync.Mutex
		told := 0
		second := func() *node {
			return newNode(t, sb, 2, func(c *Config) {
				c.PrivateKey, c.Port = k[1], 41002
				c.SessionUnknown = func(lost Key) {
					mu.Lock()
					told++
					mu.Unlock()
					a.RestartSession(c.PrivateKey.PublicKey())
				}
			})
		}
		b := second()
		pairUp(t, a, b)
		relayUp(t, at("10.9.0.3", 0), sb, a, b)
		greet(t, a, b)
		client := listenIn(t, sa, "100.99.0.1:0")
		time.Sleep(restartInterval) // no session is younger after a restart
		check(t, b.Close())
		b = second()
		echo(t, sb, "100.99.0.2:7000")
		lower := string(a.self.Key[:]) < string(b.self.Key[:])
		pa := a.self
		pa.Initiate = !lower
		check(t, b.SetPeers([]Peer{pa}))
		b.SetLink(1, Link{Addr: a.bind.peers.relays[1].now.Load().to.to})
		b.wayTo(t, a)
		t.Logf("answer after %v", answered(t, client, "100.99.0.2:7000", beforeRetry))
		mu.Lock()
		defer mu.Unlock()
		if told == 0 {
			t.Error("nobody was told")
		}
	})
}
