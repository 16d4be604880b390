package tun

import (
	"net/netip"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
)

// half is one side of a pair of binds driven by hand.
type half struct {
	b     *bind
	fn    conn.ReceiveFunc
	out   [][]byte
	to    conn.Endpoint
	bufs  [][]byte
	sizes []int
	eps   []conn.Endpoint
}

func newHalf(t testing.TB, k Key) *half {
	table := newPeers()
	table.set([]Peer{peerOf(k, true)})
	h := &half{b: newBind(Config{}, table), bufs: buffers(), sizes: make([]int, batchSize), eps: make([]conn.Endpoint, batchSize)}
	fns, _, err := h.b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	h.fn = fns[0]
	t.Cleanup(func() { _ = h.b.Close() })
	return h
}

// benchPair is a sender of 45 full messages and their receiver.
func benchPair(t testing.TB) (*half, *half) {
	x, y := newHalf(t, keyB), newHalf(t, keyA)
	o, p := &opened{bind: x.b}, &opened{bind: y.b}
	y.b.setPath(keyA, o.at(false), netip.Addr{})
	x.b.setPath(keyB, p.at(false), netip.Addr{})
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

func BenchmarkBind(b *testing.B) {
	x, y := benchPair(b)
	b.SetBytes(45 * 1432)
	b.ReportAllocs()
	for b.Loop() {
		x.send(b)
		y.receive(b, len(x.out))
	}
}
