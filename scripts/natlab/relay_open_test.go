package natlab

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
	"overlay/punch/relay"
)

const (
	openWait     = 300 * time.Millisecond
	openTogether = 64
	openTypes    = 10

	helloSize, challengeSize = 60, 36
	admitSize                = 1000

	// forgedMark begins what is forged behind a flow's header; neither
	// WireGuard's messages nor ours do.
	forgedMark = 0xfeedbeef
)

// relayPorts are the UDP ports of a server.
func relayPorts() []uint16 { return []uint16{443, 3478, 3479} }

// control is a message to a relay as somebody makes it who has no keys.
func control(kind, version byte, size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	copy(b, []byte{relay.ControlByte, kind, version, 0})
	if size >= helloSize {
		clear(b[28:44]) // no cookie
	}
	return b
}

// TestRelayAnswersLittle sends a relay messages of every kind and length from
// an address it does not know: an answer is never longer than what it answers,
// and there is none to data.
func TestRelayAnswersLittle(t *testing.T) {
	m := newMesh(t)
	m.join(t, mustServer(t, m.Lab, "a"))
	mallory := mustServer(t, m.Lab, "mallory")
	var tries [][]byte
	for kind := range byte(openTypes) {
		for size := 4; size <= 2*helloSize; size += 4 {
			tries = append(tries, control(kind, 1, size))
		}
		tries = append(tries, control(kind, 2, helloSize), control(kind, 1, admitSize), control(kind, 1, admitSize+400))
	}
	tries = append(tries, []byte{relay.ControlByte})
	for size := range 2 * helloSize {
		data := control(0, 0, 4+size)
		data[0] = relay.FlowByte + byte(size%3)
		tries = append(tries, data)
	}
	for _, port := range relayPorts() {
		to := netip.AddrPortFrom(m.server.Addr(), port)
		if got := answer(t, mallory, to, control(1, 1, helloSize)); len(got) != challengeSize {
			t.Errorf("port %d: %d bytes answer a first HELLO, not a CHALLENGE of %d", port, len(got), challengeSize)
		}
		var g errgroup.Group
		g.SetLimit(openTogether)
		for _, b := range tries {
			g.Go(func() error {
				got := answer(t, mallory, to, b)
				if len(got) > len(b) {
					t.Errorf("port %d: %d bytes answer %d: % x", port, len(got), len(b), b[:4])
				}
				if len(got) > 0 && b[0] != relay.ControlByte {
					t.Errorf("port %d: % x is answered", port, b[:min(len(b), 4)])
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// answer sends a datagram from a new port and gives what comes back.
func answer(t *testing.T, from *Host, to netip.AddrPort, b []byte) []byte {
	t.Helper()
	var c *net.UDPConn
	err := from.inside(func() (err error) {
		c, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		t.Error(err)
		return nil
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(openWait)); err != nil {
		t.Error(err)
	}
	if _, err := c.Write(b); err != nil {
		t.Error(err)
	}
	got := make([]byte, 2048)
	n, err := c.Read(got)
	if err != nil && !os.IsTimeout(err) {
		t.Error(err)
	}
	return got[:n]
}

// TestNotOpenRelay floods a relay with what strangers can make, and with
// forged sources and the names of flows, beside a flow at half of its maximum.
// Nothing forged is forwarded. TestHostileFragments says how that is measured.
func TestNotOpenRelay(t *testing.T) {
	m := newMeshIn(t, Options{Delay: -1})
	var n [3]*member
	for i, name := range []string{"a", "b", "c"} {
		h := mustServer(t, m.Lab, name)
		if i == 1 {
			m.cut(t, n[0].Host, h)
		}
		n[i] = m.join(t, h)
	}
	a, b, c := n[0], n[1], n[2]
	mallory := mustServer(t, m.Lab, "mallory")
	serveIperf(t, b.Host, b.addr)
	var s script
	s.add("nft add table ip aside")
	s.add("nft add chain ip aside in '{ type filter hook prerouting priority raw; }'")
	s.add("nft add rule ip aside in udp dport %d drop", hostileAside)
	if err := m.server.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	forged := fmt.Sprintf("meta l4proto udp @th,128,32 0x%x", uint32(forgedMark))
	came := m.server.tally(t, "forged", forged)
	var through [3]func() int
	for i, n := range n {
		through[i] = n.tally(t, "forged", forged)
	}
	f := &flood{
		from: mallory, mallory: mallory.Addr(), peer: netip.AddrPortFrom(a.Addr(), wireGuardPort(t, a)),
		kinds: strangeKinds(keyOf(t, a), keyOf(t, b), keyOf(t, c)),
		pid:   m.coord.PID(), length: time.Duration(runs(5, 30)) * time.Second,
	}
	f.aside = f.prepare(netip.AddrPortFrom(m.server.Addr(), hostileAside))
	f.packets = f.prepare(netip.AddrPortFrom(m.server.Addr(), relayPorts()[0]))
	f.mustKeep(t, a, b)
	if p := a.relayTo(t, b); p.Kind != "relay" {
		t.Errorf("the flow went by %+v", p)
	}
	for i, count := range through {
		if got := count(); got > 0 {
			t.Errorf("%d forged packets reached %s", got, n[i].nodeName)
		}
	}
	if came() == 0 {
		t.Error("no forged packet reached the relay")
	}
}

// strangeKinds are what must not get through a relay; a and b have a flow, and
// the forged source is that of a.
func strangeKinds(a, b, c punch.Key) []hostile {
	flow := func(h relay.Header, n int) []byte {
		size := hostileSize
		if n%8 == 0 {
			size = hostileLarge
		}
		body := make([]byte, len(h)+size)
		copy(body, h[:])
		binary.BigEndian.PutUint32(body[len(h):], forgedMark)
		return body
	}
	random := func() (h relay.Header) {
		binary.BigEndian.PutUint64(h[:], rand.Uint64())
		h[0] = relay.FlowByte
		return h
	}
	return []hostile{
		// The flow of others, from an address that is not theirs.
		{false, func(n int) []byte { return flow(relay.FlowOf(a, b), n) }},
		{true, func(n int) []byte { return flow(relay.FlowOf(b, c), n) }},
		// Flows that do not exist.
		{false, func(n int) []byte { return flow(random(), n) }},
		{true, func(n int) []byte { return flow(random(), n) }},
		// Cut off.
		{true, func(n int) []byte { h := relay.FlowOf(a, b); return h[:1+n%7] }},
		// Control messages of sessions nobody has.
		{false, func(n int) []byte { return control(1, 1, helloSize) }},
		{true, func(n int) []byte { return control(1, 1, helloSize) }},
		{false, func(n int) []byte { return control(4, 1, admitSize-n%300) }},
		{true, func(n int) []byte { return control(6, 1, 44+32*(n%29)) }},
		// Frames of no kind.
		{true, func(n int) []byte { b := control(0, 0, hostileSize); b[0] = 0x80 | byte(n); return b[:4+n%60] }},
	}
}

// wireGuardPort is the UDP port of a node.
func wireGuardPort(t *testing.T, n *member) uint16 {
	t.Helper()
	return uint16(number(t, strings.TrimSpace(output(t, n.Host, "wg", "show", overlayDevice, "listen-port"))))
}

func keyOf(t *testing.T, n *member) punch.Key {
	t.Helper()
	return punch.Key(wireGuardKey(t, n))
}
