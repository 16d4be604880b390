package server

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch/relay"
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

// BenchmarkIdleStream reports what one idle stream, its TLS included, costs a
// server in a process of its own.
func BenchmarkIdleStream(b *testing.B) {
	const streams = 300
	c := startChild(b, b.TempDir())
	o, nodes := c.members(b, streams)
	for b.Loop() {
		before := c.resident(b)
		var wg sync.WaitGroup
		var open []*events
		for _, n := range nodes {
			e, _ := n.follow(b, o.server, "")
			open = append(open, e)
			wg.Go(func() { // takes the deltas about the others
				for err := error(nil); err == nil; {
					_, err = e.Next()
				}
			})
		}
		b.ReportMetric(float64(c.resident(b)-before)/1024/streams, "KiB/stream")
		for _, e := range open {
			_ = e.Close()
		}
		wg.Wait()
	}
}

// members are n of a mesh of the child.
func (c *child) members(b *testing.B, n int) (*owner, []*node) {
	b.Helper()
	invite, err := coord.ParseInvite(c.invite)
	if err != nil {
		b.Fatal(err)
	}
	o := newOwner(b, invite)
	if o.member, err = coord.Join(b.Context(), o.config, nil); err != nil {
		b.Fatal(err)
	}
	i, nodes := o.invite(b, uses(uint16(n))), make([]*node, n)
	for k := range nodes {
		nodes[k] = newNode(b)
		if err := nodes[k].join(b, i, "n"); err != nil {
			b.Fatal(err)
		}
	}
	return o, nodes
}

// BenchmarkIdleRelay reports what one idle TLS client of the relay costs a
// server in a process of its own.
func BenchmarkIdleRelay(b *testing.B) {
	clients := 1000
	if testing.Short() {
		clients = 200
	}
	c := startChild(b, b.TempDir())
	o, nodes := c.members(b, clients)
	w := o.welcomed(b, o.server)
	for b.Loop() {
		before := c.resident(b)
		var open []*link
		for _, n := range nodes {
			l := n.linkTo(b, o.server, w, nil)
			l.until(relay.TLS)
			open = append(open, l)
		}
		b.ReportMetric(float64(c.resident(b)-before)/1024/float64(clients), "KiB/client")
		for _, l := range open {
			l.stop()
		}
	}
}

// resident is the child's memory after it gave back what it does not use.
func (c *child) resident(b *testing.B) int {
	b.Helper()
	if err := c.cmd.Process.Signal(freeMemory); err != nil {
		b.Fatal(err)
	}
	time.Sleep(time.Second)
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", c.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		b.Fatal(err)
	}
	return pages * os.Getpagesize()
}
