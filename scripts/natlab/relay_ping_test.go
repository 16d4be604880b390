package natlab

import (
	"strings"
	"testing"
)

// TestPingNamesTheRelay cuts a direct path that is in use and pings at once:
// what comes back comes through the relay, and ping must not call it direct.
func TestPingNamesTheRelay(t *testing.T) {
	m, a, b := pair(t, Masquerade, Masquerade)
	mustDirect(t, a, b)
	for i := range runs(3, fullRuns) {
		m.cut(t, a.Host, b.Host)
		out, err := a.run(t.Context(), "ping", b.nodeName, "-c", "1", "--json")
		if err == nil && strings.Contains(out, `"kind":"direct"`) {
			t.Errorf("run %d: a direct path that is cut is said to answer: %s", i, out)
		}
		m.uncut(t, a.Host, b.Host)
		if out, err = a.run(t.Context(), "ping", b.nodeName, "--until-direct"); err != nil {
			t.Fatalf("run %d: %v: %s", i, err, out)
		}
	}
}
