package tun

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// relayAddrs are the UDP addresses of links 1 and 2.
var relayAddrs = map[uint16]netip.AddrPort{1: netip.MustParseAddrPort("198.51.100.1:3478"), 2: netip.MustParseAddrPort("[2001:db8::2]:3478")}

// wayHeader is the header of a flow.
func wayHeader(n byte) [flowHeader]byte { return [flowHeader]byte{flowByte, 1, 2, 3, 4, 5, 6, n} }

// inFlow is a datagram in a flow.
func inFlow(n byte, b []byte) []byte {
	h := wayHeader(n)
	return append(h[:], b...)
}

// allInFlow are datagrams in a flow.
func allInFlow(n byte, list [][]byte) (out [][]byte) {
	for _, b := range list {
		out = append(out, inFlow(n, b))
	}
	return out
}

// runOf are frames as Deliver takes them.
func runOf(frames ...[]byte) (run []byte) {
	for _, b := range frames {
		run = binary.BigEndian.AppendUint16(run, uint16(len(b)))
		run = append(run, b...)
	}
	return run
}

// heard is a call of Config.Receive.
type heard struct {
	data string
	from netip.AddrPort
}

// relayedAssembly has both links, flow 1 with peer A over both of them and flow 2
// with peer B over the first. It returns the ways and what Config.Receive heard.
func relayedAssembly() (a *assembly, ways []*endpoint, got *[]heard) {
	got = new([]heard)
	a = newAssembly(Config{Receive: func(b []byte, from, _ netip.AddrPort) {
		*got = append(*got, heard{string(b), from})
	}})
	for id, addr := range relayAddrs {
		a.b.peers.setLink(id, Link{Addr: addr})
	}
	a.b.peers.byKey(keyB).home = netip.MustParseAddr("fd00:1::b")
	ways = a.b.peers.setWays(keyA, []Way{{1, wayHeader(1)}, {2, wayHeader(1)}})
	return a, append(ways, a.b.peers.setWays(keyB, []Way{{1, wayHeader(2)}})...), got
}

// overStream delivers a run of a link's own connection.
func (a *assembly) overStream(link uint16, run []byte) [][]byte {
	h := newHandover(a.b)
	h.link, h.rest = link, run
	a.in = h
	defer func() { a.in = a.socket }()
	return a.drain()
}

// Messages of all sizes come out of a flow whole, in one piece or in any other
// way, from the endpoint of the way they took.
func TestFlowCarries(t *testing.T) {
	session := assemblySessions[keyA]
	for _, n := range []int{64, 1432, 1433, 5502, 62000, maxPacket} {
		a, ways, _ := relayedAssembly()
		m := dataMessage(session, 77, n)
		parts := allInFlow(1, fragmentsOf(t, m, 1432))
		backwards := slices.Clone(parts)
		slices.Reverse(backwards)
		for _, way := range ways[:2] {
			at := relayAddrs[way.relay.id]
			if len(parts) <= 45 {
				last := inFlow(1, dataMessage(session, 78, 50))
				mustEqual(t, a.arrive(at, append(slices.Concat(parts...), last...), len(parts[0])), [][]byte{m, dataMessage(session, 78, 50)})
			}
			if a.slots.begun != 0 {
				t.Fatalf("%d bytes: a slot was used", n)
			}
			mustEqual(t, a.overStream(way.relay.id, runOf(parts...)), [][]byte{m})
			if a.slots.begun != 0 {
				t.Fatalf("%d bytes over a stream: a slot was used", n)
			}
			mustEqual(t, a.each(at, parts), [][]byte{m})
			mustEqual(t, a.each(at, backwards), [][]byte{m})
			mustEqual(t, a.overStream(way.relay.id, runOf(backwards...)), [][]byte{m})
			if a.eps[0] != way || a.from != way {
				t.Fatalf("from %v, want the way over link %d", a.from.to, way.relay.id)
			}
			a.slots.begun = 0
		}
		if d := &a.b.drops; d.foreign.Load()+d.fragments.Load()+d.incomplete.Load() != 0 {
			t.Fatalf("%d bytes: dropped", n)
		}
		if p := a.b.peers.byKey(keyA); p.in.bytes < n || !p.met.Load() {
			t.Fatalf("credits for %d bytes, met: %v", p.in.bytes, p.met.Load())
		}
	}
}

// Datagrams of several flows and of the relay itself travel in one buffer, and
// none gets into another's message.
func TestFlowsInOneBuffer(t *testing.T) {
	a, ways, got := relayedAssembly()
	m, o := dataMessage(assemblySessions[keyA], 5, 4000), dataMessage(assemblySessions[keyB], 5, 4000)
	ours, others := allInFlow(1, fragmentsOf(t, m, 1432)), allInFlow(2, fragmentsOf(t, o, 1432))
	size := len(ours[0])
	control, stun, signal := make([]byte, size), inFlow(2, stunMessage(size-flowHeader)), inFlow(1, append([]byte{signalByte}, make([]byte, size-flowHeader-1)...))
	control[0] = controlByte
	train := slices.Concat(ours[0], others[0], control, ours[1], stun, others[1], ours[2], signal, others[2], control)
	mustEqual(t, a.arrive(relayAddrs[1], train, size), [][]byte{m, o})
	want := []heard{{string(control), relayAddrs[1]}, {string(stun[flowHeader:]), ways[2].to}, {string(signal[flowHeader:]), ways[0].to}, {string(control), relayAddrs[1]}}
	if !slices.Equal(*got, want) {
		t.Errorf("heard %d, from %v", len(*got), *got)
	}
	// A message whose middle is in another flow is not one.
	mixed := slices.Concat(ours[0], inFlow(2, ours[1][flowHeader:]), ours[2])
	if out := a.arrive(relayAddrs[1], mixed, size); len(out) > 0 {
		t.Error("put together of two flows")
	}
}

// What does not belong into a flow, is of none, or comes from elsewhere is
// dropped and counted.
func TestFlowDrops(t *testing.T) {
	good := wireGuard(typeData, assemblySessions[keyA], 64)
	parts := fragmentsOf(t, dataMessage(assemblySessions[keyA], 5, 4000), 1432)
	stranger := netip.MustParseAddrPort("203.0.113.1:1")
	for name, c := range map[string]struct {
		from netip.AddrPort
		b    []byte
	}{
		"from a stranger":       {stranger, inFlow(1, good)},
		"from a path":           {assemblyPaths[keyA], inFlow(1, good)},
		"from another relay":    {relayAddrs[2], inFlow(2, good)},
		"unknown flow":          {relayAddrs[1], inFlow(3, good)},
		"no flow of that kind":  {relayAddrs[1], append([]byte{0x91, 1, 2, 3, 4, 5, 6, 1}, good...)},
		"flow in a flow":        {relayAddrs[1], inFlow(1, inFlow(1, good))},
		"control in a flow":     {relayAddrs[1], inFlow(1, []byte{controlByte, 1, 1, 0})},
		"nothing in a flow":     {relayAddrs[1], inFlow(1, nil)},
		"half a header":         {relayAddrs[1], inFlow(1, nil)[:5]},
		"signal without a flow": {relayAddrs[1], []byte{signalByte, 1, 2, 3}},
		"nonsense in a flow":    {relayAddrs[1], inFlow(1, []byte{0x20, 1, 2})},
	} {
		a, _, got := relayedAssembly()
		if out := a.each(c.from, [][]byte{c.b}); len(out)+len(*got) > 0 || a.b.drops.foreign.Load() != 1 {
			t.Errorf("%s: %d delivered, %d heard, %d dropped", name, len(out), len(*got), a.b.drops.foreign.Load())
		}
	}
	for name, c := range map[string]struct {
		link    uint16
		run     []byte
		arrives int
	}{
		"without a flow":    {1, runOf(good), 0},
		"control":           {1, runOf([]byte{controlByte, 1}), 0},
		"stun":              {1, runOf(stunMessage(40)), 0},
		"of another link":   {2, runOf(inFlow(2, good)), 0},
		"of no link":        {7, runOf(inFlow(1, good)), 0},
		"half a length":     {1, append(runOf(inFlow(1, good)), 0), 1},
		"half a frame":      {1, append(runOf(inFlow(1, good)), 0, 9, flowByte), 1},
		"no frame":          {1, append(runOf(inFlow(1, good)), runOf(nil, inFlow(1, good))...), 1},
		"frame beyond size": {1, runOf(inFlow(1, good), make([]byte, maxFrame+1), inFlow(1, good)), 1},
		"short frame":       {1, runOf(inFlow(1, good), []byte{flowByte}, inFlow(1, good)), 2},
	} {
		a, _, got := relayedAssembly()
		if out := a.overStream(c.link, c.run); len(out) != c.arrives || len(*got) > 0 || a.b.drops.foreign.Load() != 1 {
			t.Errorf("%s: %d delivered, %d heard, %d dropped", name, len(out), len(*got), a.b.drops.foreign.Load())
		}
	}
	// Only the peer's own fragments come by its way.
	a, _, _ := relayedAssembly()
	if out := a.each(relayAddrs[1], allInFlow(2, parts)); len(out) > 0 || a.b.drops.fragments.Load() != uint64(len(parts)) {
		t.Error("fragments of A's session were taken from B")
	}
}

// A Link that goes over to its own connection takes what is under way from its
// UDP port; one that is down takes nothing from there.
func TestLinkAccepts(t *testing.T) {
	a, _, _ := relayedAssembly()
	b := [][]byte{inFlow(1, wireGuard(typeData, 1, 64))}
	other := netip.MustParseAddrPort("198.51.100.77:3478")
	send := func([]byte) {}
	for i, c := range []struct {
		link      Link
		old, next bool
	}{
		{Link{Addr: relayAddrs[1]}, true, false},
		{Link{Send: send}, true, false},
		{Link{Addr: other, Send: send}, false, true},
		{Link{Addr: other}, false, true},
		{Link{}, false, false},
		{Link{Send: send}, false, false},
	} {
		a.b.peers.setLink(1, c.link)
		if old, next := len(a.each(relayAddrs[1], b)) == 1, len(a.each(other, b)) == 1; old != c.old || next != c.next {
			t.Errorf("%d: from the first address %v, from the second %v", i, old, next)
		}
	}
}

func TestSetWays(t *testing.T) {
	a, ways, _ := relayedAssembly()
	p := a.b.peers.byKey(keyA)
	if h := netip.AddrPortFrom(handleA, 0x8002); ways[1].to != h || a.b.peers.at(h) != ways[1] {
		t.Fatalf("handle %v", ways[1].to)
	}
	list := []Way{{2, wayHeader(1)}, {0, wayHeader(1)}, {relayedPort, wayHeader(1)}, {3, [flowHeader]byte{0x80}}, {2, wayHeader(9)}}
	for id := range uint16(maxWays) {
		list = append(list, Way{10 + id, wayHeader(1)})
	}
	a.b.peers.setCopy(keyA, ways[0].to, 0)
	again := a.b.peers.setWays(keyA, list)
	for i, e := range again {
		if bad := i >= 1 && i <= 4 || i == len(list)-1; bad != (e == nil) {
			t.Errorf("way %d: %v", i, e)
		}
	}
	if again[0] != ways[1] || a.b.peers.at(ways[0].to) != nil || p.also.Load() != nil {
		t.Error("what stays is another, or what is gone is still there")
	}
	if e, err := a.b.ParseEndpoint(ways[1].to.String()); err != nil || e != ways[1] {
		t.Errorf("parsed to %v, %v", e, err)
	}
	for _, e := range a.b.peers.setWays(Key{9}, list) {
		if e != nil {
			t.Fatal("a way of a stranger")
		}
	}
	a.b.peers.set([]Peer{peerOf(keyB, true)})
	if len(a.b.peers.flows) != 1 || a.b.peers.at(ways[1].to) != nil {
		t.Errorf("%d flows after the peer has gone", len(a.b.peers.flows))
	}
}

// A change of path to and from a relay begins anew with the size of messages; a
// path in use goes on.
func TestFollow(t *testing.T) {
	a, ways, _ := relayedAssembly()
	p, t0 := a.b.peers.byKey(keyA), a.b.peers
	for i, c := range []struct {
		change func()
		level  int
		direct bool
	}{
		{func() { t0.follow(keyA, ways[0].to) }, levelPlain, false},
		{func() { t0.follow(keyA, ways[0].to) }, levelWhole, false},
		{func() { t0.follow(keyA, ways[1].to) }, levelPlain, false},
		{func() { a.b.setPath(keyA, assemblyPaths[keyA], netip.AddrPort{}) }, levelPlain, true},
		{func() { a.b.setPath(keyA, assemblyPaths[keyA], netip.AddrPort{}) }, levelWhole, true},
		{func() { t0.setWays(keyA, []Way{{1, wayHeader(1)}}) }, levelWhole, true},
	} {
		p.level.now.Store(levelWhole)
		c.change()
		if p.level.segments() != c.level || p.direct.Load() != c.direct || !p.pathed.Load() {
			t.Errorf("%d: level %d, direct %v", i, p.level.segments(), p.direct.Load())
		}
	}
	for _, h := range []netip.AddrPort{ways[1].to, ways[2].to, assemblyPaths[keyA], {}} {
		if t0.follow(keyA, h) {
			t.Errorf("%v is a way of A", h)
		}
	}
}

func TestSetCopy(t *testing.T) {
	a, ways, _ := relayedAssembly()
	p := a.b.peers.byKey(keyA)
	dropping := a.b.handle(keyA, handleA)
	if dropping.Port() >= relayedPort {
		t.Fatalf("handle %v", dropping)
	}
	for to, want := range map[netip.AddrPort]*endpoint{
		ways[0].to:          ways[0],
		assemblyPaths[keyA]: a.b.peers.at(assemblyPaths[keyA]),
		assemblyPaths[keyB]: nil,
		ways[2].to:          nil,
		dropping:            nil,
		(netip.AddrPort{}):  nil,
		relayAddrs[1]:       nil,
	} {
		a.b.peers.setCopy(keyA, ways[1].to, 0)
		if a.b.peers.setCopy(keyA, to, 0); p.also.Load() != want {
			t.Errorf("copies to %v: %v", to, p.also.Load())
		}
	}
	a.b.peers.setCopy(Key{9}, ways[0].to, 0)
}

// Handles never become those of a way.
func TestHandlePortsWrap(t *testing.T) {
	a, _, _ := relayedAssembly()
	a.b.peers.byKey(keyA).port = lastPort
	if h := a.b.handle(keyA, handleA); h.Port() != 1 {
		t.Errorf("handle %v after the last", h)
	}
}

// Data of no session by a path of a peer is news, once a second, until there was
// a session.
func TestSessionUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lost []Key
		a := newAssembly(Config{SessionUnknown: func(k Key) { lost = append(lost, k) }})
		a.b.peers.setLink(1, Link{Addr: relayAddrs[1]})
		a.b.peers.setWays(keyB, []Way{{1, wayHeader(2)}})
		stray := dataMessage(0x5555, 1, 4000)
		parts := fragmentsOf(t, stray, 1432)
		for i, c := range []struct {
			wait time.Duration
			from netip.AddrPort
			b    []byte
			want []Key
		}{
			{0, netip.MustParseAddrPort("203.0.113.1:1"), stray, nil},
			{0, assemblyPaths[keyA], wireGuard(typeInitiation, 0x5555, initiationSize), nil},
			{0, assemblyPaths[keyA], stray[:64], []Key{keyA}},
			{strayInterval - 1, assemblyPaths[keyA], parts[0], nil},
			{1, assemblyPaths[keyA], parts[0], []Key{keyA}},
			{0, relayAddrs[1], inFlow(2, stray[:64]), []Key{keyB}},
			{strayInterval, relayAddrs[1], inFlow(2, parts[0]), []Key{keyB}},
			{0, assemblyPaths[keyB], wireGuard(typeData, assemblySessions[keyB], 64), nil},
			{strayInterval, relayAddrs[1], inFlow(2, stray[:64]), nil}, // an old one
			{0, assemblyPaths[keyA], stray[:64], []Key{keyA}},
		} {
			time.Sleep(c.wait)
			lost = nil
			a.arrive(c.from, c.b, len(c.b))
			if !slices.Equal(lost, c.want) {
				t.Errorf("%d: told %v, want %v", i, lost, c.want)
			}
		}
	})
}

// Whatever comes over a relay's connection, only whole messages get on, and what
// follows in order still comes.
func FuzzRun(f *testing.F) {
	f.Add(runOf(inFlow(1, wireGuard(typeData, 1, 64)), inFlow(1, stunMessage(40))), uint16(1))
	f.Add(runOf(inFlow(1, []byte{0x80, 0, 0x10, 0x40, 0xaa, 0xaa, 0, 0, 5})), uint16(2))
	f.Fuzz(func(t *testing.T, run []byte, link uint16) {
		if len(run) > 1<<20 || link == 0 { // which Deliver refuses
			return
		}
		a, ways, got := relayedAssembly()
		for _, m := range a.overStream(link, run) {
			if frameOf(m) != frameWireGuard || link != 1 && link != 2 {
				t.Fatal("not WireGuard, or of no link")
			}
		}
		for _, one := range *got {
			if k := frameOf([]byte(one.data)); k != frameSTUN && k != frameSignal || !slices.ContainsFunc(ways, func(e *endpoint) bool { return e.to == one.from }) {
				t.Fatalf("heard a frame of kind %d from %v", k, one.from)
			}
		}
		a.check(t)
		m := dataMessage(assemblySessions[keyB], 5, 4000)
		if out := a.overStream(1, runOf(allInFlow(2, fragmentsOf(t, m, 1432))...)); len(out) != 1 || !bytes.Equal(out[0], m) {
			t.Fatal("a good message does not come")
		}
	})
}
