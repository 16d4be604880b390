package main

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestProcessSeconds(t *testing.T) {
	const text = "42 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 150 75 0 0 20 0 9 0 1 2 3"
	if got, err := processSeconds([]byte(text)); got != 2.25 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "42 (a) S 1", "42 (a) S 1 2 3 4 5 6 7 8 9 10 x 75 0"} {
		if got, err := processSeconds([]byte(text)); err == nil {
			t.Errorf("%q gives %v", text, got)
		}
	}
}

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

func TestResidentMegabytes(t *testing.T) {
	if got, err := residentMegabytes("Name:\tx\nVmRSS:\t    1000 kB\n"); got != 1.024 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "VmRSS:\n", "VmRSS: x kB\n"} {
		if got, err := residentMegabytes(text); err == nil {
			t.Errorf("%q gives %v", text, got)
		}
	}
}

// TestOwnProcess reads the kernel's own files, not a copy.
func TestOwnProcess(t *testing.T) {
	own := [2]int{os.Getpid(), os.Getpid()}
	memory, err := memoryOf(own)
	if err != nil || memory[0] <= 0 {
		t.Errorf("memory %v, %v", memory, err)
	}
	before, err := workOf(own)
	if err != nil {
		t.Fatal(err)
	}
	sum := uint16(0)
	for start := time.Now(); time.Since(start) < 100*time.Millisecond; {
		sum += checksum([]byte{1, 2, 3, 4})
	}
	after, err := workOf(own)
	if used := after.since(before); err != nil || used.daemons <= 0 || used.machine <= 0 {
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
	p := &pinger{
		sent:  []time.Time{start, start, start},
		trips: []time.Duration{-1, -1, -1},
	}
	p.note(2, start.Add(2*time.Millisecond))
	p.note(2, start.Add(9*time.Millisecond))
	p.note(0, start.Add(3*time.Millisecond))
	p.note(3, start.Add(time.Millisecond))
	want := pings{RoundTrips: []float64{2, 3}, Lost: 1}
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
	got, err := ping(t.Context(), netip.AddrFrom4([4]byte{127, 0, 0, 1}), 50*time.Millisecond)
	if err != nil || len(got.RoundTrips) == 0 || len(got.RoundTrips)+got.Lost != 10 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestResults(t *testing.T) {
	r := &results{Pairs: 3, Seconds: 10, MTU: 1400, Tunnels: []*figures{
		{Name: "one", Samples: []sample{{tcp1: 4}, {tcp1: 9}, {tcp1: 2}}, MemoryAfter: [2]float64{10, 20.4}},
		{Name: "two", Samples: []sample{{tcp1: 2}, {tcp1: 3}, {tcp1: 1}}},
	}}
	r.complete()
	if one, two := r.Tunnels[0].Medians[tcp1], r.Tunnels[1].Medians[tcp1]; one != 4 || two != 2 {
		t.Errorf("medians %v and %v", one, two)
	}
	if got := r.Ratios[tcp1]; got != 2 {
		t.Errorf("ratio %v", got)
	}
	if _, ok := r.Ratios[flood]; ok {
		t.Error("nothing through nothing has a ratio")
	}
	var out strings.Builder
	if err := r.table(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"medians of 3 interleaved pairs", "4.00         2.00     2.00\n", "10/20"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, &out)
		}
	}
}

func TestMedian(t *testing.T) {
	all := []float64{3, 1, 2, 10}
	if got := median(all); got != 2.5 || all[0] != 3 {
		t.Errorf("%v of %v", got, all)
	}
	if got := median(nil); got != 0 {
		t.Errorf("median of nothing is %v", got)
	}
}
