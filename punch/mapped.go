package punch

import (
	"net/netip"
	"slices"
	"time"
)

// maxMapped is how many port-mapped candidates there are: of IPv4 and, where a
// router translates it, of IPv6.
const maxMapped = 2

// SetMapped replaces the addresses that lead to our UDP port from everywhere
// because a router was asked for it. Peers learn them in signals, and their checks
// go there without openers. Whether they may be published is the caller's to judge.
func (a *Agent) SetMapped(list []netip.AddrPort) {
	mapped := make([]netip.AddrPort, 0, maxMapped)
	for _, addr := range list {
		addr = plain(addr)
		if probeable(addr) && !slices.Contains(mapped, addr) && len(mapped) < maxMapped {
			mapped = append(mapped, addr)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.Equal(mapped, a.mapped) {
		return
	}
	a.mapped = mapped
	a.refresh(time.Now())
}

// mappedBeside gives the port-mapped candidates, but for those that are an
// address of ours anyway: a firewall was opened there. One that a server saw as
// well stays: it is open to more than that server.
func (a *Agent) mappedBeside(hosts []Candidate) []Candidate {
	var list []Candidate
	for _, addr := range a.mapped {
		if !slices.ContainsFunc(hosts, func(c Candidate) bool { return c.Addr == addr }) {
			list = append(list, Candidate{Addr: addr, Type: PortMapped})
		}
	}
	return list
}

// reachesAll reports whether nothing before the address of a pair has to be
// opened from the inside first.
func (a *Agent) reachesAll(q *pair) bool {
	return q.relayed() || q.typ == PortMapped || a.near(q.addr)
}
