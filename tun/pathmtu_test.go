package tun

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// datagramsTo sends one message to a peer whose path is a plain socket, and
// returns what arrives there.
func datagramsTo(t *testing.T, o *opened, limit int, message []byte) (list [][]byte) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(t, err)
	defer c.Close()
	e := o.path(t, keyB, c.LocalAddr().(*net.UDPAddr).AddrPort()).(*endpoint)
	e.limit.Store(int32(limit))
	check(t, o.Send([][]byte{bytes.Clone(message)}, e))
	check(t, c.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	b := make([]byte, maxPacket)
	for {
		n, err := c.Read(b)
		if err != nil {
			return list
		}
		list = append(list, bytes.Clone(b[:n]))
	}
}

// A message of one packet, too, is cut to what its path carries, down and up.
func TestPathMTUCuts(t *testing.T) {
	o := openLarge(t, Config{}, keyB)
	for _, c := range []struct{ size, limit, count int }{
		{1432, 0, 1},
		{1432, 1432, 1},
		{1432, 1392, 2},
		{1432, 1252, 2},
		{1432, 640, 3},
		{1252, 1252, 1},
		{1253, 1252, 2},
		{9000, 1252, 8},
		{9000, 1472, 7},
		{9000, 8972, 2},
		{62000, 8972, 7},
	} {
		m := dataMessage(3, 1, c.size)
		list := datagramsTo(t, o, c.limit, m)
		if len(list) != c.count {
			t.Errorf("%d bytes on a path of %d: %d datagrams, want %d", c.size, c.limit, len(list), c.count)
		}
		var whole []byte
		for _, b := range list {
			if c.limit > 0 && len(b) > c.limit {
				t.Errorf("%d bytes on a path of %d: a datagram of %d", c.size, c.limit, len(b))
			}
			if f, ok := parseFragment(b); ok {
				b = b[fragmentHeader:]
				if f.index == f.count-1 {
					b = b[:len(b)-f.padding]
				}
			} else if c.count > 1 {
				t.Errorf("no fragment: %x", b[:8])
			}
			whole = append(whole, b...)
		}
		if !bytes.Equal(whole, m) {
			t.Errorf("%d bytes on a path of %d: another message", c.size, c.limit)
		}
	}
	o.peers.set([]Peer{peerOf(keyB, true)})
	if list := datagramsTo(t, o, 1252, dataMessage(3, 2, 1432)); len(list) != 1 || len(list[0]) != 1432 {
		t.Errorf("a plain peer gets %d datagrams", len(list))
	}
}

// What is cut to a smaller path arrives as it was.
func TestPathMTUArrives(t *testing.T) {
	a, b, toB := largePair(t, Config{}, false)
	for i, limit := range []int32{1252, 996, 1472, 8972, 1252} {
		toB.limit.Store(limit)
		var out [][]byte
		for n, size := range []int{1432, 96, 1432, 62000, 1253, 5502} {
			out = append(out, dataMessage(3, uint64(100*i+n), size))
		}
		check(t, a.Send(out, toB))
		b.arrives(t, out)
	}
	if n := b.drops.fragments.Load() + b.drops.incomplete.Load(); n != 0 {
		t.Errorf("%d fragments dropped", n)
	}
}

func TestInnerMTU(t *testing.T) {
	for datagram, want := range map[int]int{1252: 1216, 1432: 1392, 1472: 1440, 996: 960} {
		got := innerMTU(datagram)
		if got != want || (got+paddedTo-1)/paddedTo*paddedTo+keepaliveSize > datagram {
			t.Errorf("a datagram of %d carries %d, want %d", datagram, got, want)
		}
	}
}

// Only what has the form of a long check is sent whole at any price.
func TestIsProbe(t *testing.T) {
	long := make([]byte, 1432)
	copy(long, []byte{0, 1, 0x05, 0x84, 0x21, 0x12, 0xa4, 0x42})
	for name, c := range map[string]struct {
		b    []byte
		want bool
	}{
		"long check": {long, true}, "check": {long[:76], false}, "data": {dataMessage(1, 2, 1432), false},
		"fragment": {fragmentsOf(t, dataMessage(1, 2, 3000), 1432)[0], false}, "nothing": {nil, false},
	} {
		if got := isProbe(c.b); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// The peer's count of missing messages is cumulative, and begins anew when it does.
func TestMisses(t *testing.T) {
	p := &peer{}
	for _, c := range []struct {
		total uint32
		want  uint64
	}{{7, 0}, {9, 2}, {9, 2}, {19, 12}, {3, 12}, {5, 14}} {
		if p.misses(c.total); p.lost.Load() != c.want {
			t.Errorf("after %d: %d, want %d", c.total, p.lost.Load(), c.want)
		}
	}
}

// A probe larger than what the interface takes is not cut, unlike all else.
func TestProbeIsNotCut(t *testing.T) {
	s := newSpace(t)
	s.setMTU(t, "lo", 1500)
	var a, b *opened
	received := make(chan int, 10)
	s.do(t, func() error {
		a = openLarge(t, Config{}, keyB)
		b = openBind(t, Config{Receive: func(b []byte, _ netip.AddrPort, _ netip.AddrPort) { received <- len(b) }})
		return nil
	})
	probe := func(size int) []byte {
		m := make([]byte, size)
		copy(m, []byte{0, 1, byte((size - 20) >> 8), byte(size - 20), 0x21, 0x12, 0xa4, 0x42})
		return m
	}
	for _, v6 := range []bool{false, true} {
		if err := a.send(probe(1600), b.at(v6), netip.AddrPort{}, 0); err == nil {
			t.Error("a probe larger than the interface left")
		}
		check(t, a.send(probe(1400), b.at(v6), netip.AddrPort{}, 0))
		if n := <-received; n != 1400 {
			t.Errorf("%d bytes arrived", n)
		}
		// Data of a peer that takes no fragments may be cut by the kernel.
		a.peers.set([]Peer{peerOf(keyB, true)})
		check(t, a.Send([][]byte{dataMessage(3, 1, 1600)}, a.path(t, keyB, b.at(v6))))
		if m := b.next(t); len(m.data) != 1600 {
			t.Errorf("%d bytes arrived", len(m.data))
		}
	}
}

// Where fragments are forbidden, what the interface does not take fails at once.
func TestDontFragment(t *testing.T) {
	s := newSpace(t)
	s.setMTU(t, "lo", 1500)
	for network, to := range map[string]string{"udp4": "127.0.0.1:9", "udp6": "[::1]:9"} {
		var c *net.UDPConn
		s.do(t, func() (err error) {
			c, err = net.ListenUDP(network, nil)
			return err
		})
		send := func() error {
			_, err := c.WriteToUDPAddrPort(make([]byte, 1600), netip.MustParseAddrPort(to))
			return err
		}
		check(t, send())
		check(t, DontFragment(c))
		if err := send(); !errors.Is(err, syscall.EMSGSIZE) {
			t.Errorf("%s: %v", network, err)
		}
		check(t, c.Close())
		if err := DontFragment(c); err == nil {
			t.Errorf("%s: a closed socket was changed", network)
		}
	}
}
