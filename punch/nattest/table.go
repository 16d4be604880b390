package nattest

import (
	"math/rand/v2"
	"net/netip"
	"sync"
)

// Table is the state of a NAT for who moves real packets through it; a World has
// its own. It is safe for concurrent use.
type Table struct {
	mu sync.Mutex
	t  *table
}

// NewTable makes the empty table of a NAT.
func NewTable(nat NAT, seed uint64) *Table {
	return &Table{t: newTable(nat, rand.New(rand.NewPCG(seed, seed)))}
}

// Outbound returns the source that a packet from inside to remote leaves with.
func (t *Table) Outbound(inside, remote netip.AddrPort, wan netip.Addr) netip.AddrPort {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.outbound(inside, remote, wan)
}

// Inbound returns the inner destination of a packet from remote to outside, and
// whether it passes.
func (t *Table) Inbound(remote, outside netip.AddrPort) (netip.AddrPort, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.inbound(remote, outside)
}

// Hairpin says that a packet from inside to the NAT's own address may pass.
func (t *Table) Hairpin() bool { return t.t.nat.Hairpin }

// Flush forgets every mapping, as a reboot does.
func (t *Table) Flush() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.t.flush()
}

// Each calls f for every flow that lives; f must not use the table.
func (t *Table) Each(f func(inside, outside, remote netip.AddrPort)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.t.byPort {
		if !t.t.held(m) {
			continue
		}
		for remote := range m.flows {
			f(m.inside, m.outside, remote)
		}
	}
}
