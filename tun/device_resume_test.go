package tun

import (
	"crypto/hmac"
	"encoding/binary"
	"hash"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/curve25519"
)

// connect gives two nodes their paths to each other over IPv4.
func connect(t *testing.T, a, b *node) {
	t.Helper()
	check(t, a.SetEndpoint(b.self.Key, at("10.9.0.2", b.Port()), netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, at("10.9.0.1", a.Port()), netip.AddrPort{}))
}

// Sockets are opened anew again and again under traffic: the port stays, and data
// goes on at once. What waited in a socket is gone.
func TestRebind(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	a, b := newNode(t, sa, 1), newNode(t, sb, 2)
	pairUp(t, a, b)
	connect(t, a, b)
	greet(t, a, b)
	echo(t, sb, "100.99.0.2:7000")
	client := listenIn(t, sa, "100.99.0.1:0")
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		noise := make([]byte, 1000)
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = client.WriteToUDPAddrPort(noise, at("100.99.0.2", 7001))
			}
		}
	})
	port := a.Port()
	for range 50 {
		sa.do(t, a.Rebind)
		sb.do(t, b.Rebind)
	}
	close(stop)
	flood.Wait()
	if a.Port() != port {
		t.Errorf("port %d, was %d", a.Port(), port)
	}
	t.Logf("answer after %v", answered(t, client, "100.99.0.2:7000", beforeRetry))
	check(t, a.Close())
	if err := a.Rebind(); err == nil {
		t.Error("a closed device was bound again")
	}
}

// A port that is taken while the sockets are closed is replaced.
func TestRebindToTakenPort(t *testing.T) {
	s := newSpace(t)
	a := newNode(t, s, 1)
	port := a.Port()
	check(t, a.wg.BindClose())
	listenIn(t, s, netip.AddrPortFrom(netip.IPv4Unspecified(), port).String())
	s.do(t, func() error { return a.rebind(port) })
	if now := a.Port(); now == port || now == 0 {
		t.Errorf("port %d, was %d", now, port)
	}
}

// After a sleep both kinds of sides get a new session at once, whatever the old
// one still seems good for.
func TestExpireSessions(t *testing.T) {
	bothKeyOrders(t, func(t *testing.T, k [2]Key) {
		sa, sb := newSpace(t), newSpace(t)
		joinSpaces(t, sa, sb)
		var b *node
		told := make(chan Key, 16)
		a := newNode(t, sa, 1, func(c *Config) {
			c.PrivateKey = k[0]
			c.SessionUnknown = func(of Key) { told <- of; b.RestartSession(c.PrivateKey.PublicKey()) }
		})
		b = newNode(t, sb, 2, func(c *Config) { c.PrivateKey = k[1] })
		pairUp(t, a, b)
		connect(t, a, b)
		greet(t, a, b)
		echo(t, sb, "100.99.0.2:7000")
		client := listenIn(t, sa, "100.99.0.1:0")
		answered(t, client, "100.99.0.2:7000", beforeRetry)
		time.Sleep(restartInterval) // a younger session is not restarted
		before := handshakeOf(t, a, b)
		a.ExpireSessions()
		begin := time.Now()
		a.StartHandshake(b.self.Key)
		eventually(t, beforeRetry, "another session", func() bool { return handshakeOf(t, a, b).After(before) })
		t.Logf("session after %v", time.Since(begin))
		answered(t, client, "100.99.0.2:7000", beforeRetry)
		initiates := a.peers.byKey(b.self.Key).initiate.Load()
		if asked := len(told) > 0; asked == initiates {
			t.Errorf("starts handshakes: %v, asked for one: %v", initiates, asked)
		}
		latest := handshakeOf(t, a, b)
		a.StartHandshake(b.self.Key)
		time.Sleep(yieldTime + 2*holdTime)
		if again := handshakeOf(t, a, b); !again.Equal(latest) {
			t.Error("the new session did not count")
		}
	})
}

func handshakeOf(t *testing.T, a, b *node) time.Time {
	t.Helper()
	stats, err := a.Stats()
	check(t, err)
	return stats[b.self.Key].LastHandshake
}

func TestHandshakesExpire(t *testing.T) {
	k := Key{1}
	synctest.Test(t, func(t *testing.T) {
		c := clock{initiate: true, completed: time.Now()}
		time.Sleep(startInterval)
		c.expect(t, "with a session", k, never)
		c.h.expire(map[Key]time.Time{k: c.completed})
		c.expect(t, "when it ended", k, 0)
		time.Sleep(startInterval)
		c.expect(t, "and once more", k, 0)
		c.completed = time.Now()
		time.Sleep(startInterval)
		c.expect(t, "with another", k, never)
		time.Sleep(restartInterval)
		if !c.h.restart(k, func() map[Key]time.Time { return map[Key]time.Time{k: c.completed} }) {
			t.Error("not restarted")
		}
		time.Sleep(startInterval)
		c.expect(t, "when the peer lost it", k, 0)
	})
}

// The clock of a node was set back: its peer has seen a later one and takes no
// initiation of it. Asked to, the peer begins.
func TestClockSetBack(t *testing.T) {
	bothKeyOrders(t, func(t *testing.T, k [2]Key) {
		sa, sb := newSpace(t), newSpace(t)
		joinSpaces(t, sa, sb)
		var b *node
		a := newNode(t, sa, 1, func(c *Config) {
			c.PrivateKey = k[0]
			c.SessionUnknown = func(Key) { b.RestartSession(c.PrivateKey.PublicKey()) }
		})
		b = newNode(t, sb, 2, func(c *Config) { c.PrivateKey = k[1] })
		pairUp(t, a, b)
		later := initiation(t, k[0], b.self.Key, time.Now().Add(24*time.Hour))
		_, err := listenIn(t, sa, "10.9.0.1:0").WriteToUDPAddrPort(later, at("10.9.0.2", b.Port()))
		check(t, err)
		eventually(t, 2*time.Second, "it is taken", func() bool { return b.peers.byKey(a.self.Key).answered.Load() != 0 })
		time.Sleep(restartInterval) // a peer that just answered does not begin
		connect(t, a, b)
		begin := time.Now()
		for handshakeOf(t, a, b).IsZero() && time.Since(begin) < beforeRetry {
			a.StartHandshake(b.self.Key) // as the node does: the other side sees no reason
			time.Sleep(100 * time.Millisecond)
		}
		t.Logf("session after %v", time.Since(begin))
		if handshakeOf(t, a, b).IsZero() {
			t.Error("no session")
		}
		echo(t, sb, "100.99.0.2:7000")
		answered(t, listenIn(t, sa, "100.99.0.1:0"), "100.99.0.2:7000", time.Second)
	})
}

// initiation makes a handshake initiation with a timestamp, as WireGuard's paper
// has it in section 5.4.2. wireguard-go makes them only of the present.
func initiation(t *testing.T, from, to Key, when time.Time) []byte {
	t.Helper()
	ephemeral, public := newKey(t), from.PublicKey()
	b := make([]byte, 8, initiationSize)
	b[0] = typeInitiation
	binary.LittleEndian.PutUint32(b[4:], 0x01020304)

	chain := hashOf([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))
	h := hashOf(chain, []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
	h = hashOf(h, to[:])
	seal := func(key, plain []byte) {
		aead, err := chacha20poly1305.New(key)
		check(t, err)
		sealed := aead.Seal(nil, make([]byte, chacha20poly1305.NonceSize), plain, h)
		b, h = append(b, sealed...), hashOf(h, sealed)
	}
	mine := ephemeral.PublicKey()
	b, h = append(b, mine[:]...), hashOf(h, mine[:])
	chain, _ = kdf(chain, mine[:])
	chain, key := kdf(chain, shared(t, ephemeral, to))
	seal(key, public[:])
	_, key = kdf(chain, shared(t, from, to))
	stamp := binary.BigEndian.AppendUint64(nil, 0x400000000000000a+uint64(when.Unix()))
	seal(key, binary.BigEndian.AppendUint32(stamp, 0))

	mac, err := blake2s.New128(hashOf([]byte("mac1----"), to[:]))
	check(t, err)
	mac.Write(b)
	return append(mac.Sum(b), make([]byte, 16)...)
}

func hashOf(parts ...[]byte) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	sum := blake2s.Sum256(all)
	return sum[:]
}

// kdf is Kdf2 of the paper: the chaining key and the key that follow.
func kdf(chain, input []byte) (next, key []byte) {
	first := macOf(macOf(chain, input), []byte{1})
	return first, macOf(macOf(chain, input), append(first, 2))
}

func macOf(key, input []byte) []byte {
	m := hmac.New(func() hash.Hash {
		h, _ := blake2s.New256(nil) // fails only with a key too long
		return h
	}, key)
	m.Write(input)
	return m.Sum(nil)
}

func shared(t *testing.T, private, public Key) []byte {
	t.Helper()
	s, err := curve25519.X25519(private[:], public[:])
	check(t, err)
	return s
}
