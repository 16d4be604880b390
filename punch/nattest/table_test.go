package nattest

import (
	"net/netip"
	"testing"
)

func TestTable(t *testing.T) {
	inside, remote := netip.MustParseAddrPort("192.168.1.2:4000"), netip.MustParseAddrPort("198.51.100.1:3478")
	wan := netip.MustParseAddr("203.0.113.1")
	table := NewTable(NAT{Filtering: AddressAndPortDependent, Hairpin: true}, 1)
	if !table.Hairpin() || flowsOf(table) != 0 {
		t.Errorf("a new table has %d flows, hairpin %v", flowsOf(table), table.Hairpin())
	}
	outside := table.Outbound(inside, remote, wan)
	if got, ok := table.Inbound(remote, outside); !ok || got != inside || outside.Addr() != wan {
		t.Errorf("%v is outside %v, and back %v, %v", inside, outside, got, ok)
	}
	if _, ok := table.Inbound(netip.AddrPortFrom(remote.Addr(), 1), outside); ok {
		t.Error("a stranger passes")
	}
	if flowsOf(table) != 1 {
		t.Errorf("%d flows", flowsOf(table))
	}
	table.Flush()
	if _, ok := table.Inbound(remote, outside); ok || flowsOf(table) != 0 {
		t.Errorf("after a reboot the mapping lives, of %d flows", flowsOf(table))
	}
}

// flowsOf is how many flows live.
func flowsOf(table *Table) (count int) {
	table.Each(func(_, _, _ netip.AddrPort) { count++ })
	return count
}
