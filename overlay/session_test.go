package overlay

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/tun"
)

// Drops are told once.
func TestLogDrops(t *testing.T) {
	var text strings.Builder
	log := slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{Level: slog.LevelDebug}))
	told := logDrops(log, tun.Drops{}, tun.Drops{})
	if text.Len() > 0 {
		t.Errorf("nothing dropped is told: %s", &text)
	}
	for range 2 {
		told = logDrops(log, told, tun.Drops{Foreign: 1, Fragments: 2, Incomplete: 3, Broken: 4, Forged: 5})
	}
	if n := strings.Count(text.String(), "foreign=1 fragments=2 incomplete=3 broken=4 forged=5"); n != 1 {
		t.Errorf("told %d times: %s", n, &text)
	}
}

// The agent asks forbidden while it holds its own lock, and the session asks
// the agent while it holds its own: forbidden must not want the session's.
func TestForbiddenNeedsNoLock(t *testing.T) {
	s := &session{mesh: []netip.Prefix{netip.MustParsePrefix("100.90.0.0/16"), netip.MustParsePrefix("fd00:1:2::/48")}}
	server := netip.MustParseAddrPort("192.0.2.1:443")
	s.servers.Store(&map[netip.AddrPort]bool{server: true})
	s.links = newLinks(linksConfig{})
	s.links.setOwn(relayInfo{addrs: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:3478")}})
	s.links.mu.Lock()
	defer s.links.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	done := make(chan map[string]bool, 1)
	go func() {
		got := map[string]bool{}
		for _, a := range []string{"192.0.2.1:443", "192.0.2.1:444", "192.0.2.7:3478", "100.90.1.2:5", "[fd00:1:2::9]:5", "100.91.0.1:5"} {
			got[a] = s.forbidden(netip.MustParseAddrPort(a))
		}
		done <- got
	}()
	select {
	case got := <-done:
		for a, want := range map[string]bool{
			"192.0.2.1:443": true, "192.0.2.1:444": false, "192.0.2.7:3478": true, "100.90.1.2:5": true, "[fd00:1:2::9]:5": true, "100.91.0.1:5": false,
		} {
			if got[a] != want {
				t.Errorf("%s forbidden: %v, want %v", a, got[a], want)
			}
		}
	case <-time.After(10 * time.Second):
		t.Fatal("forbidden waits for the session's lock")
	}
}
