package natlab

import (
	"context"
	"encoding/binary"
	"io"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pipeDevice is a TUN device in memory: what is put into in is read, what is
// written comes out of out.
type pipeDevice struct {
	in     chan string
	out    chan string
	closed atomic.Bool
}

func (d *pipeDevice) Read(p []byte) (int, error) {
	s, ok := <-d.in
	if !ok {
		return 0, io.EOF
	}
	return copy(p, s), nil
}

func (d *pipeDevice) Write(p []byte) (int, error) {
	d.out <- string(p)
	return len(p), nil
}

func (d *pipeDevice) Close() error {
	if d.closed.CompareAndSwap(false, true) {
		close(d.in)
	}
	return nil
}

func TestDelayLineHoldsAndKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		dev := &pipeDevice{in: make(chan string), out: make(chan string, 8)}
		done := make(chan error)
		go func() { done <- newDelayLine(20*time.Millisecond, 0).run(ctx, dev) }()
		start := time.Now()
		dev.in <- "first"
		time.Sleep(5 * time.Millisecond)
		dev.in <- "second"
		for _, want := range []struct {
			text string
			at   time.Duration
		}{{"first", 20 * time.Millisecond}, {"second", 25 * time.Millisecond}} {
			got := <-dev.out
			if at := time.Since(start); got != want.text || at != want.at {
				t.Errorf("got %q after %v, want %q after %v", got, at, want.text, want.at)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestDelayLineLoses(t *testing.T) {
	const sent = 2000
	synctest.Test(t, func(t *testing.T) {
		dev := &pipeDevice{in: make(chan string), out: make(chan string, sent)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- newDelayLine(time.Millisecond, 0.25).run(ctx, dev) }()
		for range sent {
			dev.in <- "x"
		}
		cancel()
		<-done
		if got := float64(len(dev.out)) / sent; got < 0.65 || got > 0.85 {
			t.Errorf("%v of the packets arrived, want about 0.75", got)
		}
	})
}

func TestDelayLineReorders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		dev := &pipeDevice{in: make(chan string), out: make(chan string, 8)}
		line := newDelayLine(0, 0)
		line.set(Line{Delay: 10 * time.Millisecond, Reorder: 1, Late: 3 * time.Millisecond})
		done := make(chan error)
		go func() { done <- line.run(ctx, dev) }()
		dev.in <- "late"
		synctest.Wait()
		line.set(Line{Delay: 10 * time.Millisecond})
		dev.in <- "in time"
		for _, want := range []string{"in time", "late"} {
			if got := <-dev.out; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// testTrain is a train of the given payload, as the kernel gives it.
func testTrain(payload string, segment int) []byte {
	const ip = minIPv4Header
	p := make([]byte, virtioHeader+ip+udpHeader, 200)
	p[0], p[virtioKind] = 1, virtioKindUDP
	binary.LittleEndian.PutUint16(p[virtioSegment:], uint16(segment))
	binary.LittleEndian.PutUint16(p[virtioSum:], ip)
	p = append(p, payload...)
	h := p[virtioHeader:]
	h[0], h[9] = 0x45, 17
	binary.BigEndian.PutUint16(h[ipLength:], uint16(len(h)))
	copy(h[12:], []byte{198, 51, 100, 1, 203, 0, 113, 2})
	binary.BigEndian.PutUint16(h[ip+udpLength:], uint16(len(h)-ip))
	binary.BigEndian.PutUint16(h[ip+udpSum:], pseudoSum(h))
	return p
}

// pseudoSum is that of the pseudo header, RFC 768.
func pseudoSum(ip []byte) uint16 {
	sum := uint32(ip[9]) + uint32(len(ip)-minIPv4Header)
	for i := 12; i < minIPv4Header; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	return fold(sum)
}

// checkPiece wants a packet that the kernel takes, with this payload.
func checkPiece(t *testing.T, p []byte, payload string, segment int) {
	t.Helper()
	ip := p[virtioHeader:]
	if got := string(ip[minIPv4Header+udpHeader:]); got != payload {
		t.Errorf("payload %q, want %q", got, payload)
	}
	if n := int(binary.BigEndian.Uint16(ip[ipLength:])); n != len(ip) {
		t.Errorf("IP length %d of %d bytes", n, len(ip))
	}
	if n := int(binary.BigEndian.Uint16(ip[minIPv4Header+udpLength:])); n != len(ip)-minIPv4Header {
		t.Errorf("UDP length %d in an IP packet of %d bytes", n, len(ip))
	}
	if got, want := binary.BigEndian.Uint16(ip[minIPv4Header+udpSum:]), pseudoSum(ip); got != want {
		t.Errorf("pseudo checksum %#x, want %#x", got, want)
	}
	sum := uint32(0)
	for i := 0; i < minIPv4Header; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	if fold(sum) != 0xffff {
		t.Errorf("IP checksum leaves %#x", fold(sum))
	}
	kind := byte(virtioKindUDP)
	if segment == 0 {
		kind = 0
	}
	if p[virtioKind] != kind || int(binary.LittleEndian.Uint16(p[virtioSegment:])) != segment {
		t.Errorf("virtio header % x, want kind %d, segment %d", p[:virtioHeader], kind, segment)
	}
}

func TestTrainCut(t *testing.T) {
	tr, ok := trainOf(testTrain("aaaabbbbccccdd", 4))
	if !ok || tr.datagrams() != 4 {
		t.Fatalf("%+v, %v", tr, ok)
	}
	checkPiece(t, tr.cut(0, 2), "aaaabbbb", 4)
	checkPiece(t, tr.cut(2, 3), "cccc", 0)
	checkPiece(t, tr.cut(2, 4), "ccccdd", 4)
	checkPiece(t, tr.cut(3, 4), "dd", 0)
	for name, p := range map[string][]byte{
		"nothing":    nil,
		"no payload": testTrain("", 4),
		"no segment": testTrain("aaaa", 0),
		"too short":  testTrain("aaaa", 4)[:25],
		"other kind": append([]byte{1, 0}, testTrain("aaaa", 4)[2:]...),
	} {
		if _, ok := trainOf(p); ok {
			t.Errorf("%s passes as a train", name)
		}
	}
}

// TestDelayLineLosesDatagrams has a train lose some of its datagrams, some
// come late, and wants every one of the others exactly once and in order.
func TestDelayLineLosesDatagrams(t *testing.T) {
	const count = 26
	var payload strings.Builder
	for i := range count {
		payload.WriteString(strings.Repeat(string(rune('a'+i)), 4))
	}
	line := newDelayLine(0, 0)
	line.set(Line{Loss: 0.2, Reorder: 0.2, Seed: 3})
	line.pass(testTrain(payload.String(), 4))
	seen := map[string]bool{}
	for _, queue := range []chan heldPacket{line.queue, line.late} {
		close(queue)
		last := ""
		for p := range queue {
			ip := p.data[virtioHeader:]
			text := string(ip[minIPv4Header+udpHeader:])
			if len(text) == 4 {
				checkPiece(t, p.data, text, 0)
			} else {
				checkPiece(t, p.data, text, 4)
			}
			for i := 0; i < len(text); i += 4 {
				datagram := text[i : i+4]
				if seen[datagram] || datagram <= last || strings.Trim(datagram, datagram[:1]) != "" {
					t.Errorf("%q after %q", datagram, last)
				}
				seen[datagram], last = true, datagram
			}
		}
	}
	if len(seen) < count/2 || len(seen) == count {
		t.Errorf("%d of %d datagrams arrived, want about 0.8", len(seen), count)
	}
}

// TestStartLine slows a lab down, then loses everything in it.
func TestStartLine(t *testing.T) {
	lab := newLab(t, Options{Delay: -1})
	a, b := mustServer(t, lab, "a"), mustServer(t, lab, "b")
	line, err := lab.StartLine(t.Context(), Line{Delay: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := line.Close(); err != nil {
			t.Error(err)
		}
	}()
	if got := fastestPing(t, a, b); got < 20 || got > 30 {
		t.Errorf("round trip %v ms, want 20 to 30", got)
	}
	line.Set(Line{Loss: 1})
	if err := a.Command(t.Context(), "ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", b.Addr().String()).Run(); err == nil {
		t.Error("a line that loses everything lets a ping through")
	}
}

func TestRoundTrips(t *testing.T) {
	lab := newLab(t, Options{})
	server := mustServer(t, lab, "server")
	one := mustHome(t, lab, "one", Masquerade)
	two := mustHome(t, lab, "two", Public)
	a, neighbour := mustLaptop(t, one, "a"), mustLaptop(t, one, "neighbour")
	b := mustLaptop(t, two, "b")
	for _, c := range []struct {
		name     string
		to       *Host
		min, max float64
	}{
		{"laptop to server", server, 40, 55},
		{"laptop to laptop", b, 40, 55},
		{"within a LAN", neighbour, 0, 20},
	} {
		got := fastestPing(t, a, c.to)
		t.Logf("%s: %.2f ms", c.name, got)
		if got < c.min || got > c.max {
			t.Errorf("%s: %v ms, want %v to %v", c.name, got, c.min, c.max)
		}
	}
}

func TestWithoutDelayLine(t *testing.T) {
	lab := newLab(t, Options{Delay: -1})
	server := mustServer(t, lab, "server")
	laptop := mustLaptop(t, mustHome(t, lab, "home", Masquerade), "laptop")
	if got := fastestPing(t, laptop, server); got > 20 {
		t.Errorf("without delay the round trip is %v ms", got)
	}
}

// fastestPing is the least of some round-trip times, in milliseconds.
func fastestPing(t *testing.T, from, to *Host) float64 {
	t.Helper()
	out := output(t, from, "ping", "-n", "-c", "8", "-i", "0.1", to.Addr().String())
	m := regexp.MustCompile(`rtt min/avg/max/mdev = ([0-9.]+)/`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("ping says %q", out)
	}
	ms, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return ms
}
