package natlab

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlay/punch"
)

// Tracked is what a router has in its table at one moment, or the most of each of
// several moments.
type Tracked struct {
	// All are the flows, Search those of them by which the two nodes look for each
	// other: neither with a server or the Internet's core nor with the router itself,
	// and not those of strangers. Ports are the outer ports that these leave from, and
	// Aimed is at how many ports of one address they are aimed.
	All    int `json:"all"`
	Search int `json:"search"`
	Ports  int `json:"ports"`
	Aimed  int `json:"aimed"`
}

func (t Tracked) most(u Tracked) Tracked {
	return Tracked{All: max(t.All, u.All), Search: max(t.Search, u.Search), Ports: max(t.Ports, u.Ports), Aimed: max(t.Aimed, u.Aimed)}
}

// within says that nothing is more than in the limit.
func (t Tracked) within(limit Tracked) bool {
	return t.Search <= limit.Search && t.Ports <= limit.Ports && t.Aimed <= limit.Aimed
}

// The limits of a hard round: packets, each of which may make a flow, and sockets.
const (
	lawPackets = 1200
	lawSockets = 256
	// lawTCP is how many addresses of a peer are tried by TCP at a time.
	lawTCP = 4
)

// Limit is what looking for each other may leave in a router's table: one flow for
// each candidate of the peer, from one port, the same the other way round where the
// router takes in what comes unasked, and what a hard round may, where there is one:
// of a block of ports half, both of the own ones and of those that are aimed at. A
// node makes one round in a minute, so no run has two.
func (c Cell) Limit() Tracked {
	const named = punch.MaxCandidates + lawTCP
	l := Tracked{Search: 2 * named, Ports: 1 + lawTCP, Aimed: named}
	aimed, sockets := 0, 0
	for _, n := range []NAT{c.One.NAT, c.One.Carrier, c.Two.NAT, c.Two.Carrier} {
		switch half := n.block() / 2; {
		case half > 0:
			aimed, sockets = max(aimed, half), max(sockets, lawSockets, half)
		case n.guessed():
			aimed, sockets = max(aimed, lawPackets), max(sockets, lawSockets)
		}
	}
	if sockets > 0 { // and every candidate is reached from a port of its own
		l.Search += lawPackets
		l.Ports += punch.MaxCandidates + sockets
		l.Aimed += aimed
	}
	if c.Together != "" { // both nodes are behind one router
		l.Search, l.Ports, l.Aimed = 2*l.Search, 2*l.Ports, 2*l.Aimed
	}
	return l
}

// guessed says that the ports of a router can only be guessed.
func (n NAT) guessed() bool {
	return slices.Contains([]NAT{Sequential, SequentialDown, Random, Block512, Block, Block2048, AddressMapped, RandomOpen, Stride}, n)
}

// block is how many ports a router gives out; 0: it has no block.
func (n NAT) block() int { return map[NAT]int{Block512: 512, Block: 1024, Block2048: 2048}[n] }

// watchRouters looks at the tables of all routers until the context ends. A router
// that cannot tell now is asked again soon, one that never could is an error: nothing
// seen would be within every limit.
func (p *Pair) watchRouters(ctx context.Context, run *Run) error {
	const pace = 50 * time.Millisecond
	limit, looks, failed := p.cell.Limit(), make([]int, len(p.routers)), make([]error, len(p.routers))
	for ctx.Err() == nil {
		var searches [][]trackedFlow
		for i, r := range p.routers {
			t, search, err := r.tracked(p.strangers)
			if err != nil {
				failed[i] = err
				continue
			}
			looks[i]++
			searches = append(searches, search)
			run.Routers = run.Routers.most(t)
			if run.Excess == "" && !t.within(limit) {
				run.Excess = fmt.Sprintf("router %s has %+v in its table, the limit is %+v", r.name, t, limit)
			}
		}
		for i, a := range searches {
			for _, b := range searches[i+1:] {
				run.Fits = max(run.Fits, fits(a, b))
			}
		}
		time.Sleep(pace)
	}
	if i := slices.Index(looks, 0); i >= 0 {
		return fmt.Errorf("the table of router %s was never read: %w", p.routers[i].name, cmp.Or(failed[i], ctx.Err()))
	}
	return nil
}

// trackedFlow is a flow in a router's table: who began it with whom, and where it
// seems to come from.
type trackedFlow struct {
	from    netip.Addr
	to      netip.AddrPort
	outside netip.AddrPort
}

// fits counts the flows of one router with which one of the other fits: each leads
// to where the other seems to come from.
func fits(one, other []trackedFlow) (n int) {
	ways := map[[2]netip.AddrPort]bool{}
	for _, f := range one {
		ways[[2]netip.AddrPort{f.outside, f.to}] = true
	}
	for _, f := range other {
		if ways[[2]netip.AddrPort{f.to, f.outside}] {
			n++
		}
	}
	return n
}

// tracked counts what the router's table has, and gives the flows of the search.
func (h *Home) tracked(strangers []*Host) (t Tracked, search []trackedFlow, err error) {
	flows, err := h.flows()
	if err != nil {
		return t, nil, err
	}
	ports, aimed := map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{}
	at := map[netip.Addr]int{}
	t.All = len(flows)
	for _, f := range flows {
		to := f.to.Addr()
		own := to == h.router() || to.IsMulticast() || to == netip.IPv4Unspecified()
		if own || served(f.from) || served(to) || slices.ContainsFunc(strangers, func(s *Host) bool { return s.addr == f.from }) {
			continue
		}
		search = append(search, f)
		if f.outside.Addr() == h.WAN() {
			ports[f.outside] = true
		}
		if to != h.WAN() && !aimed[f.to] { // what comes in unasked goes there
			aimed[f.to] = true
			at[to]++
			t.Aimed = max(t.Aimed, at[to])
		}
	}
	t.Search, t.Ports = len(search), len(ports)
	return t, search, nil
}

// served says that an address is a server's or the core's.
func served(a netip.Addr) bool {
	return netip.PrefixFrom(gateway(), 24).Contains(a) || netip.PrefixFrom(serverPrefix6(0).Addr(), 48).Contains(a)
}

// flows are all in the tables of the kernel and of the program that translates.
func (h *Home) flows() (all []trackedFlow, err error) {
	err = h.inside(func() error {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			list, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				return fmt.Errorf("list flows of %s: %w", h.name, err)
			}
			for _, f := range list {
				all = append(all, trackedFlow{
					from: ipOf(f.Forward.SrcIP), to: netip.AddrPortFrom(ipOf(f.Forward.DstIP), f.Forward.DstPort),
					outside: netip.AddrPortFrom(ipOf(f.Reverse.DstIP), f.Reverse.DstPort),
				})
			}
		}
		return nil
	})
	if h.table != nil {
		h.table.Each(func(inside, outside, remote netip.AddrPort) {
			all = append(all, trackedFlow{from: inside.Addr(), to: remote, outside: outside})
		})
	}
	return all, err
}

func ipOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
