package nattest

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestAuditOfSpareSockets has a node send from as many spare sockets as are no hard
// round, to ever so many ports of one address.
func TestAuditOfSpareSockets(t *testing.T) {
	for name, c := range map[string]struct {
		packets, targets int
		every            time.Duration
		want             string // in the fault; empty: there is none
	}{
		"fresh sockets":   {packets: 400, targets: maxFresh, every: 50 * time.Millisecond},
		"many to few":     {packets: 150, targets: maxFresh, want: "within a second to 203.0.113.9"},
		"many to many":    {packets: 3000, targets: 3000, want: "of a hard round within a second"},
		"slowly, to many": {packets: 3000, targets: 3000, every: 100 * time.Millisecond, want: "packets in a hard round"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAudit(nil, func(netip.AddrPort) bool { return false })
				a.attach(nil)
				for i := range c.packets {
					to := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.9"), uint16(1024+i%c.targets))
					a.sent(nil, to, sending{port: uint16(2000 + i%maxFresh), observed: true})
					time.Sleep(c.every)
				}
				faults := strings.Join(a.broken(), "\n")
				if (faults == "") != (c.want == "") || !strings.Contains(faults, c.want) {
					t.Errorf("faults %q, want %q", faults, c.want)
				}
			})
		})
	}
}
