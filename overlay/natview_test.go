package overlay

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/punch"
)

// samplesOf are what three ports of a server saw of some sockets.
func samplesOf(sockets int, mapped func(socket, server int) uint16) []punch.Sample {
	var list []punch.Sample
	start := time.Now()
	for i := range sockets {
		for j := range 3 {
			list = append(list, punch.Sample{
				Local:  uint16(50000 + i),
				Server: netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(3478+j)),
				Mapped: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), mapped(i, j)),
				At:     start.Add(time.Duration(len(list)) * time.Millisecond),
			})
		}
	}
	return list
}

func TestNATStatus(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("192.168.1.2")}
	next := uint16(20000)
	for name, x := range map[string]struct {
		mapped                 func(socket, server int) uint16
		own                    []netip.Addr
		mapping, text, verdict string
	}{
		"none": {
			func(i, _ int) uint16 { return uint16(50000 + i) }, append(own, netip.MustParseAddr("203.0.113.1")),
			noNAT, "none: the address is the machine's own", "no NAT: direct paths work with every network",
		},
		"masquerade": {
			func(i, _ int) uint16 { return uint16(50000 + i) }, own,
			endpointIndependent, "one port for all destinations (endpoint-independent), the machine's own", "direct paths work with nearly all networks",
		},
		"sequential": {
			func(_, _ int) uint16 { next++; return next }, own,
			addressPortDependent, "another port for every destination (address-and-port-dependent), in steps of 1", "direct with easy NATs by prediction",
		},
		"random": {
			func(i, j int) uint16 { return uint16(1024 + (i*7919+j*30011)%60000) }, own,
			addressPortDependent, "another port for every destination (address-and-port-dependent), chosen at random", "at random",
		},
	} {
		t.Run(name, func(t *testing.T) {
			samples := samplesOf(spareSockets, x.mapped)
			st := natStatus(samples, x.own)
			if st.Mapping != x.mapping || st.Text() != x.text {
				t.Errorf("%+v: %q", st, st.Text())
			}
			n := Netcheck{Asked: 3, Answered: 3, UDP: udpPasses, NAT: st, Online: true}
			n.conclude(false)
			if !strings.Contains(n.Verdict, x.verdict) || st.hard() != (len(n.Help) > 0) {
				t.Errorf("%q, help %q", n.Verdict, n.Help)
			}
		})
	}
}

func TestVerdictWithoutUDP(t *testing.T) {
	for _, x := range []struct {
		n    Netcheck
		mute bool
		want string
	}{
		{Netcheck{}, false, "the server is not reached"},
		{Netcheck{Online: true}, false, "no server tells where to ask"},
		{Netcheck{Asked: 3}, false, "neither the server nor anything over UDP"},
		{Netcheck{Asked: 3, Online: true, UDP: udpBlocked}, false, "UDP is blocked: paths go over relays by TLS, or directly by TCP"},
		{Netcheck{Asked: 3, Online: true, UDP: udpBlocked}, true, "UDP is blocked, here or at the server"},
		{Netcheck{Asked: 3, Online: true, UDP: udpPasses, IPv6: FamilyLook{Answered: 3}, Answered: 3}, false, "only IPv6 passes"},
		{Netcheck{Asked: 3, Online: true, UDP: udpPasses, IPv4: FamilyLook{Answered: 1}, Answered: 1}, false, "does not tell the kind of NAT"},
	} {
		x.n.conclude(x.mute)
		if !strings.HasPrefix(x.n.Verdict, x.want) && !strings.Contains(x.n.Verdict, x.want) {
			t.Errorf("%+v: want %q", x.n, x.want)
		}
		if (x.n.UDP == udpBlocked) != (len(x.n.Help) > 0) {
			t.Errorf("help %q", x.n.Help)
		}
	}
}

// TestVerdictAfterTheServerDied claims nothing that was not seen, while the relay in the
// server still counts as one that is reached.
func TestVerdictAfterTheServerDied(t *testing.T) {
	for _, x := range []struct {
		four look
		n    Netcheck
		udp  string
		want string
	}{
		{look{asked: 1}, Netcheck{Online: true, Relays: []RelayStatus{{Transport: "udp"}}}, "", "nothing answers over UDP any more"},
		{look{asked: 1}, Netcheck{Online: true, Relays: []RelayStatus{{Transport: "tls"}}}, udpBlocked, "UDP is blocked"},
		{look{}, Netcheck{Online: true, Relays: []RelayStatus{{Transport: "udp"}}}, udpPasses, "a relay answers over UDP, but no server tells"},
	} {
		x.n.take(x.four, look{}, nil)
		x.n.conclude(false)
		if x.n.UDP != x.udp || !strings.Contains(x.n.Verdict, x.want) {
			t.Errorf("UDP %q, %q; want %q, %q", x.n.UDP, x.n.Verdict, x.udp, x.want)
		}
	}
}

// TestPeersNAT reads the peer's mapping from the addresses at which servers saw it.
func TestPeersNAT(t *testing.T) {
	at := func(list ...string) (all []netip.AddrPort) {
		for _, a := range list {
			all = append(all, netip.MustParseAddrPort(a))
		}
		return all
	}
	for _, x := range []struct {
		seen []netip.AddrPort
		host string
		want string
	}{
		{at(), "192.168.1.2:5", ""},
		{at("203.0.113.1:5"), "192.168.1.2:5", endpointIndependent},
		{at("203.0.113.1:5"), "203.0.113.1:5", noNAT},
		{at("203.0.113.1:5", "203.0.113.1:6"), "192.168.1.2:5", endpointDependent},
		{at("203.0.113.1:5", "203.0.113.2:5"), "192.168.1.2:5", endpointIndependent},
		{at("[2001:db8::1]:5", "[2001:db8::1]:6"), "192.168.1.2:5", ""},
	} {
		named := []punch.Candidate{{Addr: netip.MustParseAddrPort(x.host), Type: punch.Host}}
		if got := mappingSeen(x.seen, named); got != x.want {
			t.Errorf("%v: %q, want %q", x.seen, got, x.want)
		}
	}
}

// The words of status are those of punch.
func TestMappingWords(t *testing.T) {
	for b, want := range map[punch.Behavior]string{
		0:                             "",
		punch.EndpointIndependent:     endpointIndependent,
		punch.AddressDependent:        addressDependent,
		punch.AddressAndPortDependent: addressPortDependent,
	} {
		if got := describeNAT(punch.NAT{Mapping: b}).Mapping; got != want {
			t.Errorf("%v: %q, want %q", b, got, want)
		}
	}
}
