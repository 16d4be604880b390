package main

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMachineSeconds(t *testing.T) {
	const text = "cpu  100 1 200 5000 6000 10 20 30 7000 8000\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
	if got, err := machineSeconds([]byte(text)); got != 3.61 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "cpu 1 2\n", "cpu0 1 2 3 4 5 6 7 8 9 10\n", "cpu 1 2 x 4 5 6 7 8 9 10\n"} {
		if got, err := machineSeconds([]byte(text)); err == nil {
			t.Errorf("%q gives %v", text, got)
		}
	}
}

func TestParseStatus(t *testing.T) {
	const text = "Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB\nThreads:\t7\n"
	if got, err := parseStatus(text); got != (process{memory: 1.024, peak: 2.048, threads: 7}) || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{"", "VmRSS:\n", "VmRSS: x kB\n", "VmRSS: 1 kB\nThreads: 7\n"} {
		if got, err := parseStatus(text); err == nil {
			t.Errorf("%q gives %+v", text, got)
		}
	}
}

// TestOwnProcess reads the kernel's own files, not a copy.
func TestOwnProcess(t *testing.T) {
	own, err := processOf(os.Getpid())
	if err != nil || own.memory <= 0 || own.peak < own.memory || own.threads < 1 || own.files < 3 {
		t.Errorf("%+v, %v", own, err)
	}
	sum := uint16(0)
	used, err := (&tunnel{pids: []int{os.Getpid(), os.Getpid()}, server: os.Getpid()}).spend(func() error {
		for start := time.Now(); time.Since(start) < 100*time.Millisecond; {
			sum += checksum([]byte{1, 2, 3, 4})
		}
		return nil
	})
	if err != nil || used.daemons[0] <= 0 || used.sum() < 1.5*used.daemons[0] || used.sum() > 2.5*used.server || used.machine <= 0 {
		t.Errorf("work %+v, %v after %d", used, err, sum)
	}
	space, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := findProcess(space, "no such program"); err == nil {
		t.Errorf("a program that does not run is process %d", pid)
	}
}

func TestQuantile(t *testing.T) {
	p := pings{RoundTrips: []float64{1, 2, 3, 4}, Lost: 1}
	for share, want := range map[float64]float64{0: 1, 0.5: 3, 0.99: 4, 1: 4} {
		if got := p.quantile(share); got != want {
			t.Errorf("quantile %v is %v, not %v", share, got, want)
		}
	}
	if got := p.lostShare(); got != 20 {
		t.Errorf("%v %% lost", got)
	}
	if none := (pings{}); none.quantile(0.5) != 0 || none.lostShare() != 0 {
		t.Error("no pings have figures")
	}
}

func TestEcho(t *testing.T) {
	b := echo(0x1234, 0x5678)
	// Over a message with its checksum in place the sum is zero: RFC 1071.
	if got := checksum(b); got != 0 {
		t.Errorf("checksum leaves %#x", got)
	}
	if _, ok := answered(b, 0x1234); ok {
		t.Error("a request passes as an answer")
	}
	b[0] = echoReply
	if seq, ok := answered(b, 0x1234); seq != 0x5678 || !ok {
		t.Errorf("answer %#x, %v", seq, ok)
	}
	if _, ok := answered(b, 0x4321); ok {
		t.Error("an answer to somebody else passes")
	}
	if _, ok := answered(b[:10], 0x1234); ok {
		t.Error("a short answer passes")
	}
}

func TestPingerCounts(t *testing.T) {
	start := time.Now()
	p := &pinger{}
	for i := range 7 {
		p.sent = append(p.sent, start.Add(time.Duration(i)*time.Second))
		p.trips = append(p.trips, -1)
	}
	p.note(2, p.sent[2].Add(2*time.Millisecond))
	p.note(2, p.sent[2].Add(9*time.Millisecond))
	p.note(0, p.sent[0].Add(3*time.Millisecond))
	p.note(7, start)
	want := pings{RoundTrips: []float64{2, 3}, Lost: 5, Gaps: []float64{1, 3}}
	if diff := cmp.Diff(want, p.outcome()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPingLoopback(t *testing.T) {
	conn, err := net.ListenIP("ip4:icmp", nil)
	if err != nil {
		if os.Geteuid() == 0 {
			t.Fatal("ping as root:", err)
		}
		t.Skip("SKIP: ping needs root:", err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := ping(t.Context(), netip.AddrFrom4([4]byte{127, 0, 0, 1}), pingEvery, 50*time.Millisecond)
	if err != nil || len(got.RoundTrips) == 0 || len(got.RoundTrips)+got.Lost != 10 || len(got.Gaps) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}
