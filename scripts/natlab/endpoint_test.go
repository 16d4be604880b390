package natlab

import (
	"fmt"
	"regexp"
	"testing"
	"time"
)

// strayPort is where a peer's packets seem to come from, all of a sudden.
const strayPort = 4444

// strayRules rewrite the source port of WireGuard's data messages (type 4) on
// their way out of a router, behind its NAT, and of nothing else.
const strayRules = `nft -f - <<'RULES'
table ip stray {
	chain out { type filter hook postrouting priority 300; oifname "wan" ip daddr %s udp dport %d @th,64,32 0x04000000 counter udp sport set %d; }
}
RULES`

// TestStrayPacketsMoveNothing has authentic packets of a peer come from
// another address: they are taken in, and the endpoint stays what it was.
func TestStrayPacketsMoveNothing(t *testing.T) {
	_, a, b := pair(t, FullCone, Masquerade)
	mustDirect(t, a, b)
	// The first paths may still be replaced by better ones.
	time.Sleep(time.Second)
	before, at := endpointOf(t, a, b), endpointOf(t, b, a)
	var s script
	s.add(strayRules, at.Addr(), at.Port(), strayPort)
	if err := b.home.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	pingFor(t, a, b, 3*time.Second)
	pingFor(t, b, a, 3*time.Second)
	rules := outputOf(t, b.home, "nft", "list", "table", "ip", "stray")
	if m := regexp.MustCompile(`counter packets (\d+)`).FindStringSubmatch(rules); m == nil || len(m[1]) < 2 {
		t.Fatalf("hardly a packet was sent from the other port:\n%s", rules)
	}
	checkEndpoint(t, a, b)
	if after := endpointOf(t, a, b); after != before {
		t.Errorf("endpoint of b moved from %s to %s", before, after)
	}
}

// outputOf runs a program on a router.
func outputOf(t *testing.T, h *Home, name string, args ...string) string {
	t.Helper()
	out, err := h.command(t.Context(), name, args...).Output()
	if err != nil {
		t.Fatal(fmt.Errorf("%s on %s: %w", name, h.name, err))
	}
	return string(out)
}
