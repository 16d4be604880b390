package natlab

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/punch"
)

// TestTrackedCounts has a laptop send to strangers and to servers, from one socket
// and from others, and counts what its router has of it.
func TestTrackedCounts(t *testing.T) {
	lab := newLab(t, Options{Delay: -1})
	server := mustServer(t, lab, "server")
	for _, nat := range []NAT{Masquerade, Random, RandomOpen} {
		home := mustHome(t, lab, "home-"+string(nat), nat)
		laptop, stranger := mustLaptop(t, home, "laptop-"+string(nat)), mustLaptop(t, home, "stranger-"+string(nat))
		const sockets, peers = 3, 5
		for range sockets {
			mustSend(t, laptop, netip.AddrPortFrom(server.Addr(), 9), 1)
			mustSend(t, laptop, netip.MustParseAddrPort("203.0.113.200:7000"), peers)
		}
		mustSend(t, laptop, netip.AddrPortFrom(home.router(), 9), 1)
		mustSend(t, stranger, netip.MustParseAddrPort("203.0.113.201:7000"), peers)
		ports := sockets // each has one
		if nat != Masquerade {
			ports = sockets * peers
		}
		var got Tracked
		counted := func() bool {
			var err error
			if got, _, err = home.tracked([]*Host{stranger}); err != nil {
				t.Fatal(err)
			}
			return got.Search == sockets*peers && got.Ports == ports && got.Aimed == peers && got.All >= got.Search+sockets+peers
		}
		for range 50 { // a program that translates takes a moment
			if counted() {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if !counted() {
			t.Errorf("%s: %+v, want %d flows from %d ports to %d", nat, got, sockets*peers, ports, peers)
		}
	}
}

// TestUnreadRouter has a router whose table cannot be read, of a run that could say
// that it left nothing there.
func TestUnreadRouter(t *testing.T) {
	p := &Pair{routers: []*Home{{node: &node{name: "home"}}}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := p.watchRouters(ctx, &Run{}); err == nil || !strings.Contains(err.Error(), "home was never read") {
		t.Error(err)
	}
}

func TestLimit(t *testing.T) {
	const named = punch.MaxCandidates + lawTCP
	for _, c := range []struct {
		cell Cell
		want Tracked
	}{
		{Cell{One: at(Masquerade), Two: at(OpenInput)}, Tracked{Search: 2 * named, Ports: 5, Aimed: named}},
		{Cell{One: at(Random), Two: at(Masquerade)}, Tracked{Search: 2*named + 1200, Ports: 5 + 16 + 256, Aimed: named + 1200}},
		{Cell{One: at(Block512), Two: at(Masquerade)}, Tracked{Search: 2*named + 1200, Ports: 5 + 16 + 256, Aimed: named + 256}},
		{Cell{One: Place{NAT: Masquerade, Carrier: Block}, Two: at(Masquerade)}, Tracked{Search: 2*named + 1200, Ports: 5 + 16 + 512, Aimed: named + 512}},
	} {
		if got := c.cell.Limit(); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.cell.Name(), got, c.want)
		}
	}
}

// mustSend sends to so many ports from a socket of its own.
func mustSend(t *testing.T, from *Host, to netip.AddrPort, count int) {
	t.Helper()
	err := from.inside(func() error {
		c, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer c.Close()
		for i := range count {
			if _, err := c.WriteToUDPAddrPort([]byte("hello"), netip.AddrPortFrom(to.Addr(), to.Port()+uint16(i))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFits(t *testing.T) {
	at := netip.MustParseAddrPort
	one := []trackedFlow{
		{outside: at("192.0.2.1:1"), to: at("192.0.2.2:7")},
		{outside: at("192.0.2.1:2"), to: at("192.0.2.2:8")},
		{outside: at("192.0.2.1:3"), to: at("192.0.2.2:9")},
	}
	other := []trackedFlow{
		{outside: at("192.0.2.2:7"), to: at("192.0.2.1:2")}, // only there
		{outside: at("192.0.2.2:8"), to: at("192.0.2.1:2")},
		{outside: at("192.0.2.2:5"), to: at("192.0.2.1:3")}, // only back
		{outside: at("192.0.2.1:1"), to: at("192.0.2.2:7")}, // the same way
	}
	if n := fits(one, other); n != 1 {
		t.Errorf("%d", n)
	}
}
