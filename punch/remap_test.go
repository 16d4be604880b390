package punch

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pion/stun/v2"
)

const outerAgain = "203.0.113.77:7777"

// reflexiveOf is what a node published last as its reflexive candidate.
func (n *node) reflexiveOf() netip.AddrPort {
	for _, list := range slices.Backward(n.toldLists()) {
		for _, c := range list {
			if c.Type == ServerReflexive {
				return c.Addr
			}
		}
	}
	return netip.AddrPort{}
}

// remapped returns when a mapping last changed, as far as n acted on it.
func (n *node) remapped() time.Time {
	n.Agent.mu.Lock()
	defer n.Agent.mu.Unlock()
	return n.remaps
}

// A NAT gives us another address while data flows both ways: no silence tells us
// of it, but the peer's answers do, long before the servers are asked again.
func TestRemapUnderTraffic(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		a.talk(b, 2*time.Second, true)
		a.move(outerAgain)
		a.talk(b, consentInterval+10*oneWay, true)
		if got := a.reflexiveOf().String(); got != outerAgain {
			t.Errorf("%v after the change: published %s", consentInterval+10*oneWay, got)
		}
		if !a.remapped().After(time.Time{}) {
			t.Error("not noticed")
		}
		rest(100 * time.Millisecond)
		b.wantPath(a, a.outer)
	})
}

// Answers that come back to an address of ours that we gave up ourselves, or after
// a mapping may have expired, are no news.
func TestRemapIsNoNews(t *testing.T) {
	for name, change := range map[string]func(a, b *node){
		"own address": func(a, b *node) {
			a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.1.7/24")}, 1000)
			a.move(outerAgain)
			a.NetworkChanged()
			a.talk(b, 4*time.Second, true)
		},
		"idle": func(a, b *node) {
			rest(activeFor + 2*keepalive)
			a.move(outerAgain)
			rest(2 * keepalive)
		},
		"nothing": func(a, b *node) { a.talk(b, time.Minute, true) },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				a, b := connected(w)
				change(a, b)
				if !a.remapped().IsZero() {
					t.Error("taken for one")
				}
			})
		})
	}
}

// A relay tells that the address is another one: servers are asked at once, and
// so are peers with traffic; again only after a while.
func TestRemappedByRelay(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		c := w.gathered(3, "203.0.113.9:9000")
		meet(a, c)
		a.talk(b, 2*time.Second, true)
		rest(2 * time.Second) // after the question that follows the end of data
		a.Agent.mu.Lock()
		a.peers[c.key].activeUntil = time.Time{} // the counters of this world are those of all peers
		a.Agent.mu.Unlock()
		asked := func(to netip.AddrPort, since time.Time) int { return len(w.between(a.outer, to, since)) }
		begin := time.Now()
		for range 10 {
			a.Remapped()
			rest(10 * time.Millisecond)
		}
		if s, p, q := asked(stunAddr(), begin), asked(b.outer, begin), asked(c.outer, begin); s != 1 || p < 1 || p > 2 || q != 0 {
			t.Errorf("asked the server %d times, the peer %d times, the idle one %d times", s, p, q)
		}
		begin = time.Now()
		rest(remapInterval)
		a.Remapped()
		rest(10 * time.Millisecond)
		if s := asked(stunAddr(), begin); s != 1 {
			t.Errorf("later asked the server %d times", s)
		}
	})
}

// A peer that lies about our address in every answer has servers asked once in 5 s
// at most.
func TestRemapFlood(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		begin := time.Now()
		for i := range 60 {
			a.move(netip.AddrPortFrom(netip.MustParseAddr("203.0.113.77"), uint16(7000+i)).String())
			a.talk(b, time.Second, false) // silence: a check every 100 ms
		}
		asked := 0
		for _, x := range w.all() {
			if x.to == stunAddr() && !x.at.Before(begin) && x.from.Addr() == netip.MustParseAddr("203.0.113.77") {
				asked++
			}
		}
		if asked > 60/5+6 {
			t.Errorf("%d requests to the server in a minute", asked)
		}
	})
}

// lie has b answer a as if it had seen it at another address.
func (a *node) lie(b *node) {
	a.Agent.mu.Lock()
	defer a.Agent.mu.Unlock()
	p := a.peers[b.key]
	m, err := stun.Build(&stun.XORMappedAddress{IP: net.IPv4(203, 0, 113, 99), Port: 9})
	if err != nil {
		a.w.t.Fatal(err)
	}
	a.seen(transaction{peer: p, pair: p.direct()}, m, time.Now())
}

// A peer whose answers name two addresses of ours in turn, while servers see but
// one, is believed ever more seldom; a change that a server sees, too, makes it
// credible again.
func TestRemapAlternating(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		believed := func(d time.Duration) int {
			n, last := 0, a.remapped()
			for end := time.Now().Add(d); time.Now().Before(end); {
				a.lie(b)
				a.talk(b, time.Second, false) // silence: a check every 100 ms
				if at := a.remapped(); at != last {
					n, last = n+1, at
				}
			}
			return n
		}
		if n := believed(10 * time.Minute); n < 2 || n > 8 {
			t.Errorf("believed %d times in ten minutes", n)
		}
		if n := believed(time.Hour); n > 7 {
			t.Errorf("then %d times in an hour", n)
		}
		a.move(outerAgain)
		a.talk(b, activeRefresh+activeSpread+time.Second, false)
		if n := believed(time.Minute); n < 3 {
			t.Errorf("believed %d times in the minute after a change that a server saw", n)
		}
	})
}
