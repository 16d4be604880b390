package portmap

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestEpoch(t *testing.T) {
	for _, test := range []struct {
		before, now uint32
		passed      time.Duration
		want        bool
	}{
		{1000, 1060, time.Minute, true},
		{1000, 1058, time.Minute, true},
		{1000, 1066, time.Minute, true},
		{1000, 1067, time.Minute, false}, // too fast
		{1000, 1050, time.Minute, false}, // too slow
		{1000, 999, 0, true},
		{1000, 998, 0, false}, // back
		{1000, 0, time.Hour, false},
		{5, 0, 0, false},
		{0, 0, 0, true},
		{4294967290, 4294967295, 5 * time.Second, true},
		{1000, 4294967295, time.Second, false},
		{1000, 1000 + 3500, time.Hour, true}, // within a sixteenth
		{1000, 1000 + 3300, time.Hour, false},
	} {
		if got := continues(test.before, test.now, test.passed); got != test.want {
			t.Errorf("from %d to %d in %v: %v", test.before, test.now, test.passed, got)
		}
	}
	var e epoch
	at := time.Now()
	e.note(100, at)
	e.note(0, at.Add(time.Second))
	e.note(1, at.Add(2*time.Second))
	if !e.lost() {
		t.Error("the restart is forgotten before there is a new mapping")
	}
	if e.mapped(); e.lost() {
		t.Error("lost although mapped anew")
	}
}

func TestPCP(t *testing.T) {
	r := newRouter(t)
	p := newPCP(r.route(), testPort, []byte("secret"))
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := p.find(short); err == nil {
		t.Error("found at a router that does not speak it")
	}
	r.set(func() { r.pcp, r.lost = true, 2 })
	if err := p.find(timely(t)); err != nil {
		t.Fatal(err)
	}
	got := mustAsk(t, p, netip.AddrPortFrom(outer(), testPort))
	mustBe(t, p, got, true)
	r.reboot()
	mustBe(t, p, got, false)
	r.set(func() { r.external = netip.MustParseAddrPort("203.0.113.8:7000") })
	got = mustAsk(t, p, netip.MustParseAddrPort("203.0.113.8:7000"))
	mustBe(t, p, got, true)
	if err := p.remove(timely(t), got); err != nil || r.has(testPort) != 0 {
		t.Errorf("not removed: %v", err)
	}
	r.set(func() { r.result = 8 })
	if _, err := p.ask(timely(t), wanted()); !isRefusal(err) {
		t.Errorf("result 8 gives %v", err)
	}
}

// A firewall of IPv6 is asked for the address itself.
func TestPCPOverIPv6(t *testing.T) {
	loop := netip.IPv6Loopback()
	r := newRouterAt(t, loop)
	outer := netip.MustParseAddr("2001:db8::7")
	r.set(func() { r.pcp, r.external = true, netip.AddrPortFrom(outer, 0) })
	p := newPCP(Route{Gateway: loop, Local: loop}, testPort, []byte("secret"))
	if err := p.find(timely(t)); err != nil {
		t.Fatal(err)
	}
	got := mustAsk(t, p, netip.AddrPortFrom(outer, testPort))
	mustBe(t, p, got, true)
	if err := p.remove(timely(t), got); err != nil || r.has(testPort) != 0 {
		t.Errorf("not removed: %v", err)
	}
}

func isRefusal(err error) bool {
	_, ok := errors.AsType[*refusal](err)
	return ok
}

// A program that was killed comes back with its nonce; one with another is
// refused.
func TestPCPNonce(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pcp = true })
	at := netip.AddrPortFrom(outer(), testPort)
	mustAsk(t, newPCP(r.route(), testPort, []byte("secret")), at)
	mustAsk(t, newPCP(r.route(), testPort, []byte("secret")), at)
	if _, err := newPCP(r.route(), testPort, []byte("other")).ask(timely(t), wanted()); !isRefusal(err) {
		t.Errorf("another's mapping is renewed: %v", err)
	}
	elsewhere := r.route()
	elsewhere.Gateway = netip.MustParseAddr("127.9.9.9")
	one, other := newPCP(r.route(), testPort, []byte("secret")), newPCP(elsewhere, testPort, []byte("secret"))
	if one.nonce == other.nonce {
		t.Error("two routers get to know one nonce")
	}
}

// Answers that are not to our request are no answers.
func TestPCPLies(t *testing.T) {
	r := newRouter(t)
	p := newPCP(r.route(), testPort, []byte("secret"))
	request := pcpRequest(pcpMap, local(), lifetime)
	request = append(request, p.nonce[:]...)
	request = append(request, protocolUDP, 0, 0, 0, testPort>>8, testPort&0xff, 0, 1)
	request = appendIP(request, netip.MustParseAddr("198.51.100.66"))
	truth := slices.Concat([]byte{2, 0x81, 0, 0}, request[4:8], make([]byte, 16), request[24:])
	lie := func(at int) []byte {
		b := slices.Clone(truth)
		b[at] ^= 1
		return b
	}
	r.set(func() {
		r.pcp = true
		r.lies = [][]byte{
			lie(24), lie(35), // nonce
			lie(36), lie(41), // protocol, port
			lie(1), truth[:56], truth[:10], append(slices.Clone(truth), 0), {}, request,
		}
	})
	mustAsk(t, p, netip.AddrPortFrom(outer(), testPort))
	r.set(func() { r.lies = [][]byte{truth} })
	got, err := p.ask(timely(t), wanted())
	if err != nil || got.external.Addr() != netip.MustParseAddr("198.51.100.66") {
		t.Errorf("the test's own lie is badly made: %v, %v", got, err)
	}
}

// Another host of the network cannot answer for the router.
func TestAnswersOfOthersAreIgnored(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pmp, r.lost = true, 1 })
	other, err := net.ListenUDP("udp4", udpAddr(loopback(), routerPort))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	n := newNATPMP(r.route(), testPort)
	err = exchange(timely(t), r.route(), []byte{0, 0}, func(b []byte) bool {
		reply, err := parsePMP(b)
		if err != nil || reply.address != outer() {
			t.Errorf("got %v, %v", reply, err)
		}
		return true
	})
	if err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel()
	r.set(func() { r.pmp = false })
	forged := append([]byte{0, 0x80, 0, 0, 0, 0, 0, 1}, 198, 51, 100, 66)
	conn, err := net.DialUDP("udp4", udpAddr(local(), 0), udpAddr(r.addr, routerPort))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := other.WriteToUDPAddrPort(forged, conn.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if k, err := conn.Read(make([]byte, 100)); err == nil {
		t.Errorf("the kernel hands over %d bytes of another host", k)
	}
	if ip, err := n.address(ctx); err == nil {
		t.Errorf("the outer address is %v", ip)
	}
}

func TestNATPMP(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pmp = true })
	if err := newPCP(r.route(), testPort, nil).find(timely(t)); !errors.Is(err, errVersion) {
		t.Errorf("PCP is found at a router that only speaks NAT-PMP: %v", err)
	}
	n := newNATPMP(r.route(), testPort)
	if err := n.find(timely(t)); err != nil {
		t.Fatal(err)
	}
	got := mustAsk(t, n, netip.AddrPortFrom(outer(), testPort))
	mustBe(t, n, got, true)
	r.reboot()
	mustBe(t, n, got, false)
	got = mustAsk(t, n, netip.AddrPortFrom(outer(), testPort))
	r.set(func() { r.external = netip.MustParseAddrPort("203.0.113.8:7000") })
	mustBe(t, n, got, false)
	got = mustAsk(t, n, netip.MustParseAddrPort("203.0.113.8:7000"))
	if err := n.remove(timely(t), got); err != nil || r.has(testPort) != 0 {
		t.Errorf("not removed: %v", err)
	}
	r.set(func() { r.result = 2 })
	if _, err := n.ask(timely(t), wanted()); !isRefusal(err) {
		t.Errorf("result 2 gives %v", err)
	}
}

// A closed port is known at once.
func TestClosedPort(t *testing.T) {
	start := time.Now()
	route := Route{Gateway: loopback(), Local: local()}
	for _, p := range []protocol{newPCP(route, testPort, nil), newNATPMP(route, testPort)} {
		if err := p.find(timely(t)); err == nil || errors.Is(err, errNoAnswer) {
			t.Errorf("%s: %v", p.name(), err)
		}
	}
	if took := time.Since(start); took > requestGap {
		t.Errorf("it took %v", took)
	}
}

func FuzzPCP(f *testing.F) {
	f.Add([]byte{2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(append([]byte{2, 0x81}, make([]byte, 58)...))
	f.Add([]byte{0, 0x81, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parsePCP(b)
		if err == nil && (r.lifetime < 0 || r.lifetime > maxLifetime || len(b) < pcpHeader || len(b) > maxPCP) {
			t.Errorf("%x gives %+v", b, r)
		}
		isAnnouncement(b)
	})
}

func FuzzNATPMP(f *testing.F) {
	f.Add([]byte{0, 0x80, 0, 0, 0, 0, 0, 1, 203, 0, 113, 7})
	f.Add([]byte{0, 0x81, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 0, 0, 0, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parsePMP(b)
		if err == nil && r.opcode == pmpAddress && r.result == pmpSuccess && !r.address.Is4() {
			t.Errorf("%x gives %+v", b, r)
		}
	})
}

// What a router does not let be removed gets the shortest life instead.
func TestPCPShortens(t *testing.T) {
	r := newRouter(t)
	r.set(func() { r.pcp, r.keeps = true, true })
	p := newPCP(r.route(), testPort, randomSecret())
	got := mustAsk(t, p, netip.AddrPortFrom(outer(), testPort))
	if err := p.remove(timely(t), got); err == nil || !strings.Contains(err.Error(), "gone in 2m0s") {
		t.Errorf("%v", err)
	}
	if r.set(func() {}); r.granted != 120 {
		t.Errorf("lives for %d s more", r.granted)
	}
}
