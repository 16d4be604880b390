package natlab

import (
	"context"
	"math"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"
)

// roughPacket is so many bytes of IP.
func roughPacket(size int) string { return strings.Repeat("x", virtioHeader+size) }

// TestBurstsAreAsLongAsTheySay draws the fate of many packets.
func TestBurstsAreAsLongAsTheySay(t *testing.T) {
	const packets = 1_000_000
	for _, line := range []Line{{Loss: 0.001, Burst: 5}, {Loss: 0.02, Burst: 8}, {Loss: 0.12, Burst: 25}, {Loss: 0.25, Burst: 40}, {Loss: 0.25, Burst: 1}} {
		line.Seed = 1
		d := newDelayLine(0, 0)
		d.set(line)
		lost, bursts, last := 0, 0, false
		for range packets {
			now := d.fate() == vanished
			if now {
				lost++
			}
			if now && !last {
				bursts++
			}
			last = now
		}
		share, length := float64(lost)/packets, float64(lost)/float64(bursts)
		want := line.Burst
		if want == 1 { // by chance some follow each other
			want = 1 / (1 - line.Loss)
		}
		t.Logf("%v in bursts of %v: %.4f lost, %.1f in a row", line.Loss, line.Burst, share, length)
		if math.Abs(share/line.Loss-1) > 0.15 || math.Abs(length/want-1) > 0.1 {
			t.Errorf("%v in bursts of %v: %v lost, %v in a row", line.Loss, line.Burst, share, length)
		}
	}
}

// TestLineHasARate sends twice of what may pass.
func TestLineHasARate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, rate, seconds = 1000, 400_000, 10
		line := Line{Delay: 10 * time.Millisecond, Rate: rate, Queue: 200 * time.Millisecond}
		got, longest := 0, time.Duration(0)
		through(t, line, func(in chan<- string, out <-chan string) {
			sent := make(chan time.Time, 2*seconds*rate/8/size)
			go func() {
				for range cap(sent) {
					in <- roughPacket(size)
					time.Sleep(time.Second * size * 8 / rate / 2)
				}
				time.Sleep(time.Second)
				close(sent)
			}()
			start, last := time.Now(), time.Time{}
			for {
				select {
				case <-out:
					got++
					last = time.Now()
				case <-sent:
					passed := float64(got*size*8) / last.Sub(start).Seconds()
					t.Logf("%.0f bit/s of %d pass", passed, rate)
					if math.Abs(passed/rate-1) > 0.02 {
						t.Errorf("%.0f bit/s pass, want %d", passed, rate)
					}
					return
				}
			}
		})
		// One packet behind a full queue.
		through(t, line, func(in chan<- string, out <-chan string) {
			start := time.Now()
			for range 100 {
				in <- roughPacket(size)
			}
			for range rateBucket / size {
				<-out
			}
			if at := time.Since(start); at != line.Delay {
				t.Errorf("the bucket is empty after %v, want %v", at, line.Delay)
			}
			for {
				select {
				case <-out:
					longest = time.Since(start)
				case <-time.After(time.Second):
					if most := line.Delay + line.Queue + line.takes(size); longest > most || longest < most-2*line.takes(size) {
						t.Errorf("a packet waits for %v, want nearly %v", longest, most)
					}
					return
				}
			}
		})
	})
}

// TestLineShakes looks at how long packets stay in a line with jitter, and in
// which order they come.
func TestLineShakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const sent = 2000
		line := Line{Delay: 100 * time.Millisecond, Jitter: 40 * time.Millisecond}
		least, most, sum, swapped := time.Hour, time.Duration(0), time.Duration(0), 0
		through(t, line, func(in chan<- string, out <-chan string) {
			start := time.Now()
			const gap = 5 * time.Millisecond
			go func() {
				for i := range sent {
					in <- strings.Repeat("x", virtioHeader+i)
					time.Sleep(gap)
				}
			}()
			highest := 0
			for range sent {
				number := len(<-out) - virtioHeader
				stayed := time.Since(start) - time.Duration(number)*gap
				least, most, sum = min(least, stayed), max(most, stayed), sum+stayed
				if number < highest {
					swapped++
				}
				highest = max(highest, number)
			}
		})
		t.Logf("%v to %v, on average %v, %d of %d overtaken", least, most, sum/sent, swapped, sent)
		if least < line.Delay-line.Jitter || least > line.Delay-line.Jitter*9/10 ||
			most > line.Delay+line.Jitter || most < line.Delay+line.Jitter*9/10 || (sum/sent-line.Delay).Abs() > line.Jitter/10 {
			t.Errorf("packets stay %v to %v, on average %v", least, most, sum/sent)
		}
		if swapped < sent/4 {
			t.Errorf("%d of %d were overtaken", swapped, sent)
		}
	})
}

// through has a line between two channels until use returns.
func through(t *testing.T, line Line, use func(in chan<- string, out <-chan string)) {
	t.Helper()
	d := newDelayLine(0, 0)
	d.set(line)
	dev := &pipeDevice{in: make(chan string), out: make(chan string, delayPackets)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.run(ctx, dev) }()
	use(dev.in, dev.out)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAccessLine measures what a home on a bad line has of it.
func TestAccessLine(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("it measures a line of the lab's own")
	}
	lab := newLab(t, Options{Delay: time.Millisecond})
	server := mustServer(t, lab, "server")
	bad, good := mustHome(t, lab, "bad", Masquerade), mustHome(t, lab, "good", Masquerade)
	laptop, other := mustLaptop(t, bad, "laptop"), mustLaptop(t, good, "other")
	access := mustAccess(t, lab, bad)
	access.Set(Line{Delay: 40 * time.Millisecond, Rate: 1_000_000, Queue: 100 * time.Millisecond})
	if rtt := fastestPing(t, laptop, server); rtt < 80 || rtt > 100 {
		t.Errorf("round trip of %v ms, want 82", rtt)
	}
	if rtt := fastestPing(t, other, server); rtt > 20 {
		t.Errorf("the other home has a round trip of %v ms", rtt)
	}
	for name, rate := range throughput(t, laptop, server) {
		t.Logf("%s: %.0f bit/s", name, rate)
		if math.Abs(rate/1_000_000-1) > 0.1 {
			t.Errorf("%s: %.0f bit/s pass, want 1000000", name, rate)
		}
	}
	access.Set(Line{Loss: 0.2, Burst: 8, Seed: 4})
	ping := startPing(t, laptop, server.Addr(), 2*time.Millisecond)
	time.Sleep(5 * time.Second)
	echoes := ping.stop(t)
	share := lostShare(t, echoes)
	t.Logf("%.3f of %d pings lost", share, len(echoes))
	if want := 1 - 0.8*0.8; math.Abs(share-want) > 0.1 {
		t.Errorf("%.3f of %d pings lost, want %.2f", share, len(echoes), want)
	}
}

// throughput is how many bits of IP pass between a laptop and a server in a second
// when three times a million are sent, up and down.
func throughput(t *testing.T, laptop, server *Host) map[string]float64 {
	t.Helper()
	listen := func(h *Host) (c *net.UDPConn) {
		err := h.inside(func() (err error) {
			c, err = net.ListenUDP("udp4", nil)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	inner, outer := listen(laptop), listen(server)
	to := netip.AddrPortFrom(server.Addr(), outer.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	up := overload(t, inner, outer, func() netip.AddrPort { return to })
	return map[string]float64{"up": up.rate, "down": overload(t, outer, inner, func() netip.AddrPort { return up.from }).rate}
}

type passed struct {
	rate float64
	from netip.AddrPort
}

// overload sends for four seconds and looks at the last three.
func overload(t *testing.T, from, to *net.UDPConn, where func() netip.AddrPort) (p passed) {
	t.Helper()
	const size, length, skip = 1000, 4 * time.Second, time.Second
	var g errgroup.Group
	start := time.Now()
	g.Go(func() error {
		for n := 0; time.Since(start) < length; n++ {
			if _, err := from.WriteToUDPAddrPort(make([]byte, size), where()); err != nil {
				return err
			}
			time.Sleep(time.Until(start.Add(time.Duration(n) * size * 8 * time.Second / 3_000_000)))
		}
		return nil
	})
	if err := to.SetReadDeadline(start.Add(length)); err != nil {
		t.Fatal(err)
	}
	b, count, first, last := make([]byte, 2*size), 0, time.Duration(0), time.Duration(0)
	for {
		_, source, err := to.ReadFromUDPAddrPort(b)
		if err != nil {
			break
		}
		p.from = source
		switch at := time.Since(start); {
		case at < skip:
		case count == 0 && first == 0:
			first = at
		default:
			count++
			last = at
		}
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if count < 2 {
		t.Fatalf("%d datagrams arrived from %v: that is no rate", count, from.LocalAddr())
	}
	p.rate = float64(count*(size+ipHeader+udpHeader)*8) / (last - first).Seconds()
	return p
}

// mustAccess puts a home on a line that is good so far.
func mustAccess(t *testing.T, l *Lab, h *Home) *AccessLine {
	t.Helper()
	a, err := l.StartAccess(t.Context(), h, Line{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}
