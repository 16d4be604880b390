package nattest

import (
	"net/netip"
	"testing"
)

func TestTable(t *testing.T) {
	inside, remote := netip.MustParseAddrPort("192.168.1.2:4000"), netip.MustParseAddrPort("198.51.100.1:3478")
	wan := netip.MustParseAddr("203.0.113.1")
	table := NewTable(NAT{Filtering: AddressAndPortDependent, Hairpin: true}, 1)
	if !table.Hairpin() || table.Flows() != 0 {
		t.Errorf("a new table has %d flows, hairpin %v", table.Flows(), table.Hairpin())
	}
	outside := table.Outbound(inside, remote, wan)
	if got, ok := table.Inbound(remote, outside); !ok || got != inside || outside.Addr() != wan {
		t.Errorf("%v is outside %v, and back %v, %v", inside, outside, got, ok)
	}
	if _, ok := table.Inbound(netip.AddrPortFrom(remote.Addr(), 1), outside); ok {
		t.Error("a stranger passes")
	}
	if table.Flows() != 1 {
		t.Errorf("%d flows", table.Flows())
	}
	table.Flush()
	if _, ok := table.Inbound(remote, outside); ok || table.Flows() != 0 {
		t.Errorf("after a reboot the mapping lives, of %d flows", table.Flows())
	}
}
