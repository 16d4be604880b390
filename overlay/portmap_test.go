package overlay

import (
	"net/netip"
	"slices"
	"testing"

	"overlay/punch"
)

// A record with a mapped port on an address that the server has not seen would
// be refused whole.
func TestPublishable(t *testing.T) {
	at := netip.MustParseAddrPort
	seen := punch.Candidate{Addr: at("203.0.113.1:4000"), Type: punch.ServerReflexive, Token: []byte{1}}
	unproven := punch.Candidate{Addr: at("203.0.113.2:4000"), Type: punch.ServerReflexive}
	list := []punch.Candidate{
		{Addr: at("192.168.1.2:41641"), Type: punch.Host},
		seen, unproven,
		{Addr: at("203.0.113.1:41641"), Type: punch.PortMapped},
		{Addr: at("203.0.113.2:41641"), Type: punch.PortMapped},
		{Addr: at("100.64.0.9:41641"), Type: punch.PortMapped},
	}
	before := slices.Clone(list)
	var got []netip.AddrPort
	for _, c := range publishable(list) {
		got = append(got, c.Addr)
	}
	want := []netip.AddrPort{at("192.168.1.2:41641"), seen.Addr, unproven.Addr, at("203.0.113.1:41641")}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if !slices.EqualFunc(list, before, func(x, y punch.Candidate) bool { return x.Addr == y.Addr && x.Type == y.Type }) {
		t.Error("the list itself was changed")
	}
}
