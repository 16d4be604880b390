package tun

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"
)

// countReports checks that messages are containers of one report each to keyB.
func countReports(t *testing.T, messages [][]byte) {
	t.Helper()
	for _, m := range messages {
		kinds, _, ok := walk(m)
		_, dst := innerAddrs(m)
		if !ok || !contained(m) || len(kinds) != 1 || kinds[0] != recordReport || dst != innerB {
			t.Fatalf("no report: % x", m)
		}
	}
}

// Read waits, the Bind says that a report is due, and a message leaves that
// moves the far side's level.
func TestReportLeaves(t *testing.T) {
	n, _ := largeTunnel(t, everything)
	far, g := largeTunnel(t, everything)
	p := n.peers.byKey(keyB)
	p.meter.received, p.meter.missing = 7, 3
	got := make(chan [][]byte)
	go func() { got <- read(t, n, buffers()) }()
	time.Sleep(10 * time.Millisecond) // usually Read waits by then; it must not matter
	n.wakeReport(p)
	messages := <-got
	countReports(t, messages)
	a := far.peers.byKey(keyA)
	before := a.level.track
	deliver(t, far, messages)
	if packets, _ := g.drain(t, true); len(packets) > 0 {
		t.Error("a report reached the kernel")
	}
	if a.level.track == before || a.received.Load() != 0 {
		t.Errorf("the level heard of it: %v, packets counted: %d", a.level.track != before, a.received.Load())
	}
	if _, pieces, _ := walk(messages[0]); be16(pieces[0].data[2:]) != 7 || be16(pieces[0].data[reportMissing+2:]) != 3 {
		t.Errorf("counters % x", pieces[0].data)
	}
}

// However wake-ups and packets meet, every report leaves, and Read goes on.
func TestNoReportIsLost(t *testing.T) {
	n, f := largeTunnel(t, everything)
	p := n.peers.byKey(keyB)
	small := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	done := make(chan struct{})
	defer close(done)
	messages := make(chan []byte)
	go func() {
		for bufs, sizes := buffers(), make([]int, batchSize); ; {
			count, err := n.Read(bufs, sizes, testOffset)
			if err != nil {
				return
			}
			for i := range count {
				if sizes[i] == 0 {
					continue
				}
				n.bind.out.settle(&p.out, 1)
				select {
				case messages <- append([]byte(nil), bufs[i][testOffset:testOffset+sizes[i]]...):
				case <-done:
					return
				}
			}
		}
	}()
	for i := range 2000 {
		if i%3 == 0 {
			f.put(t, virtio{}, small)
		}
		n.wakeReport(p)
		for packet, report := i%3 == 0, true; packet || report; {
			select {
			case m := <-messages:
				if contained(m) {
					report = false
				} else {
					packet = false
				}
			case <-time.After(5 * time.Second):
				t.Fatalf("round %d: packet missing %v, report missing %v", i, packet, report)
			}
		}
	}
}

// Reports that wait are few, one per peer; those that fit into no buffer now
// come with the next call.
func TestReportsAreBounded(t *testing.T) {
	n, _ := largeTunnel(t, everything)
	var list []Peer
	for i := range maxReports + 10 {
		list = append(list, Peer{
			Key: Key{9, byte(i)}, Capabilities: Large,
			AllowedIPs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, 9, byte(i)}), 32)},
		})
	}
	n.peers.set(list)
	for i, p := range list {
		n.peers.path(p.Key, netip.AddrPortFrom(innerA, uint16(i+1)), 0)
		n.wakeReport(n.peers.byKey(p.Key))
		n.wakeReport(n.peers.byKey(p.Key))
	}
	total := 0
	for bufs := buffers(); total < maxReports; {
		total += len(read(t, n, bufs))
	}
	if total != maxReports || n.reports.waiting() {
		t.Errorf("%d reports, more waiting: %v", total, n.reports.waiting())
	}
}

// Nothing is told to who does not understand it or cannot be reached.
func TestReportsGoToCapablePeers(t *testing.T) {
	n, f := largeTunnel(t, everything)
	n.peers.byKey(keyA).large.Store(false)
	n.peers.byKey(keyB).pathed.Store(false)
	n.wakeReport(n.peers.byKey(keyA))
	n.wakeReport(n.peers.byKey(keyB))
	small := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()
	f.put(t, virtio{}, small[0])
	mustEqual(t, read(t, n, buffers()), small)
}

// A container that leaves anyway carries a report that is due.
func TestReportRides(t *testing.T) {
	n, f := largeTunnel(t, everything)
	n.bind.base = n.bind.base.Add(-time.Hour) // or the first report is not due yet
	p := n.peers.byKey(keyB)
	setLevel(n, levelWhole)
	counters := make([]uint64, reportLeast)
	for i := range counters {
		counters[i] = uint64(i)
	}
	p.meter.note(1, counters, 0)
	s := segments{size: 1000, payload: pattern(9000, 1)}
	for range 2 {
		super, h := s.super()
		f.put(t, h, super)
	}
	messages := readAll(t, n, f)
	if len(messages) != 2 {
		t.Fatalf("%d messages", len(messages))
	}
	for i, want := range []string{"\x02\x40", "\x02"} {
		if kinds, _, ok := walk(messages[i]); !ok || string(kinds) != want {
			t.Errorf("message %d: kinds %x, valid %v", i, kinds, ok)
		}
	}
}

// Close ends Read whatever wakes it meanwhile.
func TestCloseAgainstReports(t *testing.T) {
	for range 20 {
		n, _ := largeTunnel(t, everything)
		p := n.peers.byKey(keyB)
		ended := make(chan error, 1)
		go func() {
			bufs, sizes := buffers(), make([]int, batchSize)
			for {
				if _, err := n.Read(bufs, sizes, testOffset); err != nil {
					ended <- err
					return
				}
				n.bind.out.settle(&p.out, 1)
			}
		}()
		stop := make(chan struct{})
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
					n.wakeReport(p)
				}
			}
		}()
		time.Sleep(time.Millisecond)
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Fatal(err)
		}
		close(stop)
		<-stopped
	}
}
