package natlab

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const killedBar = 3 * time.Second

// TestNodeKilled kills a daemon under traffic and takes it up again: the node
// with the lower WireGuard key, which starts handshakes, and the other.
func TestNodeKilled(t *testing.T) {
	var all figures
	_, low, high := pair(t, Masquerade, Masquerade)
	mustDirect(t, low, high)
	if bytes.Compare(wireGuardKey(t, low), wireGuardKey(t, high)) > 0 {
		low, high = high, low
	}
	for i := range runs(2, 10) {
		killAndUp(t, &all, "lower key killed", low, high, i)
		killAndUp(t, &all, "higher key killed", high, low, i)
	}
	all.report(t)
	all.of("tunnel").atMost(t, killedBar, killedBar)
}

func wireGuardKey(t *testing.T, n *member) []byte {
	t.Helper()
	key, err := wgtypes.ParseKey(n.status(t).Self.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return key[:]
}

// killAndUp kills the victim while its peer pings it, and measures from the
// start of `overlay up` to the first reply.
func killAndUp(t *testing.T, all *figures, cell string, victim, peer *member, run int) {
	t.Helper()
	before := networkState(t, victim.Host)
	ping := startPing(t, peer.Host, victim.addr, slowPing)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	if err := unix.Kill(victim.daemon(t), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Duration(1+3*(run%2)) * time.Second)
	start := ping.now()
	if err := victim.up(t.Context()); err != nil {
		t.Fatal(err)
	}
	back, err := ping.replyAfter(start, directWait)
	if err != nil {
		t.Errorf("%s, run %d: %v", cell, run, err)
	}
	all.add(cell, "tunnel", back-start)
	all.add(cell, whatUp, victim.took)
	ping.stop(t)
	mustDirect(t, victim, peer)
	if diff := cmp.Diff(before, networkState(t, victim.Host)); diff != "" {
		t.Errorf("%s, run %d: what crash and up left (-before +after):\n%s", cell, run, diff)
	}
	if got := programs(t, victim.Host); len(got) != 1 {
		t.Errorf("%s, run %d: overlay processes: %v", cell, run, got)
	}
}

// replyAfter waits for the first reply that comes after a moment of the
// pinger's clock, and returns when it came.
func (p *pinger) replyAfter(after, limit time.Duration) (time.Duration, error) {
	for p.now() < after+limit {
		p.mu.Lock()
		found := time.Duration(0)
		for _, e := range p.echoes {
			if e.ok && e.back > after && (found == 0 || e.back < found) {
				found = e.back
			}
		}
		p.mu.Unlock()
		if found > 0 {
			return found, nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return after + limit, fmt.Errorf("no ping reply from %s within %v", p.to, limit)
}
