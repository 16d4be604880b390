package tun

import (
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// loop sends what one kernel gives through a tunnel, and what the tunnel makes of
// it through another, without wireguard-go.
type loop struct {
	near, far  *tunnel
	kernel     *fakeTUN // of near
	offered    [][]byte // with virtio headers
	bufs, full [][]byte
	sizes      []int
	room       [virtioSize + maxPacket]byte
	raw        syscall.RawConn // of far's kernel
	empty      func(fd uintptr) bool
	arrived    int // bytes
	out, inner *peer
}

func newLoop(t testing.TB, level int, offered ...[]byte) *loop {
	l := &loop{bufs: buffers(), sizes: make([]int, batchSize), offered: offered}
	var kernel *fakeTUN
	l.near, l.kernel = largeTunnel(t, everything)
	l.far, kernel = largeTunnel(t, everything)
	raw, err := kernel.far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	l.raw, l.empty = raw, func(fd uintptr) bool {
		for {
			n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&l.room)), uintptr(len(l.room)))
			if errno != 0 {
				return true
			}
			l.arrived += int(n) - virtioSize
		}
	}
	setLevel(l.near, level)
	l.out, l.inner = l.near.peers.byKey(keyB), l.far.peers.byKey(keyA)
	return l
}

// round passes everything offered once and returns how many messages there were.
func (l *loop) round(t testing.TB) (messages int) {
	for _, p := range l.offered {
		if _, err := l.kernel.far.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	l.arrived = 0
	for want := len(l.offered); want > 0; {
		n, err := l.near.Read(l.bufs, l.sizes, testOffset)
		if err != nil {
			t.Fatal(err)
		}
		l.full = l.full[:0]
		for i := range n {
			if l.sizes[i] > 0 {
				l.full = append(l.full, l.bufs[i][:testOffset+l.sizes[i]])
			}
		}
		messages += len(l.full)
		l.near.bind.out.settle(&l.out.out, len(l.full))
		before := l.inner.received.Load()
		if _, err := l.far.Write(l.full, testOffset); err != nil {
			t.Fatal(err)
		}
		if err := l.raw.Read(l.empty); err != nil {
			t.Fatal(err)
		}
		want -= int(l.inner.received.Load() - before) // at levelWhole a record each
	}
	return messages
}

// kernelBytes is a packet with its virtio header.
func kernelBytes(p []byte, h virtio) []byte {
	return append(append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&h)), virtioSize)...), p...)
}

// mixture is what a busy kernel gives: super-packets of both families and
// protocols, small packets with partial and full checksums, full-size ones.
func mixture() [][]byte {
	var out [][]byte
	for i, s := range []segments{
		{size: 1348, payload: pattern(60000, 1)},
		{v6: true, size: 1328, payload: pattern(60000, 2)},
		{udp: true, size: 1000, payload: pattern(30000, 3)},
	} {
		s.ports = uint16(i)
		out = append(out, kernelBytes(s.super()))
	}
	for i, p := range (segments{udp: true, size: 64, payload: pattern(64*40, 4), ports: 9}).packets() {
		if i%2 == 0 {
			out = append(out, kernelBytes(withoutSum(p)))
		} else {
			out = append(out, kernelBytes(p, virtio{}))
		}
	}
	for _, p := range (segments{udp: true, size: 1372, payload: pattern(1372*4, 5), ports: 10}).packets() {
		out = append(out, kernelBytes(withoutSum(p)))
	}
	return out
}

// Reading, packing, unpacking, checking and writing allocate nothing.
func TestTunnelAllocatesNothing(t *testing.T) {
	l := newLoop(t, levelWhole, mixture()...)
	if n := testing.AllocsPerRun(50, func() { l.round(t) }); n != 0 {
		t.Errorf("%v allocations for %d packets", n, len(l.offered))
	}
	if l.far.dropped.forged.Load()+l.far.dropped.broken.Load() > 0 {
		t.Error("something was dropped")
	}
}

func benchmarkLoop(b *testing.B, level int, offered ...[]byte) {
	l := newLoop(b, level, offered...)
	messages := l.round(b)
	b.SetBytes(int64(l.arrived))
	b.ReportAllocs()
	for b.Loop() {
		l.round(b)
	}
	b.ReportMetric(float64(messages), "messages/op")
}

func BenchmarkSuper(b *testing.B) {
	benchmarkLoop(b, levelWhole, kernelBytes(segments{size: 1348, payload: pattern(60000, 1)}.super()))
}

func BenchmarkSmall(b *testing.B) {
	var offered [][]byte
	for _, p := range (segments{udp: true, size: 64, payload: pattern(64*100, 4)}).packets() {
		offered = append(offered, kernelBytes(withoutSum(p)))
	}
	benchmarkLoop(b, levelWhole, offered...)
}
