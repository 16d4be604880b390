package natlab

import (
	"net"
	"net/netip"
	"os"
	"testing"
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
		got, _, err := home.tracked([]*Host{stranger})
		if err != nil {
			t.Fatal(err)
		}
		ports := sockets // each has one
		if nat != Masquerade {
			ports = sockets * peers
		}
		if got.Search != sockets*peers || got.Ports != ports || got.All < got.Search+sockets+peers {
			t.Errorf("%s: %+v, want %d flows from %d ports", nat, got, sockets*peers, ports)
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

// TestRouterState counts what hard rounds leave in the routers, whatever becomes of
// the rounds. TestNATLadder does it for the other cells.
func TestRouterState(t *testing.T) {
	needLab(t)
	for _, c := range Cells() {
		hard := c.One.guessed() || c.Two.guessed()
		short := c.Group == "random" || c.Group == "block" && c.One.NAT == Block
		if !hard || testing.Short() && !short {
			continue
		}
		t.Run(c.Name(), func(t *testing.T) {
			p, err := c.Build(t.Context(), Options{Log: quiet(), Binary: os.Getenv(envBinary)})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			}()
			for i := range runs(1, 3) {
				r, err := p.Run(t.Context(), i)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("run %d: %+v", i, r)
				if r.Excess != "" {
					t.Error(r.Excess)
				}
			}
		})
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
