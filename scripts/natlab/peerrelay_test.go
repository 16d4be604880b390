package natlab

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlay/overlay"
)

const (
	// nearDelay is one way between any two, farLeg more to the server: 10 ms and
	// 100 ms there and back.
	nearDelay = 5 * time.Millisecond
	farLeg    = 45 * time.Millisecond

	peerRelayWait  = 40 * time.Second
	peerRelaySpare = 15 * time.Second       // a pair that would be moved is by then
	changeTime     = time.Second            // before the first says that it has changed
	serverPings    = 2 * time.Second        // are looked at before the change
	serverTrip     = 180 * time.Millisecond // there and back by the server at least

	whatMoved = "by the peer after"
)

// peerCell is a pair without a direct path, a server far from everybody, and a
// third node near both that others reach.
type peerCell struct {
	*mesh
	a, b, third *member
}

func newPeerCell(t *testing.T, place func(*mesh) *Host) *peerCell {
	t.Helper()
	m := newMeshIn(t, Options{Delay: nearDelay})
	t.Cleanup(m.leg(t, m.server, Line{Delay: farLeg}))
	c := &peerCell{mesh: m}
	c.third = m.join(t, place(m))
	c.a, c.b = m.join(t, m.laptopAt(t, "a", Random)), m.join(t, m.laptopAt(t, "b", Random))
	return c
}

// atServer is a machine with a public address.
func atServer(t *testing.T) func(*mesh) *Host {
	return func(m *mesh) *Host { return mustServer(t, m.Lab, "carol") }
}

// byPeer asks whether the path to a node is by another node.
func byPeer(name, third string) func(overlay.Status) bool {
	return func(st overlay.Status) bool {
		p := pathTo(st, name)
		return p.Kind == "relay" && p.Via == "peer-relay" && p.Relay == third
	}
}

// wantByPeer waits until both go by the third, and gives how long the first of them
// took, and the last.
func (c *peerCell) wantByPeer(t *testing.T) (first, last time.Duration) {
	t.Helper()
	var took [2]time.Duration
	var g errgroup.Group
	for i, pair := range [][2]*member{{c.a, c.b}, {c.b, c.a}} {
		g.Go(func() (err error) {
			took[i], err = pair[0].await(t.Context(), peerRelayWait, byPeer(pair[1].nodeName, c.third.nodeName))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	return min(took[0], took[1]), max(took[0], took[1])
}

func (c *peerCell) wantByServer(t *testing.T) {
	t.Helper()
	for _, pair := range [][2]*member{{c.a, c.b}, {c.b, c.a}} {
		if p := pathTo(pair[0].status(t), pair[1].nodeName); p.Kind != "relay" || p.Via == "peer-relay" {
			t.Errorf("%s reaches %s by %+v", pair[0].nodeName, pair[1].nodeName, p)
		}
	}
}

// trip is the median round trip of pings, of which some have to be answered.
func trip(t *testing.T, echoes []echo) time.Duration {
	t.Helper()
	var list []time.Duration
	for _, e := range echoes {
		if e.ok {
			list = append(list, e.back-e.sent)
		}
	}
	if len(list) == 0 {
		t.Fatalf("none of %d pings was answered", len(echoes))
	}
	slices.Sort(list)
	return list[len(list)/2]
}

// TestPeerRelay has a pair that cannot meet directly use a node with a public
// address nearby instead of the server's relay far away, as soon as its owner lets
// it, without a lost ping; and the server's again when he no longer does, or when
// the node dies.
func TestPeerRelay(t *testing.T) {
	needLab(t)
	var all figures
	c := newPeerCell(t, atServer(t))
	if err := c.third.up(t.Context(), "--peer-relay", "off"); err != nil {
		t.Fatal(err)
	}
	ping := startPing(t, c.a.Host, c.b.addr, 4*quickPing)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatal(err)
	}
	if testing.Short() {
		time.Sleep(serverPings)
	} else {
		time.Sleep(peerRelaySpare)
	}
	c.wantByServer(t)
	if st := c.third.status(t); st.Self.PeerRelay != nil {
		t.Errorf("relays although it is switched off: %+v", st.Self.PeerRelay)
	}
	for range runs(0, 5) {
		c.switchOn(t, &all, ping)
		at := ping.now()
		if err := c.third.up(t.Context(), "--peer-relay", "off"); err != nil {
			t.Fatal(err)
		}
		c.awaitServer(t, &all, ping, "switched off", at)
	}
	c.switchOn(t, &all, ping)
	at := ping.now()
	if err := unix.Kill(c.third.daemon(t), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.awaitServer(t, &all, ping, "killed", at)
	all.report(t)
	all.of(whatGap).atMost(t, relayKilledBar, relayKilledBar)
}

// switchOn has the third relay, and the pair move to it without losing anything.
func (c *peerCell) switchOn(t *testing.T, all *figures, ping *pinger) {
	t.Helper()
	from := ping.now()
	if err := c.third.up(t.Context(), "--peer-relay", "on"); err != nil {
		t.Fatal(err)
	}
	on := ping.now()
	first, took := c.wantByPeer(t)
	time.Sleep(4 * time.Second)
	relays := c.third.status(t).Self.PeerRelay
	if relays == nil || relays.Flows != 1 || relays.Nodes != 2 || relays.Bytes == 0 {
		t.Errorf("the third says of what it relays: %+v", relays)
	}
	echoes, until := ping.so(), ping.now()-2*inFlight
	before := trip(t, sentBetween(echoes, from-serverPings, from))
	after := trip(t, sentBetween(echoes, on+took+time.Second, until))
	moved := sentBetween(echoes, on+first-changeTime, until)
	t.Logf("%v by the server, %v by the peer after %v and %v, %d of %d lost", before, after, first, took, lost(moved), len(moved))
	// The short form runs on busy machines, where the lab itself may lose one.
	if before < serverTrip || after >= before/2 || lost(moved) > runs(1, 0) || len(moved) == 0 {
		t.Error("that is too many, or too slow")
	}
	all.add("public third", whatMoved, took)
}

// awaitServer has the pair move back to the server's relay after something.
func (c *peerCell) awaitServer(t *testing.T, all *figures, ping *pinger, after string, at time.Duration) {
	t.Helper()
	time.Sleep(2*relayKilledBar + time.Second)
	c.wantByServer(t)
	gap := longestGap(answeredSince(ping.so(), at-inFlight))
	t.Logf("%s: gap %v", after, gap)
	all.add(after, whatGap, gap)
}

// so gives the pings so far.
func (p *pinger) so() []echo {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.echoes)
}

// TestPeerRelayMapped has the third behind a NAT whose router maps ports, of the
// kinds there are.
func TestPeerRelayMapped(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("TestPeerRelay and TestPortMapping are the short form")
	}
	for _, kind := range mappings() {
		t.Run(string(kind), func(t *testing.T) {
			c := newPeerCell(t, func(m *mesh) *Host { return mustLaptop(t, mustHardHome(t, m.Lab, "home-c", kind, nil), "carol") })
			ping := startPing(t, c.a.Host, c.b.addr, 4*quickPing)
			if _, err := ping.firstReply(directWait); err != nil {
				t.Fatal(err)
			}
			_, took := c.wantByPeer(t)
			wantMapped(t, c.third.home, 2)
			moved := ping.now()
			time.Sleep(5 * time.Second)
			rtt := trip(t, sentBetween(ping.stop(t), moved+time.Second, moved+5*time.Second))
			t.Logf("%s: %v by the peer after %v", kind, rtt, took)
			if rtt >= serverTrip/2 {
				t.Errorf("a round trip takes %v", rtt)
			}
			if err := c.third.down(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantMapped(t, c.third.home, 0)
		})
	}
}

// TestPeerRelayIsLeftAlone has a pair that meets directly, and one whose server is
// near: nobody sends anything to the third's relay.
func TestPeerRelayIsLeftAlone(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("overlay tests the choice")
	}
	for _, nat := range []NAT{Masquerade, Random} {
		t.Run(string(nat), func(t *testing.T) {
			m := newMeshIn(t, Options{Delay: time.Millisecond})
			third := m.join(t, mustServer(t, m.Lab, "carol"))
			a, b := m.join(t, m.laptopAt(t, "a", nat)), m.join(t, m.laptopAt(t, "b", nat))
			ping := startPing(t, a.Host, b.addr, slowPing)
			if _, err := ping.firstReply(directWait); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * peerRelaySpare)
			relays := third.status(t).Self.PeerRelay
			if relays == nil || relays.Nodes != 0 || relays.Bytes != 0 {
				t.Errorf("the third says of what it relays: %+v", relays)
			}
			if p := pathTo(a.status(t), b.nodeName); p.Via == "peer-relay" || (p.Kind == "direct") != (nat == Masquerade) {
				t.Errorf("the path is %+v", p)
			}
		})
	}
}
