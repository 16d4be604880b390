package server

import (
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord/trust"
)

func TestNetwork(t *testing.T) {
	for a, want := range map[string]string{
		"203.0.113.77":            "203.0.113.0/24",
		"::ffff:203.0.113.77":     "203.0.113.0/24",
		"2001:db8:1:2233:4::5":    "2001:db8:1:2200::/56",
		"fe80::1%lo":              "fe80::/56",
		"2001:db8:1:22ff:4::5%lo": "2001:db8:1:2200::/56",
	} {
		if got := network(netip.MustParseAddr(a)); got != netip.MustParsePrefix(want) {
			t.Errorf("%s: %v", a, got)
		}
	}
}

func TestBuckets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBuckets[netip.Prefix](2, 10, time.Now)
		n := netip.MustParsePrefix("203.0.113.0/24")
		spend := func() (k int) {
			for b.spend(n) {
				k++
			}
			return k
		}
		if k := spend(); k != 10 {
			t.Errorf("burst of %d", k)
		}
		time.Sleep(3 * time.Second)
		if left := b.left(n); left != 6 {
			t.Errorf("%v left after 3 s", left)
		}
		if k := spend(); k != 6 {
			t.Errorf("%d after 3 s", k)
		}
		time.Sleep(time.Hour)
		if k := spend(); k != 10 {
			t.Errorf("%d after an hour", k)
		}
	})
}

// addressed is a connection from somewhere.
type addressed struct {
	net.Conn
	from net.Addr
}

func (c addressed) RemoteAddr() net.Addr { return c.from }

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		enter := func(ip string) *gatedConn {
			near, far := net.Pipe()
			t.Cleanup(func() { _, _ = near.Close(), far.Close() })
			c := g.enter(addressed{near, &net.TCPAddr{IP: net.ParseIP(ip), Port: 1}})
			if c != nil {
				go func() { _, _ = far.Write([]byte("x")) }()
			}
			return c
		}
		read := func(c *gatedConn) bool {
			_, err := c.Read(make([]byte, 1))
			return err == nil
		}
		var conns []*gatedConn
		for i := range maxAnonymous + maxWaiting {
			c := enter("203.0.113." + string('0'+rune(i%10)))
			if c == nil {
				t.Fatalf("refused number %d", i)
			}
			conns = append(conns, c)
		}
		if enter("203.0.113.9") != nil {
			t.Error("no limit for one network")
		}
		if c := enter("198.51.100.1"); c == nil || !read(c) {
			t.Error("another network has no place")
		} else {
			_ = c.Close()
		}
		for _, c := range conns[:maxAnonymous] {
			if !read(c) {
				t.Error("no turn within the limit")
			}
		}
		if read(conns[maxAnonymous]) {
			t.Error("a turn beyond the limit")
		}
		conns[0].release() // a member's now
		if !read(conns[maxAnonymous+1]) {
			t.Error("the turn that became free was not given")
		}
		time.Sleep(anonymousAge + time.Second)
		if !conns[1].hasEnded() {
			t.Error("an anonymous connection keeps its turn for ever")
		}
		if conns[0].hasEnded() {
			t.Error("a member's connection was closed")
		}
		for _, c := range conns {
			_ = c.Close()
			_ = c.Close()
		}
		if g.total != 0 || len(g.lanes) != 0 {
			t.Errorf("%d connections and %d networks left", g.total, len(g.lanes))
		}
	})
}

// A member's connections are counted until they end, and once each.
func TestMemberConnections(t *testing.T) {
	g := newGate()
	open := func() *gatedConn {
		near, far := net.Pipe()
		t.Cleanup(func() { _ = far.Close() })
		return g.enter(addressed{near, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}})
	}
	member, other := trust.Key{1}, trust.Key{2}
	var held []*gatedConn
	for range maxOfMember {
		c := open()
		for range 2 { // the second request of a connection costs nothing
			if !c.admit(member) {
				t.Fatal("refused after", len(held))
			}
		}
		held = append(held, c)
	}
	if extra := open(); extra.admit(member) || !extra.admit(other) {
		t.Error("the limit is not by member")
	} else {
		_ = extra.Close()
	}
	_ = held[0].Close()
	_ = held[0].Close()
	again := open()
	if !again.admit(member) {
		t.Error("a connection that ended still counts")
	}
	for _, c := range append(held, again) {
		_ = c.Close()
	}
	if g.total != 0 || len(g.lanes) != 0 || len(g.members) != 0 {
		t.Errorf("left: %d, %v, %v", g.total, g.lanes, g.members)
	}
}

func (c *gatedConn) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}
