package tun

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// assembly is a receiver without a socket, with two peers that have a session
// and a path each.
type assembly struct {
	*receiver
	socket  *intake
	packets [][]byte
	sizes   []int
	eps     []conn.Endpoint
}

// paths and sessions of an assembly, by peer.
var (
	assemblyPaths    = map[Key]netip.AddrPort{keyA: netip.MustParseAddrPort("192.0.2.1:1"), keyB: netip.MustParseAddrPort("192.0.2.2:2")}
	assemblySessions = map[Key]uint32{keyA: 0xaaaa, keyB: 0xbbbb}
)

func newAssembly(c Config) *assembly {
	table := newPeers()
	table.set([]Peer{peerOf(keyA, true), peerOf(keyB, true)})
	b := newBind(c, table)
	in := newIntake(b, nil)
	a := &assembly{receiver: newReceiver(b, in, nil), socket: in, sizes: make([]int, batchSize), eps: make([]conn.Endpoint, batchSize)}
	for range 3 {
		a.packets = append(a.packets, make([]byte, maxPacket))
	}
	for k, to := range assemblyPaths {
		a.b.setPath(k, to, netip.AddrPort{})
		table.learn(assemblySessions[k], table.byKey(k))
	}
	return a
}

// arrive makes data arrive, joined of datagrams of a size, and returns what is
// delivered.
func (a *assembly) arrive(from netip.AddrPort, data []byte, segment int) [][]byte {
	a.socket.load(from, data, segment)
	return a.drain()
}

// load puts a message at hand as recvmmsg would.
func (r *intake) load(from netip.AddrPort, data []byte, segment int) {
	r.count, r.at = 1, 0
	r.msgs[0].size = uint32(copy(r.bufs[0], data))
	r.names[0].put(from)
	c := control{b: r.control[0][:0]}
	binary.NativeEndian.PutUint32(c.add(unix.IPPROTO_UDP, unix.UDP_GRO, 4), uint32(segment))
	r.msgs[0].head.SetControllen(len(c.b))
}

// drain delivers all that is at hand.
func (a *assembly) drain() [][]byte {
	var out [][]byte
	for n := a.deliver(a.packets, a.sizes, a.eps); n > 0; n = a.deliver(a.packets, a.sizes, a.eps) {
		for i := range n {
			out = append(out, bytes.Clone(a.packets[i][:a.sizes[i]]))
		}
	}
	return out
}

// each lets datagrams arrive one by one.
func (a *assembly) each(from netip.AddrPort, datagrams [][]byte) (out [][]byte) {
	for _, b := range datagrams {
		out = append(out, a.arrive(from, b, len(b))...)
	}
	return out
}

// check holds the bounds.
func (a *assembly) check(t *testing.T) {
	t.Helper()
	count := make(map[source]int)
	for i, one := range a.slots.list {
		if open := a.slots.open&(1<<i) != 0; open != (one.from != (source{})) {
			t.Fatalf("slot %d: open %v, from %v", i, open, one.from)
		}
		if one.from != (source{}) {
			count[one.from]++
		}
		if one.from != (source{}) && count[one.from] > one.from.share() {
			t.Fatalf("%d slots of one source", count[one.from])
		}
	}
}

// In one piece a message needs no slot; in any other way it comes as well, once.
func TestAssemble(t *testing.T) {
	at, session := assemblyPaths[keyA], assemblySessions[keyA]
	for _, n := range []int{1433, 5502, 62000, 62043, maxPacket} {
		a := newAssembly(Config{})
		m := dataMessage(session, 77, n)
		parts := fragmentsOf(t, m, 1432)
		if len(parts) <= 46 {
			train := append(slices.Concat(parts...), dataMessage(session, 78, 90)...)
			mustEqual(t, a.arrive(at, train, len(parts[0])), [][]byte{m, dataMessage(session, 78, 90)})
			if a.slots.begun != 0 {
				t.Fatalf("%d bytes: a slot was used", n)
			}
		}
		mustEqual(t, a.each(at, parts), [][]byte{m})
		backwards := slices.Clone(parts)
		slices.Reverse(backwards)
		mustEqual(t, a.each(at, backwards), [][]byte{m})
		half := len(parts) / 2
		got := a.arrive(at, slices.Concat(parts[:half]...), len(parts[0]))
		got = append(got, a.arrive(at, slices.Concat(parts[half:]...), len(parts[0]))...)
		mustEqual(t, got, [][]byte{m})
		if a.slots.open != 0 || a.b.drops.fragments.Load() != 0 || a.b.drops.incomplete.Load() != 0 {
			t.Fatalf("open %b, %d dropped, %d incomplete", a.slots.open, a.b.drops.fragments.Load(), a.b.drops.incomplete.Load())
		}
		if p := a.b.peers.byKey(keyA); a.b.inbound.bytes != p.in.bytes || p.in.bytes < 3*n {
			t.Fatalf("credits for %d bytes", p.in.bytes)
		}
	}
}

// Only a peer's own session, not from another peer's path, is taken; nothing else
// leaves a trace but a count.
func TestAssembleRefuses(t *testing.T) {
	good := fragmentsOf(t, dataMessage(assemblySessions[keyA], 5, 4000), 1432)
	initiation := wireGuard(typeInitiation, assemblySessions[keyA], 4000)
	for name, c := range map[string]struct {
		from  netip.AddrPort
		parts [][]byte
		slots uint64
	}{
		"another peer's":     {from: assemblyPaths[keyB], parts: good},
		"unknown session":    {from: assemblyPaths[keyA], parts: fragmentsOf(t, dataMessage(1, 5, 4000), 1432)},
		"foreign session":    {from: assemblyPaths[keyA], parts: fragmentsOf(t, dataMessage(assemblySessions[keyB], 5, 4000), 1432)},
		"an initiation":      {from: assemblyPaths[keyA], parts: fragmentsOf(t, initiation, 1432), slots: 1},
		"of another counter": {from: assemblyPaths[keyA], parts: renamed(good), slots: 1},
	} {
		a := newAssembly(Config{})
		if got := a.each(c.from, c.parts); len(got) > 0 {
			t.Errorf("%s: delivered one by one", name)
		}
		if got := a.arrive(c.from, slices.Concat(c.parts...), len(c.parts[0])); len(got) > 0 {
			t.Errorf("%s: delivered in one piece", name)
		}
		if a.slots.begun != c.slots || a.slots.open != 0 || a.b.drops.fragments.Load() != uint64(2*len(c.parts)) {
			t.Errorf("%s: %d slots, %d dropped", name, a.slots.begun, a.b.drops.fragments.Load())
		}
		if p := a.b.peers.byKey(keyA); p.in.held > 0 {
			t.Errorf("%s: costs credits", name)
		}
	}
}

// The peer may use a path that this side does not, and large messages may be
// under way although they were just switched off.
func TestAssembleFromAnotherPath(t *testing.T) {
	m := dataMessage(assemblySessions[keyA], 5, 4000)
	a := newAssembly(Config{Offloads: offLarge})
	mustEqual(t, a.each(netip.MustParseAddrPort("192.0.2.9:9"), fragmentsOf(t, m, 1432)), [][]byte{m})
}

// renamed are fragments with another id.
func renamed(parts [][]byte) [][]byte {
	var out [][]byte
	for _, b := range parts {
		f, _ := parseFragment(b)
		f.id++
		b = bytes.Clone(b)
		f.put(b)
		out = append(out, b)
	}
	return out
}

// Duplicates and fragments that contradict the first are dropped; what is right
// completes the message.
func TestAssembleContradictions(t *testing.T) {
	a, at := newAssembly(Config{}), assemblyPaths[keyA]
	m := dataMessage(assemblySessions[keyA], 5, 4001)
	parts := fragmentsOf(t, m, 1432)
	other := bytes.Clone(parts[1])
	f, _ := parseFragment(other)
	f.padding ^= 1
	f.put(other)
	twice := bytes.Clone(parts[0])
	clear(twice[fragmentHeader:])
	if got := a.each(at, [][]byte{parts[0], twice, parts[0], other}); len(got) > 0 || a.b.drops.fragments.Load() != 3 {
		t.Fatalf("%d delivered, %d dropped", len(got), a.b.drops.fragments.Load())
	}
	short := parts[2][:len(parts[2])-1] // another size: another message
	mustEqual(t, a.each(at, [][]byte{short, parts[2], parts[1]}), [][]byte{m})
	a.check(t)
}

// First fragments without end take a share of the slots and no more; another
// peer's messages, and those in one piece, still come.
func TestAssembleEndlessFirsts(t *testing.T) {
	a := newAssembly(Config{})
	other := fragmentsOf(t, dataMessage(assemblySessions[keyB], 1, 4000), 1432)
	a.each(assemblyPaths[keyB], other[:1])
	for i := range uint64(5000) {
		m := dataMessage(assemblySessions[keyA], i, 4000)
		a.each(assemblyPaths[keyA], fragmentsOf(t, m, 1432)[:1])
		a.check(t)
		if i%100 == 0 {
			m := dataMessage(assemblySessions[keyA], i+1, 62000)
			parts := fragmentsOf(t, m, 1432)
			mustEqual(t, a.arrive(assemblyPaths[keyA], slices.Concat(parts...), len(parts[0])), [][]byte{m})
		}
	}
	if n := bits.OnesCount32(a.slots.open); n > 1+maxPeerSlots {
		t.Fatalf("%d slots open", n)
	}
	for i, one := range a.slots.list[1+maxPeerSlots:] {
		if one.data != nil {
			t.Fatalf("slot %d has memory", i)
		}
	}
	if lost := a.b.drops.incomplete.Load(); lost != 5000-maxPeerSlots {
		t.Fatalf("%d incomplete", lost)
	}
	mustEqual(t, a.each(assemblyPaths[keyB], other[1:]), [][]byte{dataMessage(assemblySessions[keyB], 1, 4000)})
}

// More peers than slots: the oldest makes room.
func TestAssembleManyPeers(t *testing.T) {
	s := slots{drops: &drops{}}
	list := make([]peer, 10)
	for i := range 100 {
		f := fragment{session: uint32(i % 10), id: uint16(i), count: 2, size: 100}
		s.put(make([]byte, 200), source{&list[i%10], true}, f, make([]byte, 100))
	}
	for i := range 100 {
		f := fragment{session: uint32(i % 10), id: uint16(i), index: 1, count: 2, size: 100}
		if open := s.find(source{&list[i%10], true}, f) >= 0; open != (i >= 100-maxSlots) {
			t.Fatalf("message %d open: %v", i, open)
		}
	}
	if s.open != 1<<maxSlots-1 || s.drops.incomplete.Load() != 100-maxSlots {
		t.Fatalf("open %b, %d incomplete", s.open, s.drops.incomplete.Load())
	}
}

// What is left of a message is given up before its id comes again.
func TestAssembleGivesUp(t *testing.T) {
	a, at, session := newAssembly(Config{}), assemblyPaths[keyA], assemblySessions[keyA]
	const lost = 5000
	a.each(at, fragmentsOf(t, dataMessage(session, lost, 4000), 1432)[:2])
	for _, c := range []struct {
		counter uint64
		session uint32
		open    bool
	}{
		{lost + staleAfter - 1, session, true},
		{lost - staleAfter, session, true},                    // late, not new
		{lost + staleAfter, assemblySessions[keyB], true},     // of another session
		{lost + staleAfter + fragmentIDs/4, 0xffffffff, true}, // of none
		{lost + staleAfter, session, false},
	} {
		a.arrive(at, dataMessage(c.session, c.counter, 64), 64)
		if open := a.slots.open != 0; open != c.open {
			t.Fatalf("after %+v: %v", c, open)
		}
	}
	if a.b.drops.incomplete.Load() != 1 {
		t.Fatalf("%d incomplete", a.b.drops.incomplete.Load())
	}
	m := dataMessage(session, lost+fragmentIDs, 4000)
	mustEqual(t, a.each(at, fragmentsOf(t, m, 1432)), [][]byte{m})
}

// Whatever comes, the bounds hold, and a message none of whose fragments was
// forged comes through in any order.
func FuzzReassembly(f *testing.F) {
	f.Add([]byte{0x80, 0, 0x10, 0x40, 0xaa, 0xaa, 0, 0, 5, 0x80, 0, 0x20, 0x40, 0xaa, 0xaa, 0, 0, 6}, uint64(1), 4000, 9)
	f.Add(fragmentsOf(f, dataMessage(0xaaaa, 3, 3000), 1432)[0], uint64(2), 62000, 1432)
	f.Fuzz(func(t *testing.T, garbage []byte, seed uint64, n, segment int) {
		if len(garbage) > receiveSize || n < 100 || n > maxPacket || segment < 1 {
			return
		}
		a, random := newAssembly(Config{}), rand.New(rand.NewPCG(seed, 2))
		at := assemblyPaths[keyA]
		m := dataMessage(assemblySessions[keyA], seed, n)
		parts := fragmentsOf(t, m, 1400)
		random.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		var got [][]byte
		for i, b := range parts {
			if i == len(parts)/2 {
				for _, b := range forgeries(garbage, segment, parts[0]) {
					if out := a.arrive(assemblyPaths[keyB], b, len(b)); len(out) > 0 && frameOf(out[0]) != frameWireGuard {
						t.Fatal("not WireGuard")
					}
				}
				a.check(t)
			}
			got = append(got, a.arrive(at, b, len(b))...)
		}
		mustEqual(t, got, [][]byte{m})
		raw := newAssembly(Config{})
		raw.arrive(at, garbage, segment)
		raw.check(t)
		again := dataMessage(assemblySessions[keyA], seed+fragmentIDs/2, n)
		parts = fragmentsOf(t, again, 1400)
		for _, b := range forgeries(garbage, segment, parts[0]) {
			a.arrive(at, b, len(b))
		}
		a.check(t)
		mustEqual(t, a.each(at, parts), [][]byte{again})
	})
}

// forgeries are datagrams with a fragment's header of peer A's session and the
// fuzzer's numbers, but for the message of one given fragment.
func forgeries(garbage []byte, segment int, but []byte) [][]byte {
	var out [][]byte
	for b := range slices.Chunk(garbage, segment) {
		b = bytes.Clone(b)
		if len(b) > fragmentHeader {
			b[0] = b[0]&0x0f | fragmentKind
			binary.LittleEndian.PutUint32(b[indexAt:], assemblySessions[keyA])
			one, _ := parseFragment(b)
			if clean, _ := parseFragment(but); one.id == clean.id {
				continue
			}
		}
		out = append(out, b)
	}
	return out
}
