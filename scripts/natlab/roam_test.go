package natlab

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

const (
	roamBar = 2 * time.Second

	roamSettle = time.Second
	roamWatch  = 4 * time.Second
	linkDown   = 5 * time.Second

	whatGap = "longest gap"
)

// roamer is a laptop a whose network changes while it pings a peer b or, in
// runs with an odd number, the peer pings it.
type roamer struct {
	all  *figures
	a, b *member
	run  int
}

// during runs an event in the middle of ten pings a second, and returns all
// pings.
func (r *roamer) during(t *testing.T, cell string, event func(context.Context) error) []echo {
	t.Helper()
	mustDirect(t, r.a, r.b)
	from, to := r.a, r.b
	if r.run%2 == 1 {
		from, to = to, from
	}
	ping := startPing(t, from.Host, to.addr, slowPing)
	if _, err := ping.firstReply(directWait); err != nil {
		t.Fatalf("%s: before the event: %v", cell, err)
	}
	time.Sleep(roamSettle)
	if err := event(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(roamWatch)
	if _, err := ping.replyAfter(ping.now(), directWait); err != nil {
		t.Errorf("%s: after the event: %v", cell, err)
	}
	return ping.stop(t)
}

func (r *roamer) gap(t *testing.T, cell string, event func(context.Context) error) {
	t.Helper()
	gap := longestGap(r.during(t, cell, event))
	t.Logf("%s, run %d: gap %v", cell, r.run, gap)
	r.all.add(cell, whatGap, gap)
}

// TestRoamingToAnotherHome carries a laptop from home to home: address,
// default route and public address are replaced.
func TestRoamingToAnotherHome(t *testing.T) {
	needLab(t)
	var all figures
	for _, peer := range kinds() {
		if testing.Short() && peer != Masquerade {
			continue
		}
		t.Run("peer "+string(peer), func(t *testing.T) { roamTo(t, &all, peer) })
	}
	all.report(t)
	all.of(whatGap).atMost(t, roamBar, roamBar)
}

func roamTo(t *testing.T, all *figures, peer NAT) {
	m, a, b := pair(t, Masquerade, peer)
	r := &roamer{all: all, a: a, b: b}
	homes := map[NAT]*Home{}
	for _, kind := range kinds() {
		homes[kind] = mustHome(t, m.Lab, "to-"+string(kind), kind)
	}
	for i := range runs(1, 5) {
		for k, kind := range kinds() {
			r.run = i + k
			cell := fmt.Sprintf("to %s, peer %s", kind, peer)
			r.gap(t, cell, func(ctx context.Context) error { return a.MoveTo(ctx, homes[kind]) })
		}
	}
}

// TestAddressReplaced gives a laptop another address in the same LAN. The
// flows of the address it just had still hold their ports in the router; those
// of older ones do not, as nobody changes address every six seconds.
func TestAddressReplaced(t *testing.T) {
	var all figures
	_, a, b := pair(t, Masquerade, Masquerade)
	r := &roamer{all: &all, a: a, b: b}
	for r.run = range runs(2, 10) {
		old := a.Addr()
		r.gap(t, "other address", a.renumber)
		var s script
		s.add("conntrack -D -s %s", old)
		if err := a.home.sh(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	all.report(t)
	all.of(whatGap).atMost(t, moveMedian, moveWorst)
}

// renumber replaces the address and the default route.
func (h *Host) renumber(ctx context.Context) error {
	addr, err := h.home.lease(h.name, true)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var s script
	s.add("ip addr flush dev eth0 scope global")
	s.add("ip addr add %s dev eth0", addr)
	s.add("ip route replace default via %s dev eth0", h.gateway)
	h.addr = addr.Addr()
	return h.sh(ctx, s)
}

// TestLinkDown takes a laptop's link away for a while: traffic is back at once
// when the link is.
func TestLinkDown(t *testing.T) {
	var all figures
	_, a, b := pair(t, Masquerade, Masquerade)
	r := &roamer{all: &all, a: a, b: b}
	for r.run = range runs(2, 10) {
		echoes := r.during(t, "link down", func(ctx context.Context) error {
			if err := a.SetLink(ctx, false); err != nil {
				return err
			}
			time.Sleep(linkDown)
			return a.SetLink(ctx, true)
		})
		all.add("link down 5 s", "gap beyond it", longestGap(echoes)-linkDown)
	}
	all.report(t)
	all.of("gap beyond it").atMost(t, roamBar, roamBar)
}

// TestRouterReboots has a router forget its mappings and get another public
// address, which no link event tells the laptop.
func TestRouterReboots(t *testing.T) {
	needLab(t)
	var all figures
	list := slices.DeleteFunc(kinds(), func(kind NAT) bool { return kind == Public || testing.Short() && kind == FullCone })
	aside(t, list, func(kind NAT) string { return string(kind) }, func(t *testing.T, kind NAT) { routerReboots(t, &all, kind) })
	all.report(t)
	all.of(whatGap).atMost(t, slack(moveMedian), slack(moveWorst))
}

func routerReboots(t *testing.T, all *figures, kind NAT) {
	_, a, b := pair(t, kind, Masquerade)
	r := &roamer{all: all, a: a, b: b}
	for i := range runs(2, 10) {
		r.run = i
		r.gap(t, string(kind)+" reboots", a.home.Reboot)
		r.gap(t, string(kind)+" gets another address", func(ctx context.Context) error {
			if err := a.home.SetWAN(ctx, netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)})); err != nil {
				return err
			}
			return a.home.Reboot(ctx)
		})
	}
}
