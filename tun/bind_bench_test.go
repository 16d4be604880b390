package tun

import (
	"errors"
	"net/netip"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
)

// half is one side of a pair of binds driven by hand.
type half struct {
	b     *bind
	fn    conn.ReceiveFunc
	spare conn.ReceiveFunc // of spare sockets
	out   [][]byte
	to    conn.Endpoint
	bufs  [][]byte
	sizes []int
	eps   []conn.Endpoint
}

func newHalf(t testing.TB, k Key) *half {
	table := newPeers()
	table.large = true
	table.set([]Peer{largePeer(k)})
	h := &half{b: newBind(Config{MTU: 1400}, table), bufs: buffers(), sizes: make([]int, batchSize), eps: make([]conn.Endpoint, batchSize)}
	fns, _, err := h.b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	h.fn, h.spare = fns[0], fns[len(fns)-2]
	t.Cleanup(func() { _ = h.b.Close() })
	return h
}

// benchPair is a sender of 45 full messages and their receiver.
func benchPair(t testing.TB) (*half, *half) {
	x, y := newHalf(t, keyB), newHalf(t, keyA)
	o, p := &opened{bind: x.b}, &opened{bind: y.b}
	if err := errors.Join(y.b.setPath(keyA, o.at(false), netip.AddrPort{}), x.b.setPath(keyB, p.at(false), netip.AddrPort{})); err != nil {
		t.Fatal(err)
	}
	y.b.peers.learn(3, y.b.peers.byKey(keyA))
	e, err := x.b.ParseEndpoint(p.at(false).String())
	if err != nil {
		t.Fatal(err)
	}
	x.to = e
	for range 45 {
		x.out = append(x.out, wireGuard(typeData, 3, 1432))
	}
	return x, y
}

func (h *half) send(t testing.TB) {
	if err := h.b.Send(h.out, h.to); err != nil {
		t.Fatal(err)
	}
}

func (h *half) receive(t testing.TB, want int) {
	for want > 0 {
		n, err := h.fn(h.bufs, h.sizes, h.eps)
		if err != nil {
			t.Fatal(err)
		}
		want -= n
		h.b.inbound.settle(&h.b.peers.byKey(keyA).in, n)
	}
}

// largeBatches are other messages for a benchPair: a super-packet in one, and
// three of four segments.
func largeBatches() map[string][][]byte {
	return map[string][][]byte{
		"whole": {dataMessage(3, 1, 62000)},
		"some":  {dataMessage(3, 1, 5502), dataMessage(3, 2, 5502), dataMessage(3, 3, 5502)},
	}
}

func BenchmarkBind(b *testing.B) {
	run := func(b *testing.B, pair func(testing.TB) (*half, *half), out [][]byte) {
		x, y := pair(b)
		if out != nil {
			x.out = out
		}
		size := 0
		for _, m := range x.out {
			size += len(m)
		}
		b.SetBytes(int64(size))
		b.ReportAllocs()
		for b.Loop() {
			x.send(b)
			if y.fn != nil {
				y.receive(b, len(x.out))
			}
		}
	}
	batches := largeBatches()
	batches["plain"] = nil
	for name, out := range batches {
		b.Run(name+"/direct", func(b *testing.B) { run(b, benchPair, out) })
		b.Run(name+"/spare", func(b *testing.B) { run(b, spareHalves, out) })
		b.Run(name+"/relayed", func(b *testing.B) { run(b, relayedHalves, out) })
		b.Run(name+"/stream", func(b *testing.B) {
			run(b, func(t testing.TB) (*half, *half) {
				x, y := streamHalves(t)
				return x, &half{b: y.b} // has received already
			}, out)
		})
	}
}
