package natlab

import (
	"fmt"
	"testing"
	"time"
)

// TestLargeMessages has two laptops behind NATs exchange large messages, whose
// fragments are seen in the Internet between them, until one of them switches
// them off.
func TestLargeMessages(t *testing.T) {
	m, a, b := pair(t, Masquerade, FullCone)
	mustDirect(t, a, b)
	var cut [2]func() int
	for i, n := range []*member{a, b} {
		// As long as packets cross the core on their way in.
		cut[i] = m.core.tally(t, "from_"+n.nodeName, fmt.Sprintf(
			"iifname %s ip saddr %s meta l4proto udp @th,64,8 & 0xf0 == 0x80", n.home.port, n.home.WAN()))
	}
	size := int64(runs(16, 128)) << 20
	// A path begins with plain messages and soon carries large ones.
	rises := func() {
		t.Helper()
		before := [2]int{cut[0](), cut[1]()}
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && (cut[0]() == before[0] || cut[1]() == before[1]); {
			transfer(t, a.Host, b.Host, b.addr, size)
			transfer(t, b.Host, a.Host, a.addr, size)
		}
	}
	rises()
	pingFor(t, a, b, time.Second)
	for i, n := range []*member{a, b} {
		if cut[i]() == 0 {
			t.Errorf("%s sent no fragments", n.nodeName)
		}
	}

	for _, step := range []struct {
		args  []string
		large bool
	}{{[]string{"--offloads=-large"}, false}, {nil, false}, {[]string{"--offloads="}, true}} {
		if err := b.up(t.Context(), step.args...); err != nil {
			t.Fatal(err)
		}
		mustDirect(t, a, b)
		// The peer learns it from the record, which comes with the netmap.
		time.Sleep(time.Second)
		before := [2]int{cut[0](), cut[1]()}
		if step.large {
			rises()
		} else {
			transfer(t, a.Host, b.Host, b.addr, size)
			transfer(t, b.Host, a.Host, a.addr, size)
		}
		for i, n := range []*member{a, b} {
			if got := cut[i]() - before[i]; (got > 0) != step.large {
				t.Errorf("%d fragments from %s after up %v, which says large: %v", got, n.nodeName, step.args, step.large)
			}
		}
	}
}
