package nattest_test

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

// TestChangeIsNoticed gives a router another address while a laptop behind it
// talks to a peer that takes strangers, so that data never stops one way. The
// laptop knows its new address within 5 s, from what the peer answers.
func TestChangeIsNoticed(t *testing.T) {
	const bar = 5 * time.Second
	for _, k := range kinds() {
		if k.nat == nil || k.ipv6 {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := nattest.NewWorld(5, homeLink())
				defer w.Stop()
				a, router := laptop(w, 0, k, homeLink(), "192.168.1.2/24")
				b, _ := laptop(w, 1, kinds()[0], homeLink(), "192.168.2.2/24")
				connect(t, a, b)
				defer talk(a, b)()
				to := netip.MustParseAddr("203.0.113.88")
				router.SetWAN(to)
				begin := time.Now()
				seen := func(c punch.Candidate) bool { return c.Addr.Addr() == to }
				for !slices.ContainsFunc(a.Agent().Candidates(), seen) {
					if time.Since(begin) > bar+time.Second {
						t.Fatalf("not noticed within %v", time.Since(begin))
					}
					time.Sleep(10 * time.Millisecond)
				}
				if took := time.Since(begin); took > bar {
					t.Errorf("noticed after %v", took)
				}
				expectNoFaults(t, w)
			})
		})
	}
}
