package server

import (
	"io"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"

	"overlay/coord"
	"overlay/coord/trust"
)

// sink is a connection that takes everything and says nothing.
type sink struct {
	net.Conn
	end chan struct{}
}

func (s *sink) Read([]byte) (int, error)    { <-s.end; return 0, io.EOF }
func (s *sink) Write(b []byte) (int, error) { return len(b), nil }
func (s *sink) Close() error                { return nil }

// BenchmarkFanOut is one change told to 1,000 streams: encoded once, whatever
// their number.
func BenchmarkFanOut(b *testing.B) {
	const subscribers = 1000
	h := bareHub(b)
	end := make(chan struct{})
	defer close(end)
	var last trust.Key
	for i := range subscribers {
		last = trust.Key{byte(i), byte(i >> 8)}
		near, far := net.Pipe()
		_ = far
		h.addMember(last)
		h.attach(&stream{device: last, conn: &sink{near, end}}, coord.Welcome{}, "")
	}
	h.flush()
	b.ReportAllocs()
	for b.Loop() {
		h.mu.Lock()
		h.touch(h.members[last])
		h.mu.Unlock()
		h.flush()
	}
}

// BenchmarkIdleStream reports what one idle stream holds, its TLS included: the
// server's half and, because it is one process, the client's.
func BenchmarkIdleStream(b *testing.B) {
	const streams = 200
	s := start(b, b.TempDir())
	o := found(b, s)
	nodes := make([]*node, streams)
	i := o.invite(b, uses(streams))
	for k := range nodes {
		nodes[k] = newNode(b)
		if err := nodes[k].join(b, i, "n"); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		before := held()
		var open []io.Closer
		for _, n := range nodes {
			e, _ := n.follow(b, o.server, "")
			open = append(open, e)
		}
		b.ReportMetric(float64(held()-before)/1024/streams, "KiB/stream-pair")
		var wg sync.WaitGroup
		for _, c := range open {
			wg.Go(func() { _ = c.Close() })
		}
		wg.Wait()
	}
}

func held() uint64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
