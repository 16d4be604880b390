package nattest_test

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"overlay/punch/nattest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	eim  = nattest.EndpointIndependent
	adm  = nattest.AddressDependent
	apdm = nattest.AddressAndPortDependent
)

// probe is one client behind the NAT under test and servers on two addresses.
// It knows nothing of the NAT but what packets tell, as RFC 5780 has it.
type probe struct {
	router  *nattest.Router
	client  *nattest.Host
	servers []*nattest.Host
	from    netip.AddrPort   // the source of the last packet at any server
	heard   []netip.AddrPort // the sources of packets at the client
}

const (
	clientPort = 40000
	serverPort = 3478
)

func clientAddr() netip.Prefix { return netip.MustParsePrefix("192.168.1.2/24") }

func probeWAN() netip.Addr { return netip.MustParseAddr("203.0.113.1") }

func probeAddr(server int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 51, 100, byte(server + 1)})
}

func probeLink() nattest.Link { return nattest.Link{Delay: 10 * time.Millisecond} }

func newProbe(nat nattest.NAT) *probe {
	n := nattest.New(1)
	p := &probe{router: n.Internet().NewRouter(nat, probeWAN(), probeLink())}
	p.client = p.router.LAN().NewHost(nattest.Link{}, clientAddr())
	p.client.Listen(clientPort, func(_ []byte, from netip.AddrPort) { p.heard = append(p.heard, from) })
	for i := range 2 {
		h := n.Internet().NewHost(probeLink(), netip.PrefixFrom(probeAddr(i), 32))
		for port := range uint16(5) {
			h.Listen(serverPort+port, func(_ []byte, from netip.AddrPort) { p.from = from })
		}
		p.servers = append(p.servers, h)
	}
	return p
}

// mapped sends from the client's port and returns the source a server saw.
func (p *probe) mapped(t *testing.T, port uint16, server int, serverPort uint16) netip.AddrPort {
	t.Helper()
	p.from = netip.AddrPort{}
	to := netip.AddrPortFrom(probeAddr(server), serverPort)
	if err := p.client.Send([]byte("probe"), port, to, 0); err != nil {
		t.Fatal(err)
	}
	wait(100 * time.Millisecond)
	return p.from
}

// passes sends from a server to the outer address and reports whether it came in.
func (p *probe) passes(t *testing.T, server int, serverPort uint16, to netip.AddrPort) bool {
	t.Helper()
	p.heard = nil
	if err := p.servers[server].Send([]byte("probe"), serverPort, to, 0); err != nil {
		t.Fatal(err)
	}
	wait(100 * time.Millisecond)
	return slices.Contains(p.heard, netip.AddrPortFrom(probeAddr(server), serverPort))
}

func wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// mapping tells the mapping behaviour from five destinations.
func (p *probe) mapping(t *testing.T) (nattest.Behavior, []uint16) {
	t.Helper()
	var ports []uint16
	for _, to := range []struct {
		server int
		port   uint16
	}{{0, 3478}, {0, 3479}, {0, 3480}, {1, 3478}, {1, 3479}} {
		ports = append(ports, p.mapped(t, clientPort, to.server, to.port).Port())
	}
	switch {
	case ports[0] != ports[1]:
		return apdm, ports
	case ports[0] != ports[3]:
		return adm, ports
	default:
		return eim, ports
	}
}

// filtering tells the filtering behaviour after one packet to the first server.
func (p *probe) filtering(t *testing.T) nattest.Behavior {
	t.Helper()
	outside := p.mapped(t, clientPort, 0, serverPort)
	if !p.passes(t, 0, serverPort, outside) {
		t.Fatal("the answer does not pass")
	}
	switch {
	case p.passes(t, 1, serverPort, outside):
		return eim
	case p.passes(t, 0, serverPort+1, outside):
		return adm
	default:
		return apdm
	}
}

func TestBehaviors(t *testing.T) {
	for _, mapping := range []nattest.Behavior{eim, adm, apdm} {
		for _, filtering := range []nattest.Behavior{eim, adm, apdm} {
			synctest.Test(t, func(t *testing.T) {
				nat := nattest.NAT{Mapping: mapping, Filtering: filtering}
				if got, ports := newProbe(nat).mapping(t); got != mapping {
					t.Errorf("mapping of %+v is %d: %v", nat, got, ports)
				}
				if got := newProbe(nat).filtering(t); got != filtering {
					t.Errorf("filtering of %+v is %d", nat, got)
				}
			})
		}
	}
}

func TestPortAllocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kind, ports := newProbe(nattest.Masquerade()).mapping(t)
		if kind != eim || ports[0] != clientPort {
			t.Errorf("masquerade: behaviour %d, ports %v", kind, ports)
		}
		if _, ports = newProbe(nattest.NAT{}).mapping(t); ports[0] == clientPort {
			t.Error("a NAT that does not preserve kept the port")
		}
		_, ports = newProbe(nattest.NAT{Mapping: apdm, Sequential: -2}).mapping(t)
		for i := range ports[1:] {
			if ports[i+1] != ports[i]-2 {
				t.Fatalf("sequential by -2: %v", ports)
			}
		}
		_, ports = newProbe(nattest.NAT{Mapping: apdm}).mapping(t)
		slices.Sort(ports)
		if len(slices.Compact(ports)) != 5 {
			t.Errorf("random endpoint-dependent ports repeat: %v", ports)
		}
	})
}

func TestPortCollision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbe(nattest.Masquerade())
		other := p.router.LAN().NewHost(nattest.Link{}, netip.MustParsePrefix("192.168.1.3/24"))
		if err := other.Send([]byte("probe"), clientPort, netip.AddrPortFrom(probeAddr(0), serverPort), 0); err != nil {
			t.Fatal(err)
		}
		wait(100 * time.Millisecond)
		if got := p.from.Port(); got != clientPort {
			t.Fatalf("first host has port %d", got)
		}
		if got := p.mapped(t, clientPort, 0, serverPort).Port(); got == clientPort || got == 0 {
			t.Errorf("second host with the same port has port %d", got)
		}
	})
}

func TestLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nat := nattest.NAT{Filtering: apdm, Lifetime: 30 * time.Second, LifetimeStream: 120 * time.Second}
		p := newProbe(nat)
		outside := p.mapped(t, clientPort, 0, serverPort)
		wait(31 * time.Second)
		if p.passes(t, 0, serverPort, outside) {
			t.Error("an unreplied flow passes after 31 s")
		}
		outside = p.mapped(t, clientPort, 0, serverPort)
		wait(29 * time.Second)
		if !p.passes(t, 0, serverPort, outside) {
			t.Error("an unreplied flow is gone after 29 s")
		}
		wait(110 * time.Second)
		if !p.passes(t, 0, serverPort, outside) {
			t.Error("a two-way flow is gone after 110 s")
		}
		wait(121 * time.Second)
		if p.passes(t, 0, serverPort, outside) {
			t.Error("a two-way flow passes after 121 s")
		}
		if again := p.mapped(t, clientPort, 0, serverPort); again == outside {
			t.Error("an expired mapping came back with its random port")
		}
	})
}

func TestRebootAndNewAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbe(nattest.NAT{})
		outside := p.mapped(t, clientPort, 0, serverPort)
		p.router.Reboot()
		if p.passes(t, 0, serverPort, outside) {
			t.Error("a mapping survived the reboot")
		}
		if again := p.mapped(t, clientPort, 0, serverPort); again == outside {
			t.Error("the mapping after the reboot is the old one")
		}
		moved := netip.MustParseAddr("203.0.113.99")
		p.router.SetWAN(moved)
		if got := p.mapped(t, clientPort, 0, serverPort); got.Addr() != moved {
			t.Errorf("source after the change of address is %s", got)
		}
	})
}

func TestHairpin(t *testing.T) {
	for _, hairpin := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p := newProbe(nattest.NAT{Hairpin: hairpin})
			outside := p.mapped(t, clientPort, 0, serverPort)
			other := p.router.LAN().NewHost(nattest.Link{}, netip.MustParsePrefix("192.168.1.3/24"))
			if err := other.Send([]byte("probe"), 5000, outside, 0); err != nil {
				t.Fatal(err)
			}
			wait(100 * time.Millisecond)
			if got := len(p.heard) == 1; got != hairpin {
				t.Fatalf("hairpin %v: heard from %v", hairpin, p.heard)
			}
			if hairpin && p.heard[0].Addr() != probeWAN() {
				t.Errorf("the source of a hairpinned packet is %s", p.heard[0])
			}
		})
	}
}

func TestTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbe(nattest.Masquerade())
		to := netip.AddrPortFrom(probeAddr(0), serverPort)
		for ttl, arrives := range map[int]bool{1: false, 2: false, 3: false, 4: true} {
			p.from = netip.AddrPort{}
			if err := p.client.Send([]byte("probe"), clientPort, to, ttl); err != nil {
				t.Fatal(err)
			}
			wait(100 * time.Millisecond)
			if p.from.IsValid() != arrives {
				t.Errorf("ttl %d: arrived %v, want %v", ttl, p.from.IsValid(), arrives)
			}
		}
		p.router.Reboot()
		outside := netip.AddrPortFrom(probeWAN(), clientPort)
		if err := p.client.Send([]byte("opener"), clientPort, to, 2); err != nil {
			t.Fatal(err)
		}
		wait(100 * time.Millisecond)
		if !p.passes(t, 0, serverPort, outside) {
			t.Error("an opener with ttl 2 does not open the own NAT")
		}
	})
}

// TestOpenInput shows the clash that openers avoid: an unsolicited packet that
// reaches the router renumbers the own later flow, until it is forgotten.
func TestOpenInput(t *testing.T) {
	nat := nattest.Masquerade()
	nat.OpenInput = true
	synctest.Test(t, func(t *testing.T) {
		p := newProbe(nat)
		if kind, _ := p.mapping(t); kind != eim {
			t.Fatalf("mapping is %d while nobody sends unasked", kind)
		}
		outside := netip.AddrPortFrom(probeWAN(), clientPort)
		p.router.Reboot()
		if p.passes(t, 0, serverPort, outside) {
			t.Fatal("an unsolicited packet passes")
		}
		clashed := p.mapped(t, clientPort, 0, serverPort)
		if clashed.Port() == clientPort {
			t.Error("the flow that clashes keeps its port")
		}
		if p.passes(t, 0, serverPort, outside) || !p.passes(t, 0, serverPort, clashed) {
			t.Error("the renumbered flow is not the one that is open")
		}
		if got := p.mapped(t, clientPort, 0, serverPort+1); got != clashed {
			t.Errorf("the next flow leaves from %v, not from %v as the newest one", got, clashed)
		}
		if got := p.mapped(t, clientPort+1, 0, serverPort).Port(); got != clientPort+1 {
			t.Errorf("the flow of another socket is renumbered to %d", got)
		}
		wait(3 * time.Minute)
		if got := p.mapped(t, clientPort, 0, serverPort).Port(); got != clientPort {
			t.Errorf("three minutes of silence later the port is %d", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		p := newProbe(nattest.Masquerade())
		p.passes(t, 0, serverPort, netip.AddrPortFrom(probeWAN(), clientPort))
		if got := p.mapped(t, clientPort, 0, serverPort).Port(); got != clientPort {
			t.Errorf("with input dropped the port is %d", got)
		}
	})
}

func TestDoubleNAT(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbe(nattest.Masquerade())
		home := p.router.LAN().NewRouter(nattest.NAT{}, netip.MustParseAddr("192.168.1.7"), nattest.Link{})
		inner := home.LAN().NewHost(nattest.Link{}, clientAddr())
		inner.Listen(clientPort, func(_ []byte, from netip.AddrPort) { p.heard = append(p.heard, from) })
		if err := inner.Send([]byte("probe"), clientPort, netip.AddrPortFrom(probeAddr(0), serverPort), 0); err != nil {
			t.Fatal(err)
		}
		wait(100 * time.Millisecond)
		if p.from.Addr() != probeWAN() {
			t.Fatalf("source behind two NATs is %s", p.from)
		}
		if !p.passes(t, 0, serverPort, p.from) {
			t.Error("the answer does not pass two NATs")
		}
	})
}

// TestIPv6 shows that IPv6 is filtered but not translated.
func TestIPv6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := nattest.New(1)
		inner, outer := netip.MustParsePrefix("2001:db8:a::2/64"), netip.MustParsePrefix("2001:db8:b::1/64")
		var at, back netip.AddrPort
		server := n.Internet().NewHost(probeLink(), outer)
		server.Listen(1, func(_ []byte, from netip.AddrPort) { at = from })
		home := n.Internet().NewRouter(nattest.Masquerade(), probeWAN(), probeLink())
		client := home.LAN().NewHost(nattest.Link{}, inner)
		client.Listen(2, func(_ []byte, from netip.AddrPort) { back = from })
		here, there := netip.AddrPortFrom(inner.Addr(), 2), netip.AddrPortFrom(outer.Addr(), 1)
		send := func(h *nattest.Host, port uint16, to netip.AddrPort) {
			if err := h.Send([]byte("probe"), port, to, 0); err != nil {
				t.Fatal(err)
			}
			wait(100 * time.Millisecond)
		}
		if send(server, 1, here); back.IsValid() {
			t.Error("an unsolicited packet passes")
		}
		if send(client, 2, there); at != here {
			t.Errorf("source is %s, want %s", at, here)
		}
		if send(server, 1, here); back != there {
			t.Errorf("the answer came from %s, want %s", back, there)
		}
	})
}

func TestLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := nattest.New(1)
		l := nattest.Link{Delay: 20 * time.Millisecond, Jitter: 10 * time.Millisecond, Loss: 0.2, Duplicate: 0.1}
		a := n.Internet().NewHost(l, netip.PrefixFrom(probeAddr(0), 32))
		b := n.Internet().NewHost(nattest.Link{}, netip.PrefixFrom(probeAddr(1), 32))
		var got []byte
		var last time.Time
		b.Listen(1, func(b []byte, _ netip.AddrPort) { got, last = append(got, b[0]), time.Now() })
		start := time.Now()
		for i := range 200 {
			if err := a.Send([]byte{byte(i)}, 1, netip.AddrPortFrom(probeAddr(1), 1), 0); err != nil {
				t.Fatal(err)
			}
		}
		wait(time.Second)
		if took := last.Sub(start); took < l.Delay || took > l.Delay+l.Jitter {
			t.Errorf("the last packet took %v", took)
		}
		if slices.IsSorted(got) {
			t.Error("jitter did not reorder")
		}
		slices.Sort(got)
		if n := len(slices.Compact(slices.Clone(got))); n < 140 || n > 190 || n == len(got) {
			t.Errorf("of 200 packets %d arrived, %d with duplicates", n, len(got))
		}
		l.Down = true
		a.SetLink(l)
		got = nil
		if err := a.Send([]byte{1}, 1, netip.AddrPortFrom(probeAddr(1), 1), 0); err != nil {
			t.Fatal(err)
		}
		if wait(time.Second); len(got) != 0 {
			t.Error("a packet crossed a cut link")
		}
	})
}
