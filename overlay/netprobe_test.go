package overlay

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"

	"overlay/punch"
)

// stunServer answers on three ports of the loopback. What it does about an answer
// from elsewhere is for the test to say.
type stunServer struct {
	conns   []*net.UDPConn
	servers []punch.Server
	change  func(port int) (socket int, ok bool) // which answers; false: none
	replies func() bool                          // whether an answer to another port arrives; nil: it knows of none
	longest int                                  // datagram that arrives; 0: any
}

func startSTUN(t *testing.T, s *stunServer) *stunServer {
	t.Helper()
	return startSTUNAt(t, s, "127.0.0.1")
}

func startSTUNAt(t *testing.T, s *stunServer, ip string) *stunServer {
	t.Helper()
	var running sync.WaitGroup
	for range 3 {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(ip)})
		if err != nil {
			t.Fatal(err)
		}
		s.conns = append(s.conns, c)
		s.servers = append(s.servers, punch.Server{Addr: c.LocalAddr().(*net.UDPAddr).AddrPort(), Username: []byte("anna"), Key: []byte("secret")})
	}
	for i := range s.conns {
		running.Go(func() { s.serve(i) })
	}
	t.Cleanup(func() {
		for _, c := range s.conns {
			c.Close()
		}
		running.Wait()
	})
	return s
}

func (s *stunServer) serve(i int) {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := s.conns[i].ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if s.longest > 0 && n > s.longest {
			continue
		}
		out := punch.AnswerBinding(buf[:n], from, func([]byte) ([]byte, []byte, bool) { return []byte("secret"), nil, true })
		by, ok := i, out != nil
		if change := punch.ChangeOf(buf[:n]); ok && change != (punch.Change{}) && s.change != nil {
			if by, ok = s.change(i); change.Address {
				ok = false
			}
		}
		if port := punch.ReplyPort(buf[:n]); ok && port != 0 && s.replies != nil {
			from, ok = netip.AddrPortFrom(from.Addr(), port), s.replies()
		}
		if ok {
			s.conns[by].WriteToUDPAddrPort(out, from)
		}
	}
}

func TestLookAround(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	for name, x := range map[string]struct {
		change    func(int) (int, bool)
		filtering string
	}{
		"unknown to the server": {nil, ""},
		"let in":                {func(i int) (int, bool) { return (i + 1) % 3, true }, atMostAddressDependent},
		"kept out":              {func(int) (int, bool) { return 0, false }, addressPortDependent},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSTUN(t, &stunServer{change: x.change})
			l, err := lookAround(t.Context(), "udp4", s.servers, own)
			if err != nil {
				t.Fatal(err)
			}
			if l.asked != 3 || len(l.answered) != 3 || len(l.replies) != 3*spareSockets || len(l.samples) != 3*spareSockets {
				t.Errorf("%d asked, %d replies, %d samples", l.asked, len(l.replies), len(l.samples))
			}
			if l.nat.Mapping != noNAT || l.nat.Filtering != x.filtering {
				t.Errorf("%+v, want filtering %q", l.nat, x.filtering)
			}
			var f FamilyLook
			if l.into(&f); f.Asked != 3 || f.Answered != 3 || f.RTTms == nil {
				t.Errorf("%+v", f)
			}
		})
	}
}

// Nothing answers, and there is nothing to ask.
func TestLookAroundInSilence(t *testing.T) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	silent := []punch.Server{{Addr: c.LocalAddr().(*net.UDPAddr).AddrPort()}}
	for count, servers := range [][]punch.Server{{}, silent} {
		l, err := lookAround(t.Context(), "udp4", servers, nil)
		if err != nil || l.asked != count || len(l.samples) != 0 || l.nat != (NATStatus{}) {
			t.Errorf("%+v (%v)", l, err)
		}
	}
}

// A network may keep one port of the server from us: the others tell all that is
// asked.
func TestFirstServerSilent(t *testing.T) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	silent := punch.Server{Addr: c.LocalAddr().(*net.UDPAddr).AddrPort(), Username: []byte("anna"), Key: []byte("secret")}
	s := startSTUN(t, &stunServer{change: func(i int) (int, bool) { return (i + 1) % 3, true }, replies: func() bool { return true }})
	var n Netcheck
	if err := n.examine(t.Context(), nil, append([]punch.Server{silent}, s.servers...)); err != nil {
		t.Fatal(err)
	}
	if n.Asked != 4 || n.Answered != 3 || n.NAT.Filtering != atMostAddressDependent || n.MTU == nil || *n.MTU != 1500 {
		t.Errorf("%d of %d answered, filtering %q, MTU %v", n.Answered, n.Asked, n.NAT.Filtering, n.MTU)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.live(ctx, NetcheckRequest{Lifetime: true}); err == nil || len(n.answered) != 3 || n.answered[0].Addr != s.servers[0].Addr {
		t.Errorf("lifetimes (%v) asked of %v", err, n.answered)
	}
}

// Two sockets without a NAT reach each other, which is all that hairpin asks.
func TestHairpin(t *testing.T) {
	s := startSTUN(t, &stunServer{})
	list, err := openSpares("udp4", 2)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(list)
	var l look
	if err := l.sample(t.Context(), list, s.servers); err != nil {
		t.Fatal(err)
	}
	if err := l.hairpin(t.Context(), list); err != nil || l.nat.Hairpin == nil || !*l.nat.Hairpin {
		t.Errorf("%+v (%v)", l.nat, err)
	}
	for i := range l.samples { // nobody is there
		l.samples[i].Mapped = s.servers[0].Addr
	}
	if err := l.hairpin(t.Context(), list); err != nil || l.nat.Hairpin == nil || *l.nat.Hairpin {
		t.Errorf("%+v (%v)", l.nat, err)
	}
}

// TestFiltering has the first server reach a socket that has sent to another one
// only, and where it does not, tells how much depends on ports.
func TestFiltering(t *testing.T) {
	let := func(i int) (int, bool) { return (i + 1) % 3, true }
	bar := func(int) (int, bool) { return 0, false }
	for name, x := range map[string]struct {
		change func(int) (int, bool)
		passes bool
		want   string
	}{
		"none":               {let, true, endpointIndependent},
		"by address":         {let, false, addressDependent},
		"by address or port": {bar, false, addressPortDependent},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSTUN(t, &stunServer{change: x.change, replies: func() bool { return x.passes }})
			other := startSTUNAt(t, &stunServer{}, "127.0.0.2")
			got, err := filteringOf(t.Context(), "udp4", append(s.servers, other.servers...))
			if err != nil || got != x.want {
				t.Errorf("%q (%v), want %q", got, err, x.want)
			}
		})
	}
}

// Where no server answers to another port, nobody but the first one can tell.
func TestFilteringByOneServer(t *testing.T) {
	s := startSTUN(t, &stunServer{change: func(i int) (int, bool) { return (i + 1) % 3, true }})
	other := startSTUNAt(t, &stunServer{}, "127.0.0.2")
	for _, list := range [][]punch.Server{s.servers, append(s.servers, other.servers...)} {
		if got, err := filteringOf(t.Context(), "udp4", list); err != nil || got != atMostAddressDependent {
			t.Errorf("%q (%v)", got, err)
		}
	}
}

// TestPathMTU sends padded questions, of which the server hears those up to a size.
func TestPathMTU(t *testing.T) {
	for longest, want := range map[int]int{1500: 1500, 1300: 1300, 1000: 668, 100: 0} {
		s := startSTUN(t, &stunServer{longest: longest - headers4})
		if got, err := pathMTU(t.Context(), "udp4", s.servers[0]); err != nil || got != want {
			t.Errorf("%d (%v) of %d", got, err, longest)
		}
	}
}
