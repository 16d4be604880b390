package natlab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlay/overlay"
)

const (
	// remapWait is more than what lies between two checks of a router that
	// announces nothing.
	remapWait   = 75 * time.Second
	stayRelayed = 5 * time.Second
)

// String tells kinds apart.
func (m PortMapping) String() string { return string(m) }

func mappings() []PortMapping { return []PortMapping{MapPCP, MapNATPMP, MapUPnP1, MapUPnP2} }

// TestPortMapping has a laptop whose router gives every flow another port, and
// maps ports, meet one behind such a router that maps none: nothing but the mapped
// port lets them meet directly. The router is the real miniupnpd.
func TestPortMapping(t *testing.T) {
	needLab(t)
	var all figures
	aside(t, mappings(), PortMapping.String, func(t *testing.T, kind PortMapping) { mappingCell(t, &all, kind) })
	all.report(t)
	all.of(whatDirect).atMost(t, 0, slack(mappedWorst))
}

func mustHardHome(t *testing.T, l *Lab, name string, kind PortMapping, carrier *Home) *Home {
	t.Helper()
	h, err := l.HardHome(t.Context(), name, kind, carrier)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// hardPair is a mesh of two laptops in hard homes.
func hardPair(t *testing.T, one, two PortMapping) (m *mesh, a, b *member) {
	t.Helper()
	m = newMesh(t)
	a, b = m.hardMembers(t, one, two, nil)
	return m, a, b
}

func (m *mesh) hardMembers(t *testing.T, one, two PortMapping, carrier *Home) (a, b *member) {
	t.Helper()
	a = m.join(t, mustLaptop(t, mustHardHome(t, m.Lab, "home-a", one, carrier), "a"))
	b = m.join(t, mustLaptop(t, mustHardHome(t, m.Lab, "home-b", two, carrier), "b"))
	return a, b
}

func mappingCell(t *testing.T, all *figures, kind PortMapping) {
	_, a, b := hardPair(t, kind, MapNone)
	r := &race{t: t, all: all, cell: string(kind) + ", hard", a: a, b: b}
	for i := range runs(shortRuns, fullRuns) {
		r.meetMapped(i)
		wantVia(t, b, a, "mapped")
		wantMapped(t, a.home, 1)
	}
}

// meetMapped takes both nodes down and up, and has them meet. What was mapped is
// gone in between.
func (r *race) meetMapped(run int) {
	t := r.t
	t.Helper()
	if err := both(r.a, r.b, func(n *member) error { return n.down(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	wantMapped(t, r.a.home, 0)
	time.Sleep(drained)
	if err := both(r.a, r.b, func(n *member) error { return n.home.Forget(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	if err := both(r.a, r.b, func(n *member) error { return n.up(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	r.meet(run)
}

// TestMappedBehindOneCarrier has two homes behind one NAT of a provider, which
// does not lead back in. What their routers map is on addresses that only those
// behind it reach, and that no server has seen: they travel in signals.
func TestMappedBehindOneCarrier(t *testing.T) {
	needLab(t)
	var all figures
	for _, kind := range []PortMapping{MapPCP, MapShared} {
		t.Run(string(kind), func(t *testing.T) {
			m := newMesh(t)
			carrier := mustCarrier(t, m.Lab, "carrier", Masquerade)
			r := &race{t: t, all: &all, cell: "one carrier, " + string(kind)}
			r.a, r.b = m.hardMembers(t, kind, kind, carrier)
			for i := range runs(shortRuns, fullRuns) {
				r.meetMapped(i)
				if via := pathTo(r.a.status(t), r.b.nodeName).Via; !slices.Contains(strings.Fields("mapped prflx"), via) {
					t.Errorf("a reaches b by %s", via)
				}
			}
		})
	}
	all.report(t)
	all.of(whatDirect).atMost(t, 0, mappedWorst)
}

// wantVia wants a node to reach another by an address found in a certain way.
func wantVia(t *testing.T, n, peer *member, via string) {
	t.Helper()
	if got := pathTo(n.status(t), peer.nodeName); got.Via != via {
		t.Errorf("%s reaches %s by %+v, not %s", n.nodeName, peer.nodeName, got, via)
	}
}

func wantMapped(t *testing.T, h *Home, want int) {
	t.Helper()
	if list, err := h.MappedPorts(t.Context()); err != nil || len(list) != want {
		t.Errorf("the router has mapped %q, %v; want %d", list, err, want)
	}
}

// TestPortMappingOff has the router left alone, which proves, too, that nothing
// but the mapped port lets these two meet.
func TestPortMappingOff(t *testing.T) {
	_, a, b := hardPair(t, MapPCP, MapNone)
	mustDirect(t, a, b)
	if err := both(a, b, func(n *member) error { return n.down(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	time.Sleep(drained)
	if err := both(a, b, func(n *member) error { return n.home.Forget(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	if err := a.up(t.Context(), "--port-mapping", "off"); err != nil {
		t.Fatal(err)
	}
	if err := b.up(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took, err := b.await(t.Context(), stayRelayed, directTo(a.nodeName)); err == nil {
		t.Errorf("direct after %v without a mapped port", took)
	}
	if path := pathTo(b.status(t), a.nodeName); path.Kind != "relay" {
		t.Errorf("the path is %+v", path)
	}
	wantMapped(t, a.home, 0)
}

// TestRouterRestarts has the daemon of the router start anew without its mappings,
// while data flows.
func TestRouterRestarts(t *testing.T) {
	needLab(t)
	list := mappings()
	if testing.Short() {
		list = list[:1]
	}
	for _, kind := range list {
		t.Run(string(kind), func(t *testing.T) {
			_, a, b := hardPair(t, kind, MapNone)
			mustDirect(t, a, b)
			time.Sleep(3 * time.Second) // a clock that is at its beginning cannot go back
			if err := a.home.StopMapper(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantMapped(t, a.home, 0)
			if err := a.home.StartMapper(t.Context(), kind); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			for mapped := false; !mapped; time.Sleep(statusPoll) {
				if time.Since(start) > remapWait {
					t.Fatal("not mapped again")
				}
				list, err := a.home.MappedPorts(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				mapped = len(list) > 0
			}
			t.Logf("%s: mapped again after %v", kind, time.Since(start).Round(time.Millisecond))
			mapped := func(st overlay.Status) bool { return pathTo(st, a.nodeName).Via == "mapped" }
			if _, err := b.await(t.Context(), remapWait, mapped); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPinhole has the firewall of IPv6 opened by PCP, and closed again. A pinhole
// that miniupnpd 2.3.1 was asked for twice, for example because its first answer came
// late, is nobody's any more ("Unauthorized to remove PCP mapping": update_pinhole in
// nftpinhole.c drops the nonce), and is left to end soon.
func TestPinhole(t *testing.T) {
	m := newMeshIn(t, Options{IPv6: true})
	a := m.join(t, mustLaptop(t, mustHardHome(t, m.Lab, "home-a", MapPCP, nil), "a"))
	want := fmt.Sprintf("%x", a.Addr6().As16())
	for start := time.Now(); ; time.Sleep(statusPoll) {
		list, err := a.home.Pinholes(t.Context())
		if err == nil && len(list) == 1 && strings.Contains(list[0], want) {
			break
		}
		if err != nil || time.Since(start) > directWait {
			t.Fatalf("the firewall lets in %q, %v", list, err)
		}
	}
	// The next one asks for what there is, which this miniupnpd does not let it
	// remove after that.
	if err := unix.Kill(a.daemon(t), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.up(t.Context()); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(statusPoll) {
		if text := a.home.mapper.tail(); strings.Contains(text, "updating pinhole") {
			break
		}
		if time.Since(start) > directWait {
			t.Fatal("not asked for again")
		}
	}
	if err := a.down(t.Context()); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(time.Second) {
		list, err := a.home.Pinholes(t.Context())
		if err == nil && len(list) == 0 {
			t.Logf("gone after %v", time.Since(start).Round(time.Second))
			break
		}
		text := a.home.mapper.tail()
		_, after, refused := strings.Cut(text, "Unauthorized to remove")
		if err == nil && testing.Short() && refused && strings.Contains(after, "updating pinhole") {
			break // it is made shorter
		}
		if err != nil || time.Since(start) > pinholeGone || testing.Short() && time.Since(start) > directWait {
			t.Fatalf("after the end the firewall lets in %q, %v\n%s", list, err, text)
		}
	}
}

// pinholeGone is more than the shortest life that miniupnpd gives, which is two
// minutes.
const pinholeGone = 150 * time.Second

// TestBothMap has both routers map a port.
func TestBothMap(t *testing.T) {
	_, a, b := hardPair(t, MapPCP, MapUPnP2)
	took, err := awaitDirect(t.Context(), a, b)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("direct after %v", took)
	for _, pair := range [][2]*member{{a, b}, {b, a}} {
		if via := pathTo(pair[0].status(t), pair[1].nodeName).Via; !slices.Contains(strings.Fields("mapped prflx"), via) {
			t.Errorf("%s reaches %s by %s", pair[0].nodeName, pair[1].nodeName, via)
		}
	}
}

// TestDownWhileMapping takes a node down while its router is being asked for a port,
// at one moment after another: nothing stays mapped.
func TestDownWhileMapping(t *testing.T) {
	needLab(t)
	kinds := []PortMapping{MapPCP, MapNATPMP, MapUPnP2}
	aside(t, kinds, PortMapping.String, func(t *testing.T, kind PortMapping) {
		m := newMesh(t)
		a := m.join(t, mustLaptop(t, mustHardHome(t, m.Lab, "home-a", kind, nil), "a"))
		count := runs(2, 40)
		for i := range count {
			part := func(of time.Duration) time.Duration { return time.Duration(i) * of / time.Duration(count) }
			a.downMapped(t)
			if kind != MapUPnP2 { // whose answers look like others
				a.downUnanswered(t, part(400*time.Millisecond))
			}
			if err := a.up(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(part(100 * time.Millisecond))
		}
		a.downMapped(t)
	})
}

// downMapped takes a node down and wants nothing of it mapped, also a little later.
func (n *member) downMapped(t *testing.T) {
	t.Helper()
	if err := n.down(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantMapped(t, n.home, 0)
	time.Sleep(500 * time.Millisecond)
	wantMapped(t, n.home, 0)
}

// muteRules drop the answers of PCP and of NAT-PMP that say that a port is mapped,
// told by their lengths.
const muteRules = `nft -f - <<'RULES'
table inet mute {
	chain out { type filter hook output priority 0; udp sport 5351 udp length { 24, 68 } counter drop; }
}
RULES`

// downUnanswered takes a node down whose router has mapped its port, but has not said
// so; what it says passes so long after the down began.
func (n *member) downUnanswered(t *testing.T, moment time.Duration) {
	t.Helper()
	var mute, unmute script
	mute.add(muteRules)
	unmute.add("nft delete table inet mute")
	own := n.state() + "/overlay.log"
	before, err := os.ReadFile(own)
	if err := errors.Join(err, n.home.sh(t.Context(), mute), n.up(t.Context())); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(statusPoll) {
		list, err := n.home.MappedPorts(t.Context())
		if err == nil && len(list) == 1 {
			break
		}
		if err != nil || time.Since(start) > directWait {
			t.Fatalf("the router has mapped %q, %v", list, err)
		}
	}
	if after, err := os.ReadFile(own); err != nil || bytes.Contains(after[min(len(before), len(after)):], []byte("ports mapped")) {
		t.Errorf("the node has its answer already, %v: this proves nothing", err)
	}
	var g errgroup.Group
	g.Go(func() error {
		time.Sleep(moment)
		return n.home.sh(t.Context(), unmute)
	})
	n.downMapped(t)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}
