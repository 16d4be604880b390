package punch

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestProbeable(t *testing.T) {
	for addr, want := range map[string]bool{
		"203.0.113.1:1":              true,
		"192.168.1.1:1":              true,
		"[2001:db8::1]:1":            true,
		"[fe80::1%eth0]:1":           true,
		"203.0.113.1:0":              false,
		"0.0.0.0:1":                  false,
		"0.1.2.3:1":                  false,
		"127.0.0.1:1":                false,
		"127.9.9.9:1":                false,
		"224.0.0.1:1":                false,
		"240.0.0.1:1":                false,
		"255.255.255.255:1":          false,
		"169.254.1.1:1":              false,
		"[::]:1":                     false,
		"[::1]:1":                    false,
		"[ff02::1]:1":                false,
		"[fe80::1]:1":                false,
		"[::ffff:203.0.113.1]:1":     false,
		"[::ffff:127.0.0.1]:1":       false,
		"[::ffff:255.255.255.255]:1": false,
	} {
		if got := probeable(netip.MustParseAddrPort(addr)); got != want {
			t.Errorf("probeable(%s) = %v", addr, got)
		}
	}
	if probeable(netip.AddrPort{}) {
		t.Error("the zero address is probeable")
	}
}

func TestPrivate(t *testing.T) {
	for addr, want := range map[string]bool{
		"10.0.0.1": true, "172.31.0.1": true, "192.168.0.1": true, "fd00::1": true,
		"100.64.0.1": true, "100.127.255.255": true, "100.128.0.1": false, "100.63.0.1": false,
		"203.0.113.1": false, "2001:db8::1": false,
	} {
		if got := Private(netip.MustParseAddr(addr)); got != want {
			t.Errorf("Private(%s) = %v", addr, got)
		}
	}
}

func TestRouted(t *testing.T) {
	for addr, want := range map[string]bool{
		"203.0.113.1": true, "2001:db8::1": true, "192.168.1.1": false, "fd00::1": false, "100.64.0.1": false,
		"fe80::1": false, "127.0.0.1": false, "224.0.0.1": false, "0.0.0.0": false, "::": false,
	} {
		if got := Routed(netip.MustParseAddr(addr)); got != want {
			t.Errorf("Routed(%s) = %v", addr, got)
		}
	}
}

func TestBroadcast(t *testing.T) {
	for _, test := range []struct {
		prefix, addr string
		want         bool
	}{
		{"192.168.1.2/24", "192.168.1.255", true},
		{"192.168.1.2/24", "192.168.1.254", false},
		{"192.168.1.2/24", "192.168.2.255", false},
		{"10.1.2.3/13", "10.7.255.255", true},
		{"10.1.2.3/13", "10.1.255.255", false},
		{"192.0.2.0/31", "192.0.2.1", false},
		{"192.0.2.1/32", "192.0.2.1", false},
		{"2001:db8::1/64", "2001:db8::ffff:ffff:ffff:ffff", false},
	} {
		if got := broadcast(netip.MustParsePrefix(test.prefix), netip.MustParseAddr(test.addr)); got != test.want {
			t.Errorf("broadcast(%s, %s) = %v", test.prefix, test.addr, got)
		}
	}
}

// TestWindow holds the replay window against a plain set.
func TestWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w window
		seen := map[uint64]bool{}
		top := uint64(0)
		counter := rapid.Uint64Range(1, 3*replayWindow)
		for range rapid.IntRange(1, 200).Draw(t, "messages") {
			c := counter.Draw(t, "counter")
			want := !seen[c] && c+replayWindow > top
			if got := w.accept(c); got != want {
				t.Fatalf("accept(%d) = %v with top %d", c, got, top)
			}
			seen[c] = true
			top = max(top, c)
		}
	})
	var w window
	if w.accept(0) || !w.accept(1<<63) || w.accept(1<<64-1) && w.accept(5) {
		t.Error("extreme counters are handled wrongly")
	}
}

func TestReplayOverRestarts(t *testing.T) {
	now := time.Now()
	var r replay
	step := func(what string, boot, counter uint64, want bool) {
		t.Helper()
		if got, _ := r.accept(boot, counter, now); got != want {
			t.Errorf("%s: accept(%d, %d) = %v", what, boot, counter, got)
		}
	}
	step("first", 100, 1, true)
	step("repeated", 100, 1, false)
	step("restart", 200, 1, true)
	step("old boot while the new one lives", 100, 2, false)
	now = now.Add(consentExpiry)
	step("clock set back", 100, 2, true)
	step("repeated", 100, 2, false)
	step("even older", 50, 1, false)
	step("the later boot again", 200, 2, true)
	step("its old message", 200, 1, false)
	if _, restarted := r.accept(300, 1, now); !restarted {
		t.Error("a new boot id is not a restart")
	}
	if fresh, _ := r.inOrder(300, 5, now); !fresh {
		t.Error("a later message is stale")
	}
	if fresh, _ := r.inOrder(300, 4, now); fresh {
		t.Error("an overtaken message counts where only the latest does")
	}
}

// TestBucket wants at most rate events in any second, and about half of that
// for ever.
func TestBucket(t *testing.T) {
	var b bucket
	var passed []time.Time
	now := time.Now()
	rng := rand.New(rand.NewPCG(1, 2))
	const span = 60 * time.Second
	for end := now.Add(span); now.Before(end); now = now.Add(time.Duration(rng.Int64N(int64(10 * time.Millisecond)))) {
		if !b.take(now, pairRate) {
			continue
		}
		passed = append(passed, now)
		if n := len(passed); n > pairRate && now.Sub(passed[n-1-pairRate]) < time.Second {
			t.Fatalf("%d packets in less than a second", pairRate+1)
		}
	}
	if least := int(span.Seconds()) * pairRate / 2; len(passed) < least {
		t.Errorf("%d packets in %v, want %d", len(passed), span, least)
	}
	if wait := b.wait(pairRate); !b.take(now.Add(wait+time.Millisecond), pairRate) {
		t.Errorf("nothing to take after wait() = %v", wait)
	}
}
