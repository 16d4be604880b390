package natlab

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

const lanReply = 100 * time.Millisecond

// TestOneLAN has two laptops behind one router talk over the LAN itself.
func TestOneLAN(t *testing.T) {
	m := newMesh(t)
	home := mustHome(t, m.Lab, "home", Masquerade)
	a := m.join(t, mustLaptop(t, home, "a"))
	b := m.join(t, mustLaptop(t, home, "b"))
	var all figures
	r := &race{t: t, all: &all, a: a, b: b, cell: "one LAN"}
	for i := range runs(5, fullRuns) {
		r.again(0, i)
		for from, to := range map[*member]*member{a: b, b: a} {
			if got := endpointOf(t, from, to); got.Addr() != to.Addr() {
				t.Errorf("run %d: endpoint of %s is %s, not at its LAN address %s", i, to.nodeName, got, to.Addr())
			}
		}
	}
	all.report(t)
	all.of(whatReply).atMost(t, lanReply, replyWorst)
	all.of(whatUp).atMost(t, upMedian, 0)
}

// endpointOf is the endpoint by which a node reaches another, as its status
// says.
func endpointOf(t *testing.T, n, peer *member) netip.AddrPort {
	t.Helper()
	path := pathTo(n.status(t), peer.nodeName)
	endpoint, err := netip.ParseAddrPort(path.Endpoint)
	if err != nil {
		t.Fatalf("path from %s to %s is %+v: %v", n.nodeName, peer.nodeName, path, err)
	}
	return endpoint
}

// TestWireGuardShowsTheEndpoint compares what WireGuard's own tool says with
// the status, for every pair of different routers.
func TestWireGuardShowsTheEndpoint(t *testing.T) {
	needLab(t)
	list := kinds()
	if testing.Short() {
		list = []NAT{Masquerade}
	}
	for _, one := range list {
		t.Run(string(one), func(t *testing.T) {
			_, a, b := pair(t, one, Masquerade)
			mustDirect(t, a, b)
			checkEndpoint(t, a, b)
			checkEndpoint(t, b, a)
			if got := endpointOf(t, a, b); got.Addr() != b.home.WAN() {
				t.Errorf("%s is reached at %s, not at its router %s", b.nodeName, got, b.home.WAN())
			}
		})
	}
}

func checkEndpoint(t *testing.T, n, peer *member) {
	t.Helper()
	want := fmt.Sprintf("%s\t%s\n", peer.status(t).Self.PublicKey, endpointOf(t, n, peer))
	if got := output(t, n.Host, "wg", "show", overlayDevice, "endpoints"); got != want {
		t.Errorf("wg show on %s says %q, status %q", n.nodeName, got, want)
	}
}

// TestStatusOfTheProgram reads the status as scripts do.
func TestStatusOfTheProgram(t *testing.T) {
	_, a, b := pair(t, Masquerade, FullCone)
	mustDirect(t, a, b)
	st, err := a.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := st.Peer("b")
	if err != nil {
		t.Fatal(err)
	}
	if !st.Self.Online || !peer.Online || peer.IPv4 != b.addr || peer.Path.Kind != "direct" {
		t.Errorf("status of a: %+v", st)
	}
	if peer.RTTms < 40 || peer.RTTms > 80 {
		t.Errorf("round trip to b is %v ms", peer.RTTms)
	}
	want := fmt.Sprintf("%s\n%s\n", peer.IPv4, peer.IPv6)
	if got := output(t, a.Host, "overlay", "ip", "b"); got != want {
		t.Errorf("overlay ip b says %q, not %q", got, want)
	}
}

// TestMeetInLANWithoutServer kills the server and carries both laptops into a LAN
// where neither has been: they find each other there by themselves.
func TestMeetInLANWithoutServer(t *testing.T) {
	m, a, b := pair(t, Masquerade, Masquerade)
	mustDirect(t, a, b)
	if err := m.coord.Kill(); err != nil {
		t.Fatal(err)
	}
	var all figures
	for run := range runs(1, 10) {
		cafe := mustHome(t, m.Lab, fmt.Sprintf("cafe%d", run), Masquerade)
		for _, n := range []*member{a, b} {
			if err := n.MoveTo(t.Context(), cafe); err != nil {
				t.Fatal(err)
			}
		}
		ping := startPing(t, a.Host, b.addr, fastPing)
		reply, err := ping.firstReply(directWait)
		ping.stop(t)
		if err != nil {
			t.Fatalf("run %d: %v", run, err)
		}
		all.add("another LAN, no server", whatReply, reply)
		if got := endpointOf(t, a, b); got.Addr() != b.Addr() {
			t.Errorf("run %d: endpoint of b is %s, not at its LAN address %s", run, got, b.Addr())
		}
	}
	all.report(t)
	all.of(whatReply).atMost(t, time.Second, replyWorst)
}
