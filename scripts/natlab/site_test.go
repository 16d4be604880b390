package natlab

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const sameLAN = "192.168.1.0/24"

// TestCarrier has two homes with one and the same LAN behind one carrier. They
// reach each other by their mappings only where the carrier lets them, and as far
// as other homes.
func TestCarrier(t *testing.T) {
	const delay = 10 * time.Millisecond
	lab := newLab(t, Options{Delay: delay})
	for _, c := range []struct {
		nat    NAT
		passes bool
	}{{Masquerade, false}, {Hairpin, true}} {
		t.Run(string(c.nat), func(t *testing.T) {
			carrier := mustCarrier(t, lab, "carrier-"+string(c.nat), c.nat)
			var ends [2]*probeEnd
			for i := range ends {
				site := Site{NAT: Masquerade, LAN: netip.MustParsePrefix(sameLAN), Carrier: carrier}
				home, err := lab.HomeAt(t.Context(), fmt.Sprintf("home-%s-%d", c.nat, i), site)
				if err != nil {
					t.Fatal(err)
				}
				laptop := mustLaptop(t, home, fmt.Sprintf("laptop-%s-%d", c.nat, i))
				if want := netip.MustParseAddr("192.168.1.2"); laptop.Addr() != want {
					t.Errorf("the laptop has %s, not %s", laptop.Addr(), want)
				}
				ends[i] = newProbeEnd(t, laptop)
				if got := ends[i].mapped.Addr(); got != carrier.WAN() {
					t.Errorf("the world sees %s, not the carrier's %s", got, carrier.WAN())
				}
			}
			got, took := punched(t, ends[0], ends[1])
			if got != c.passes {
				t.Errorf("they reach each other: %v", got)
			}
			if got && (took < 2*delay || took > 4*delay) {
				t.Errorf("there and back takes %v", took)
			}
			behaviour, err := ends[0].host.Probe(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := Behaviour{Public: carrier.WAN(), Mapping: EndpointIndependent, Filtering: AddressAndPortDependent, Preserves: true}
			if behaviour != want {
				t.Errorf("got  %+v\nwant %+v", behaviour, want)
			}
		})
	}
}

// probeEnd is a socket of a host and its mapping.
type probeEnd struct {
	host   *Host
	conn   *net.UDPConn
	mapped netip.AddrPort
}

func newProbeEnd(t *testing.T, h *Host) *probeEnd {
	t.Helper()
	servers, err := h.lab.mirrors(1)
	if err != nil {
		t.Fatal(err)
	}
	p := &probe{host: h}
	t.Cleanup(p.close)
	e := &probeEnd{host: h}
	if e.conn, err = p.socket(); err != nil {
		t.Fatal(err)
	}
	var g errgroup.Group
	g.Go(func() error { return mirror(servers[0]) })
	e.mapped, err = p.must(t.Context(), e.conn, servers[0].LocalAddr().(*net.UDPAddr).AddrPort())
	closeAll(servers)
	if err := errors.Join(err, g.Wait()); err != nil {
		t.Fatal(err)
	}
	return e
}

// punched has both send to the other's mapping until one reads what the other
// has sent, and then measures the way there and back.
func punched(t *testing.T, a, b *probeEnd) (ok bool, took time.Duration) {
	t.Helper()
	for range probeResend {
		a.send(t, b.mapped)
		b.send(t, a.mapped)
		_, one, err := receive(a.conn)
		if err != nil {
			t.Fatal(err)
		}
		_, two, err := receive(b.conn)
		if err != nil {
			t.Fatal(err)
		}
		if one && two {
			return true, roundTrip(t, a, b)
		}
	}
	return false, 0
}

func roundTrip(t *testing.T, a, b *probeEnd) time.Duration {
	t.Helper()
	start := time.Now()
	a.send(t, b.mapped)
	if _, ok, err := receive(b.conn); !ok {
		t.Errorf("nothing there: %v", err)
	}
	b.send(t, a.mapped)
	if _, ok, err := receive(a.conn); !ok {
		t.Errorf("nothing back: %v", err)
	}
	return time.Since(start)
}

func (e *probeEnd) send(t *testing.T, to netip.AddrPort) {
	t.Helper()
	if _, err := e.conn.WriteToUDPAddrPort(probeRequest(0, 0), to); err != nil {
		t.Fatal(err)
	}
}

// TestIPv6 sends over IPv6 between laptops, first uninvited, then after the other
// side has sent too.
func TestIPv6(t *testing.T) {
	const delay = 10 * time.Millisecond
	lab := newLab(t, Options{Delay: delay, IPv6: true})
	server := mustServer(t, lab, "server")
	for kind, want := range map[IPv6]struct{ uninvited, invited bool }{
		IPv6Open: {true, true}, IPv6Firewall: {false, true}, IPv6Broken: {},
	} {
		t.Run(string(kind), func(t *testing.T) {
			var hosts [2]*Host
			for i := range hosts {
				home, err := lab.HomeAt(t.Context(), fmt.Sprintf("home-%s-%d", kind, i), Site{NAT: Masquerade, IPv6: kind})
				if err != nil {
					t.Fatal(err)
				}
				hosts[i] = mustLaptop(t, home, fmt.Sprintf("laptop-%s-%d", kind, i))
			}
			// Until routers know their neighbours, a first packet waits or is lost.
			for _, h := range hosts {
				_ = h.Command(t.Context(), "ping", "-c", "3", "-i", "0.2", "-W", "1", server.Addr6().String()).Run()
			}
			one, two := end6(t, hosts[0]), end6(t, hosts[1])
			two.send(t, one.mapped)
			if _, ok, err := receive(one.conn); ok != want.uninvited || err != nil {
				t.Errorf("uninvited: %v, %v", ok, err)
			}
			if ok, took := punched(t, one, two); ok != want.invited || ok && took < 2*delay {
				t.Errorf("both sides: %v in %v", ok, took)
			}
			reached := hosts[0].Command(t.Context(), "ping", "-c", "1", "-W", "1", server.Addr6().String()).Run() == nil
			if reached != (kind != IPv6Broken) {
				t.Errorf("reaches the server: %v", reached)
			}
			if got, err := hosts[0].Probe(t.Context()); err != nil || got.Mapping != EndpointIndependent {
				t.Errorf("IPv4 beside it: %+v, %v", got, err)
			}
		})
	}
}

func end6(t *testing.T, h *Host) *probeEnd {
	t.Helper()
	e := &probeEnd{host: h}
	err := h.inside(func() (err error) {
		e.conn, err = net.ListenUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.Addr6(), 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.conn.Close() })
	e.mapped = e.conn.LocalAddr().(*net.UDPAddr).AddrPort()
	return e
}

// TestIsolated keeps two laptops of one LAN apart: only by their mappings they
// reach each other, where the router lets them.
func TestIsolated(t *testing.T) {
	lab := newLab(t, Options{Delay: 2 * time.Millisecond})
	for _, c := range []struct {
		nat    NAT
		passes bool
	}{{Masquerade, false}, {Hairpin, true}} {
		t.Run(string(c.nat), func(t *testing.T) {
			home := mustHome(t, lab, "home-"+string(c.nat), c.nat)
			a, b := mustLaptop(t, home, "a-"+string(c.nat)), mustLaptop(t, home, "b-"+string(c.nat))
			reaches := func(h *Host, to netip.Addr) bool {
				return h.Command(t.Context(), "ping", "-c", "1", "-W", "1", to.String()).Run() == nil
			}
			if !reaches(a, b.Addr()) {
				t.Error("they do not reach each other to begin with")
			}
			if err := home.Isolate(t.Context(), a, b); err != nil {
				t.Fatal(err)
			}
			if reaches(a, b.Addr()) || reaches(b, a.Addr()) {
				t.Error("they reach each other all the same")
			}
			one, two := newProbeEnd(t, a), newProbeEnd(t, b)
			if got := one.mapped.Addr(); got != home.WAN() {
				t.Errorf("the world sees %s", got)
			}
			if got, _ := punched(t, one, two); got != c.passes {
				t.Errorf("by their mappings they reach each other: %v", got)
			}
		})
	}
}

// TestLines measures the routers whose line is bad.
func TestLines(t *testing.T) {
	lab := newLab(t, Options{Delay: 2 * time.Millisecond})
	server := mustServer(t, lab, "server")
	at := func(nat NAT) *Host { return mustLaptop(t, mustHome(t, lab, string(nat), nat), "laptop-"+string(nat)) }
	ping := func(h *Host, args ...string) string {
		out, _ := h.Command(t.Context(), "ping", append(args, server.Addr().String())...).CombinedOutput()
		return string(out)
	}
	t.Run("mtu", func(t *testing.T) {
		small := at(SmallMTU)
		const headers = 28 // IPv4 and ICMP
		for size, passes := range map[int]bool{smallMTU - headers: true, smallMTU - headers + 1: false} {
			out := ping(small, "-c", "1", "-W", "1", "-M", "do", "-s", fmt.Sprint(size))
			if strings.Contains(out, " 0% packet loss") != passes || strings.Contains(out, "rag needed") {
				t.Errorf("%d bytes: %s", size, out)
			}
		}
	})
	t.Run("loss", func(t *testing.T) {
		const count = 300
		out := ping(at(Lossy), "-q", "-i", "0.005", "-c", fmt.Sprint(count), "-W", "1")
		var sent, back int
		if _, err := fmt.Sscanf(out[strings.Index(out, "---\n")+4:], "%d packets transmitted, %d received", &sent, &back); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if share := float64(back) / float64(max(sent, 1)); share < 0.5 || share > 0.78 { // 0.64
			t.Errorf("%d of %d came back", back, sent)
		}
	})
	t.Run("policer", func(t *testing.T) {
		got := poured(t, at(Policed), server, 300, 1000)
		if got < 10 || got > 150 {
			t.Errorf("%d of 300 packets passed within half a second, at 100 a second and 10 at once", got)
		}
	})
	t.Run("timeouts", func(t *testing.T) {
		h := at(ShortTimeouts)
		for wait, passes := range map[time.Duration]bool{2 * time.Second: true, 8 * time.Second: false} {
			if got := answeredLate(t, h, server, wait); got != passes {
				t.Errorf("an answer after %v passes: %v", wait, got)
			}
		}
	})
}

// poured counts what arrives of so many packets sent within half a second.
func poured(t *testing.T, from, to *Host, count, size int) int {
	t.Helper()
	in, out := udpPair(t, from, to)
	for range count {
		if _, err := out.Write(bytes.Repeat([]byte{1}, size)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond / time.Duration(count))
	}
	got := 0
	for {
		if err := in.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := in.Read(make([]byte, size)); err != nil {
			return got
		}
		got++
	}
}

// answeredLate says whether an answer passes that comes so long after the
// request.
func answeredLate(t *testing.T, from, to *Host, wait time.Duration) bool {
	t.Helper()
	in, out := udpPair(t, from, to)
	if _, err := out.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1)
	_, asker, err := in.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(wait)
	if _, err := in.WriteToUDPAddrPort(buf, asker); err != nil {
		t.Fatal(err)
	}
	_, ok, err := receive(out)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

func udpPair(t *testing.T, from, to *Host) (in, out *net.UDPConn) {
	t.Helper()
	err := to.inside(func() (err error) {
		in, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.Addr(), 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	err = from.inside(func() (err error) {
		out, err = net.DialUDP("udp4", nil, in.LocalAddr().(*net.UDPAddr))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	return in, out
}
