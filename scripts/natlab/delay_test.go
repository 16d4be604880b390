package natlab

import (
	"context"
	"io"
	"regexp"
	"strconv"
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
