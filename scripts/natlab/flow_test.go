package natlab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	transferWait = 60 * time.Second
	iperfGrace   = 20 * time.Second
	iperfTries   = 20
	gigabit      = 1e9
)

// transfer sends size random bytes over TCP to an address of another machine
// and wants the very same bytes to arrive there.
func transfer(t *testing.T, from, to *Host, addr netip.Addr, size int64) {
	t.Helper()
	var l net.Listener
	err := to.inside(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatalf("listen on %s: %v", to.Name(), err)
	}
	defer l.Close()
	var sent, got []byte
	var g errgroup.Group
	g.Go(func() (err error) {
		got, err = receiveAll(l, size)
		return err
	})
	g.Go(func() (err error) {
		if sent, err = sendAll(from, l.Addr().String(), size); err != nil {
			l.Close()
		}
		return err
	})
	if err := g.Wait(); err != nil {
		t.Fatalf("%d bytes from %s to %s: %v", size, from.Name(), to.Name(), err)
	}
	if !bytes.Equal(sent, got) {
		t.Fatalf("%d bytes from %s to %s arrived as others", size, from.Name(), to.Name())
	}
}

// receiveAll takes one connection and gives the hash of what comes.
func receiveAll(l net.Listener, size int64) ([]byte, error) {
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, c)
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes arrived", n)
	}
	return hash.Sum(nil), err
}

// sendAll sends random bytes and gives their hash.
func sendAll(from *Host, to string, size int64) ([]byte, error) {
	var c net.Conn
	err := from.inside(func() (err error) {
		c, err = net.DialTimeout("tcp", to, directWait)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(transferWait)); err != nil {
		return nil, err
	}
	hash := sha256.New()
	noise := io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
	_, err = io.Copy(c, io.TeeReader(noise, hash))
	return hash.Sum(nil), err
}

// iperfSum is what iperf3 says of a whole run.
type iperfSum struct {
	Seconds       float64 `json:"seconds"`
	Bytes         float64 `json:"bytes"`
	BitsPerSecond float64 `json:"bits_per_second"`
	Packets       float64 `json:"packets"`
	LostPackets   float64 `json:"lost_packets"`
}

// iperfResult is what iperf3 -J prints: Sum of UDP, SumReceived of TCP.
type iperfResult struct {
	Error string
	End   struct {
		Sum         iperfSum `json:"sum"`
		SumReceived iperfSum `json:"sum_received"`
	}
}

// delivered is the number of UDP packets that arrived.
func (r iperfResult) delivered() float64 { return r.End.Sum.Packets - r.End.Sum.LostPackets }

// serveIperf runs the other side of iperf on a machine, on one of its addresses.
func serveIperf(t *testing.T, h *Host, addr netip.Addr) {
	t.Helper()
	p, err := h.Start(context.WithoutCancel(t.Context()), nil, "iperf3", "-s", "-B", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
}

// iperf measures towards an address that serveIperf serves.
func iperf(t *testing.T, from *Host, to netip.Addr, d time.Duration, args ...string) iperfResult {
	t.Helper()
	for try := 0; ; try++ {
		r, err := tryIperf(t.Context(), from, to, d, args)
		if err == nil {
			return r
		}
		if try == iperfTries {
			t.Fatalf("iperf3 from %s to %s: %v", from.Name(), to, err)
		}
		time.Sleep(statusPoll) // its other side may only be starting
	}
}

func tryIperf(ctx context.Context, from *Host, to netip.Addr, d time.Duration, args []string) (iperfResult, error) {
	ctx, cancel := context.WithTimeout(ctx, d+iperfGrace)
	defer cancel()
	var r iperfResult
	args = append([]string{"-J", "-c", to.String(), "-t", fmt.Sprint(d.Seconds())}, args...)
	out, err := from.Command(ctx, "iperf3", args...).Output()
	if jsonErr := json.Unmarshal(out, &r); err != nil || jsonErr != nil || r.Error != "" {
		return r, errors.Join(err, jsonErr, errors.New(r.Error))
	}
	return r, nil
}

// tally counts the packets that come into a machine and match a rule of
// nftables, before anything else looks at them; a train that is not cut yet is
// one packet. It returns the number so far.
func (n *node) tally(t *testing.T, name, match string) func() int {
	t.Helper()
	var s script
	s.add("nft -f - <<'RULES'\ntable inet %s {\nchain in {\ntype filter hook prerouting priority raw;\n%s counter\n}\n}\nRULES", name, match)
	if err := n.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return func() int {
		t.Helper()
		text, err := n.command(t.Context(), "nft", "list", "table", "inet", name).Output()
		found := regexp.MustCompile(`counter packets (\d+)`).FindSubmatch(text)
		if err != nil || found == nil {
			t.Fatalf("count %s on %s: %v: %s", name, n.name, err, text)
		}
		return number(t, string(found[1]))
	}
}

// errors adds up counters of the kernel of a machine: InCsumErrors are packets
// with a wrong checksum, RcvbufErrors such that found a socket full.
func (n *node) errors(t *testing.T, name string) (sum int) {
	t.Helper()
	for _, file := range []string{"snmp", "snmp6"} {
		sum += sumErrors(t, n.procNet(t, file), name)
	}
	return sum
}

// procNet reads a file of the machine's /proc/net.
func (n *node) procNet(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", n.pid, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// sumErrors adds up all counters of a name, in /proc/net/snmp, where a line of
// names is followed by one of numbers, or in /proc/net/snmp6, where each name has
// its number beside it.
func sumErrors(t *testing.T, text, name string) (sum int) {
	t.Helper()
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && strings.HasSuffix(f[0], name):
			sum += number(t, f[1])
		case len(names) == len(f) && names[0] == f[0]:
			if i := slices.Index(names, name); i > 0 {
				sum += number(t, f[i])
			}
			names = nil
		default:
			names = f
		}
	}
	return sum
}

func number(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSumErrors(t *testing.T) {
	for text, want := range map[string]int{
		"Ip: Forwarding InReceives\nIp: 1 9\nTcp: OutRsts InCsumErrors\nTcp: 7 2\nUdp: InCsumErrors MemErrors\nUdp: 3 8\n": 5,
		"Ip6InReceives                   \t70\nUdp6InCsumErrors                \t4\nIcmp6InCsumErrors               \t1\n": 5,
	} {
		if got := sumErrors(t, text, "InCsumErrors"); got != want {
			t.Errorf("%d of %q, want %d", got, text, want)
		}
	}
}
