package tun

import (
	"bytes"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
)

// gate passes what two nodes send each other, and counts what it sees. As long as
// it is shut, content of the second one waits.
type gate struct {
	conn        *net.UDPConn
	one, two    netip.AddrPort
	shut        atomic.Bool
	initiations atomic.Int64 // of the first node
}

func (g *gate) run() {
	buf := make([]byte, 2000)
	for {
		n, from, err := g.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		switch {
		case from == g.one:
			if buf[0] == typeInitiation {
				g.initiations.Add(1)
			}
			_, _ = g.conn.WriteToUDPAddrPort(buf[:n], g.two)
		case buf[0] != typeData || !g.shut.Load():
			_, _ = g.conn.WriteToUDPAddrPort(buf[:n], g.one)
		}
	}
}

// The side that does not initiate was asked to start, and has answered the other
// side meanwhile. It must not begin anew before that confirms: its answer would be
// void.
func TestStartAfterAnAnswer(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	joinSpaces(t, sa, sb)
	low, high := newKey(t), newKey(t)
	if k, l := high.PublicKey(), low.PublicKey(); bytes.Compare(k[:], l[:]) < 0 {
		low, high = high, low
	}
	a := newNode(t, sa, 1, func(c *Config) { c.PrivateKey = high })
	b := newNode(t, sb, 2, func(c *Config) { c.PrivateKey = low })
	pairUp(t, a, b)
	g := &gate{conn: listenIn(t, sb, "10.9.0.3:0"), one: at("10.9.0.1", a.Port()), two: at("10.9.0.2", b.Port())}
	g.shut.Store(true)
	go g.run()
	through := g.conn.LocalAddr().(*net.UDPAddr).AddrPort()
	check(t, a.SetEndpoint(b.self.Key, through, netip.AddrPort{}))
	check(t, b.SetEndpoint(a.self.Key, through, netip.AddrPort{}))
	b.StartHandshake(a.self.Key)
	eventually(t, beforeRetry, "a answers", func() bool { return a.bind.peers.byKey(b.self.Key).answered.Load() != 0 })
	a.starts.resume(b.self.Key) // it has waited long enough for the other side
	a.StartHandshake(b.self.Key)
	g.shut.Store(false)
	client := listenIn(t, sb, "100.99.0.2:0")
	echo(t, sa, "100.99.0.1:7000")
	answered(t, client, "100.99.0.1:7000", beforeRetry)
	if n := g.initiations.Load(); n != 0 {
		t.Errorf("%d initiations beside the other side's handshake", n)
	}
}
