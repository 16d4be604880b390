package natlab

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/overlay"
)

const (
	relayDelay  = 15 * time.Millisecond // 30 ms there and back
	relaySettle = 3 * time.Second

	relayMedian = 250 * time.Millisecond
	relayWorst  = 600 * time.Millisecond
	relayUp     = 1500 * time.Millisecond
	// A first reply on a bad line may need a handshake sent again.
	badLegWorst = 6 * time.Second

	relayWait   = 30 * time.Second
	relayHigher = 80 * time.Millisecond
	rechoose    = 2 * time.Minute
)

// relayHost is a standalone relay: a server of its own.
type relayHost struct {
	*Host
	process *Process
}

// addRelay adds a relay to the mesh and waits until every node has a link to
// it.
func (m *mesh) addRelay(t *testing.T, name string) *relayHost {
	t.Helper()
	h := mustServer(t, m.Lab, name)
	invite := strings.TrimSpace(output(t, m.members[0].Host, "overlay", "invite", "--tag", "relay"))
	if !strings.HasPrefix(invite, invitePrefix) {
		t.Fatalf("overlay invite --tag relay prints %q", invite)
	}
	process, err := h.StartRelay(t.Context(), invite)
	if err != nil {
		t.Fatal(err)
	}
	r := &relayHost{Host: h, process: process}
	if m.relays == nil {
		m.relays = map[string]*relayHost{}
	}
	m.relays[name] = r
	for _, n := range m.members {
		if _, err := n.awaitRelay(t.Context(), name, true); err != nil {
			t.Fatalf("%v; the relay says:\n%s", err, process.tail())
		}
	}
	return r
}

// embedded is the name of the relay in the server.
func (m *mesh) embedded() string { return m.server.Addr().String() }

// killRelay kills the relay of a name, which may be the server.
func (m *mesh) killRelay(t *testing.T, name string) {
	t.Helper()
	process := m.coord
	if name != m.embedded() {
		process = m.relays[name].process
	}
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
}

// startRelay starts anew what killRelay killed.
func (m *mesh) startRelay(t *testing.T, name string) {
	t.Helper()
	if name == m.embedded() {
		m.restartCoord(t)
		return
	}
	process, err := m.relays[name].StartRelay(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.relays[name].process = process
}

// awaitRelay waits until the node has a link to a relay, or no longer has.
func (n *member) awaitRelay(ctx context.Context, name string, up bool) (time.Duration, error) {
	start := time.Now()
	for {
		st, err := n.Status(ctx)
		for _, r := range st.Relays {
			if r.Name == name && (r.Transport != "") == up {
				return time.Since(start), nil
			}
		}
		if time.Since(start) > relayWait {
			return 0, fmt.Errorf("%s has relays %+v after %v, waiting for %s, %v (%w)", n.nodeName, st.Relays, relayWait, name, up, err)
		}
		time.Sleep(5 * statusPoll)
	}
}

// relayTo is the name of the relay by which a node reaches another, empty when
// it is not by a relay.
func (n *member) relayTo(t *testing.T, peer *member) StatusPath {
	t.Helper()
	st, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p, err := st.Peer(peer.nodeName)
	if err != nil {
		t.Fatal(err)
	}
	return p.Path
}

// relayedTo asks whether the path to a node is by a relay.
func relayedTo(name string) func(overlay.Status) bool {
	return func(st overlay.Status) bool { return pathTo(st, name).Kind == "relay" }
}

// outside is the address under which the Internet knows a machine.
func (h *Host) outside() netip.Addr {
	if h.home == nil || h.home.nat.routed() {
		return h.Addr()
	}
	return h.home.WAN()
}

// cut and uncut close and open the direct path between two nodes.
func (m *mesh) cut(t *testing.T, a, b *Host) {
	t.Helper()
	if err := m.Cut(t.Context(), a.outside(), b.outside()); err != nil {
		t.Fatal(err)
	}
}

func (m *mesh) uncut(t *testing.T, a, b *Host) {
	t.Helper()
	if err := m.Uncut(t.Context(), a.outside(), b.outside()); err != nil {
		t.Fatal(err)
	}
}

// mix is a pair of networks; cut says that the direct path between them is.
type mix struct {
	one, two NAT
	cut      bool
}

func (x mix) String() string {
	if x.cut {
		return fmt.Sprintf("%s,%s cut", x.one, x.two)
	}
	return fmt.Sprintf("%s,%s", x.one, x.two)
}

// mixes have no direct path: without UDP there would be one over TCP.
func mixes() []mix {
	return []mix{
		{UDPBlocked, Masquerade, true},
		{UDPBlocked, UDPBlocked, true},
		{UDPBlocked, FullCone, true},
		{UDPBlocked, OpenInput, true},
		{UDPBlocked, Public, true},
		{Only443, Masquerade, false},
		{Only443, Only443, false},
		{ProxyOnly, Masquerade, false},
		{ProxyOnly, ProxyOnly, false},
		{ProxyAuth, UDPBlocked, false},
		{Masquerade, Masquerade, true},
	}
}

// pair makes a mesh of two such networks.
func (x mix) pair(t *testing.T, opts Options) (m *mesh, a, b *member) {
	t.Helper()
	opts.Delay = relayDelay
	m = newMeshIn(t, opts)
	one, two := m.laptopAt(t, "a", x.one), m.laptopAt(t, "b", x.two)
	if x.cut {
		m.cut(t, one, two)
	}
	return m, m.join(t, one), m.join(t, two)
}

// TestRelayReach has laptops without a direct path reach each other, again and
// again, 3 s after both daemons started.
func TestRelayReach(t *testing.T) {
	needLab(t)
	var all figures
	aside(t, mixes(), mix.String, func(t *testing.T, x mix) { reach(t, &all, x) })
	all.report(t)
	all.of(whatReply).atMost(t, slack(relayMedian), slack(relayWorst))
	all.of(whatUp).atMost(t, 0, slack(relayUp))
	if testing.Short() {
		return
	}
	for _, g := range all.list {
		if g.What == whatReply {
			g.atMost(t, relayMedian, 0)
		}
	}
}

func reach(t *testing.T, all *figures, x mix) {
	_, a, b := x.pair(t, Options{})
	r := &race{t: t, all: all, a: a, b: b, cell: x.String()}
	for i := range runs(1, fullRuns) {
		r.restart(0)
		time.Sleep(relaySettle)
		from, to := a, b
		if i%2 == 1 {
			from, to = b, a
		}
		ping := startPing(t, from.Host, to.addr, fastPing)
		reply, err := ping.firstReply(directWait)
		ping.stop(t)
		if err != nil {
			t.Errorf("run %d: %v", i, err)
			reply = directWait
		}
		for _, n := range []*member{a, b} {
			all.add(r.cell, whatUp, n.took)
		}
		all.add(r.cell, whatReply, reply)
		relayed(t, a, b)
		relayed(t, b, a)
		if testing.Verbose() {
			t.Logf("%s, run %d: up %v %v, reply %v", r.cell, i, a.took, b.took, reply)
		}
	}
}

// relayed checks what a node says of a path that is relayed: over UDP where
// the network lets it out, otherwise over TLS.
func relayed(t *testing.T, n, peer *member) {
	t.Helper()
	via := "relay-udp"
	switch n.home.nat {
	case UDPBlocked, Only443, ProxyOnly, ProxyAuth:
		via = "relay-tls"
	}
	p := n.relayTo(t, peer)
	if p.Kind != "relay" || p.Via != via || p.Relay == "" || p.Reason == "" {
		t.Errorf("%s says of its path to %s: %+v, not relay by %s with a reason", n.nodeName, peer.nodeName, p, via)
	}
}

// TestRelayOverBadLeg has the server behind a line that is long and loses 3 %.
func TestRelayOverBadLeg(t *testing.T) {
	needLab(t)
	var all figures
	list := []mix{{Masquerade, Masquerade, true}, {UDPBlocked, Masquerade, true}}
	aside(t, list, mix.String, func(t *testing.T, x mix) {
		m, a, b := x.pair(t, Options{})
		leg := m.leg(t, m.server, Line{Delay: 50 * time.Millisecond, Loss: 0.03, Seed: 3})
		defer leg()
		r := &race{t: t, all: &all, a: a, b: b, cell: x.String()}
		for range runs(1, fullRuns) {
			r.restart(0)
			time.Sleep(relaySettle)
			ping := startPing(t, a.Host, b.addr, fastPing)
			reply, err := ping.firstReply(directWait)
			ping.stop(t)
			if err != nil {
				t.Error(err)
				reply = directWait
			}
			all.add(r.cell, whatReply, reply)
		}
		transfer(t, a.Host, b.Host, b.addr, int64(runs(1, 8))<<20)
	})
	all.report(t)
	all.of(whatReply).atMost(t, 0, badLegWorst)
}

// leg starts a leg and gives what ends it.
func (m *mesh) leg(t *testing.T, server *Host, line Line) (end func()) {
	t.Helper()
	d, err := m.StartLeg(t.Context(), server, line)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestNearestRelay has a pair choose, of two relays, the one with the shorter
// way, and in the long form the other when that changes.
func TestNearestRelay(t *testing.T) {
	m, a, b := mix{Masquerade, Masquerade, true}.pair(t, Options{})
	far, err := m.StartLeg(t.Context(), m.server, Line{Delay: relayHigher})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	m.addRelay(t, "r1")
	var all figures
	uses := func(name string) {
		t.Helper()
		start := time.Now()
		ping := startPing(t, a.Host, b.addr, slowPing)
		defer ping.stop(t)
		for a.relayTo(t, b).Relay != name || b.relayTo(t, a).Relay != name {
			if time.Since(start) > rechoose {
				t.Fatalf("paths are %+v and %+v after %v, not by %s", a.relayTo(t, b), b.relayTo(t, a), rechoose, name)
			}
			time.Sleep(slowPing)
		}
		all.add("by the nearer relay", "after", time.Since(start))
	}
	uses("r1")
	if !testing.Short() {
		far.Set(Line{})
		defer m.leg(t, m.relays["r1"].Host, Line{Delay: relayHigher})()
		uses(m.embedded())
	}
	all.report(t)
}
