package relay

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bench is a loop run by hand between two stations, the second of which reads
// nothing before it is told to.
type bench struct {
	l      *loop
	a, b   *station
	train  []byte
	stride int
	sink   []byte
}

const (
	benchStride = 1460
	benchCount  = 44
	benchTrains = 8 // that wait at once
)

func newBench(t testing.TB, joined bool) *bench {
	t.Helper()
	w := newSite(t, ServerConfig{FlowRate: 1 << 50, NodeRate: 1 << 50})
	w.s.now = time.Now
	c := listen(t, "udp4", "127.0.0.1:0")
	s, err := openSocket(c)
	if err != nil {
		t.Fatal(err)
	}
	l := &loop{s: w.s, receiver: newReceiver(s), train: newTrain(w.s)}
	a := &station{w.guest(1), t, listen(t, "udp4", "127.0.0.1:0"), addrOf(c)}
	b := &station{w.guest(2), t, listen(t, "udp4", "127.0.0.1:0"), addrOf(c)}
	for _, m := range []*station{a, b} {
		m.cookie = w.s.cookies.make(addrOf(m.conn), w.s.clock())
		m.send(m.admit())
		if n, err := l.receiver.receive(); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		got := l.receiver.arrival(0)
		w.mustPong(m.guest, got.data, got.transport(s))
	}
	w.mustOpen(a.guest, w.active(a.guest), b.guest)
	raw, err := b.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
		if joined {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1)
		}
	}); err != nil {
		t.Fatal(err)
	}
	train := bytes.Repeat(a.datagram(b, "train", benchStride), benchCount)
	return &bench{l: l, a: a, b: b, train: train, stride: benchStride, sink: make([]byte, 1<<16)}
}

// round forwards what waits and returns how long that took.
func (b *bench) round() time.Duration {
	start := time.Now()
	n, err := b.l.receiver.receive()
	if err != nil {
		b.a.t.Fatal(err)
	}
	b.l.train.now = b.l.s.clock()
	for i := range n {
		got := b.l.receiver.arrival(i)
		b.l.take(&got)
	}
	b.l.train.flush()
	return time.Since(start)
}

// drain reads n bytes at the second station.
func (b *bench) drain(n int) {
	for n > 0 {
		got, _, err := b.b.conn.ReadFromUDPAddrPort(b.sink)
		if err != nil {
			b.a.t.Fatal(err)
		}
		n -= got
	}
}

func TestForwardAllocatesNothing(t *testing.T) {
	for _, flat := range []bool{false, true} {
		b := newBench(t, false)
		if flat {
			b.l.receiver.socket.flat.note(b.l.s.clock())
		}
		c := control{b: make([]byte, 0, controlSpace)}
		c.segment(b.stride)
		if n := testing.AllocsPerRun(100, func() {
			if _, _, err := b.a.conn.WriteMsgUDPAddrPort(b.train, c.b, b.a.relay); err != nil {
				t.Fatal(err)
			}
			b.round()
			b.drain(len(b.train))
		}); n != 0 {
			t.Errorf("%v allocations for %d datagrams, one by one %v", n, benchCount, flat)
		}
		st := b.l.s.Stats()
		if st.Datagrams != 101*benchCount || st.Drops != (Drops{}) {
			t.Errorf("%+v", st)
		}
	}
}

// BenchmarkForward measures receiving and sending trains of 44 datagrams of 1,460
// bytes on loopback. Segmenting for a receiver that wants single datagrams is
// part of sending there.
func BenchmarkForward(b *testing.B) {
	for _, c := range []struct {
		name         string
		flat, joined bool
	}{
		{"unsplit", false, true},
		{"unsplit-to-single", false, false},
		{"split", true, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			x := newBench(b, c.joined)
			if c.flat {
				x.l.receiver.socket.flat.until.Store(1 << 62)
			}
			var oob [controlSpace]byte
			segment := control{b: oob[:0]}
			segment.segment(x.stride)
			spent := time.Duration(0)
			b.ReportAllocs()
			for b.Loop() {
				for range benchTrains {
					if _, _, err := x.a.conn.WriteMsgUDPAddrPort(x.train, segment.b, x.a.relay); err != nil {
						b.Fatal(err)
					}
				}
				before := x.l.s.Stats().Datagrams
				for x.l.s.Stats().Datagrams-before < benchTrains*benchCount {
					spent += x.round()
				}
				x.drain(benchTrains * len(x.train))
			}
			b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N*benchTrains*benchCount), "ns/datagram")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkJunk measures what datagrams cost that lead to nothing.
func BenchmarkJunk(b *testing.B) {
	w := newSite(b, ServerConfig{})
	l := &loop{s: w.s, receiver: &receiver{}, train: newTrain(w.s)}
	at := place("192.0.2.1:1000")
	stranger := w.stranger(1)
	for name, junk := range map[string][]byte{
		"flow":  append([]byte{FlowByte}, make([]byte, 63)...),
		"hello": stranger.hello(),
		"admit": stranger.admit(),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				l.take(&arrival{data: junk, stride: len(junk), name: &at.name})
				l.train.count, l.train.used = 0, 0
			}
		})
	}
}
