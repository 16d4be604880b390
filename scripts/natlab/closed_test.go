package natlab

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const closedWait = 300 * time.Millisecond

// TestClosedNetworksAreWhatTheyClaim tries UDP and TCP to a server from
// behind every router that lets only some of it out, and what its proxy does.
func TestClosedNetworksAreWhatTheyClaim(t *testing.T) {
	lab := newLab(t, Options{Delay: 5 * time.Millisecond})
	server := mustServer(t, lab, "server")
	serveGreetings(t, server)
	for nat, want := range map[NAT]passes{
		Masquerade: {udp: true, tcp443: true, tcp444: true},
		UDPBlocked: {tcp443: true, tcp444: true},
		Only443:    {tcp443: true},
		ProxyOnly:  {open: true},
		ProxyAuth:  {withPassword: true},
	} {
		home := mustHome(t, lab, string(nat), nat)
		laptop := mustLaptop(t, home, "laptop-"+string(nat))
		got := passes{
			udp:    greets(t, laptop, "udp", netip.AddrPortFrom(server.Addr(), 443)),
			tcp443: greets(t, laptop, "tcp", netip.AddrPortFrom(server.Addr(), 443)),
			tcp444: greets(t, laptop, "tcp", netip.AddrPortFrom(server.Addr(), 444)),
		}
		if proxy := home.Proxy(); proxy != nil {
			bare := &url.URL{Host: proxy.Host}
			got.open = connects(t, laptop, bare, netip.AddrPortFrom(server.Addr(), 443))
			got.withPassword = !got.open && connects(t, laptop, proxy, netip.AddrPortFrom(server.Addr(), 443))
			got.proxy444 = connects(t, laptop, proxy, netip.AddrPortFrom(server.Addr(), 444))
		}
		if got != want {
			t.Errorf("%s: got %+v, want %+v", nat, got, want)
		}
	}
}

// passes is what gets out of a network.
type passes struct {
	udp, tcp443, tcp444          bool
	open, withPassword, proxy444 bool // through the proxy
}

// serveGreetings answers UDP to port 443, and TCP to 443 and 444, with a byte.
func serveGreetings(t *testing.T, server *Host) {
	t.Helper()
	var g errgroup.Group
	for _, port := range []uint16{443, 444} {
		at := netip.AddrPortFrom(server.Addr(), port)
		var l net.Listener
		var u *net.UDPConn
		err := server.inside(func() (err error) {
			if l, err = net.Listen("tcp", at.String()); err != nil {
				return err
			}
			u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close(); u.Close() })
		g.Go(func() error {
			for {
				c, err := l.Accept()
				if err != nil {
					return nil
				}
				c.Write([]byte{1})
				c.Close()
			}
		})
		g.Go(func() error {
			b := make([]byte, 16)
			for {
				_, from, err := u.ReadFromUDPAddrPort(b)
				if err != nil {
					return nil
				}
				u.WriteToUDPAddrPort(b[:1], from)
			}
		})
	}
}

// greets asks for a byte and says whether it came.
func greets(t *testing.T, from *Host, network string, to netip.AddrPort) bool {
	t.Helper()
	err := from.inside(func() error {
		c, err := net.DialTimeout(network, to.String(), closedWait)
		if err != nil {
			return err
		}
		defer c.Close()
		return greet(c)
	})
	return err == nil
}

func greet(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(closedWait)); err != nil {
		return err
	}
	if c.LocalAddr().Network() == "udp" {
		if _, err := c.Write([]byte{1}); err != nil {
			return err
		}
	}
	_, err := c.Read(make([]byte, 1))
	return err
}

// connects goes through a proxy, and fails only where the proxy says so.
func connects(t *testing.T, from *Host, proxy *url.URL, to netip.AddrPort) bool {
	t.Helper()
	refused := errors.New("refused")
	err := from.inside(func() error {
		c, err := net.DialTimeout("tcp", proxy.Host, closedWait)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(10 * closedWait)); err != nil {
			return err
		}
		r := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: to.String()}, Host: to.String(), Header: http.Header{}}
		if password, ok := proxy.User.Password(); ok {
			asks := http.Request{Header: http.Header{}}
			asks.SetBasicAuth(proxy.User.Username(), password)
			r.Header.Set("Proxy-Authorization", asks.Header.Get("Authorization"))
		}
		if err := r.Write(c); err != nil {
			return err
		}
		in := bufio.NewReader(c)
		answer, err := http.ReadResponse(in, r)
		if err != nil {
			return err
		}
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("%w: %s", refused, answer.Status)
		}
		_, err = in.ReadByte()
		return err
	})
	if err != nil && !errors.Is(err, refused) {
		t.Errorf("%s through the proxy to %s: %v", from.Name(), to, err)
	}
	return err == nil
}

// TestCut cuts two homes off from each other, and from nobody else.
func TestCut(t *testing.T) {
	lab := newLab(t, Options{Delay: 5 * time.Millisecond})
	server := mustServer(t, lab, "server")
	serveGreetings(t, server)
	one, two := mustHome(t, lab, "one", Masquerade), mustHome(t, lab, "two", Masquerade)
	laptops := [2]*Host{mustLaptop(t, one, "a"), mustLaptop(t, two, "b")}
	at := netip.AddrPortFrom(server.Addr(), 443)
	pings := func(to *Home) bool {
		return laptops[0].Command(t.Context(), "ping", "-c", "1", "-W", "1", to.WAN().String()).Run() == nil
	}
	// A router drops pings to itself.
	var open script
	open.add("nft insert rule ip flt in meta l4proto icmp accept")
	if err := two.sh(t.Context(), open); err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct {
		do          func() error
		pings, udps bool
	}{
		{func() error { return nil }, true, true},
		{func() error { return lab.Cut(t.Context(), one.WAN(), two.WAN()) }, false, true},
		{func() error { return lab.Uncut(t.Context(), one.WAN(), two.WAN()) }, true, true},
		{func() error { return lab.BlockUDP(t.Context(), one.WAN()) }, true, false},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := pings(two); got != step.pings {
			t.Errorf("step %d: homes reach each other: %v", i, got)
		}
		for k, l := range laptops {
			if got := greets(t, l, "udp", at); got != (step.udps || k == 1) {
				t.Errorf("step %d: UDP of laptop %d to the server: %v", i, k, got)
			}
			if !greets(t, l, "tcp", at) {
				t.Errorf("step %d: laptop %d does not reach the server", i, k)
			}
		}
	}
}

// TestLeg has one server farther away than another.
func TestLeg(t *testing.T) {
	const delay, leg = 5 * time.Millisecond, 40 * time.Millisecond
	lab := newLab(t, Options{Delay: delay})
	near, far := mustServer(t, lab, "near"), mustServer(t, lab, "far")
	farther := mustServer(t, lab, "farther")
	laptop := mustLaptop(t, mustHome(t, lab, "home", Masquerade), "a")
	for _, s := range []*Host{far, farther} {
		line, err := lab.StartLeg(t.Context(), s, Line{Delay: leg})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := line.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	for _, c := range []struct {
		from, to *Host
		least    time.Duration
	}{{laptop, near, 2 * delay}, {laptop, far, 2 * (delay + leg)}, {near, far, 2 * (delay + leg)}, {far, farther, 2 * (delay + 2*leg)}} {
		ping := startPing(t, c.from, c.to.Addr(), slowPing)
		got, err := ping.firstReply(directWait)
		ping.stop(t)
		if err != nil || got < c.least || got > c.least+2*delay {
			t.Errorf("round trip from %s to %s is %v, not %v: %v", c.from.Name(), c.to.Name(), got, c.least, err)
		}
	}
}
