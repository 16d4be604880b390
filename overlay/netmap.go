package overlay

import (
	"bytes"
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/tun"
)

// keepalive holds NAT mappings open; most NATs keep a used UDP mapping for 30 s
// or longer.
const keepalive = 25 * time.Second

// member is another node of the mesh whose documents verified.
type member struct {
	node   coord.Node
	cert   trust.NodeCert
	record trust.Record
	order  int // of acceptance: the first to claim a name or address keeps it
}

// peer says whether the member is a WireGuard peer; relays are not.
func (m *member) peer() bool { return m.cert.Role == trust.RoleNode }

// roster is the verified netmap. Nothing enters it on the server's word alone.
// It is not safe for concurrent use.
type roster struct {
	self    trust.Key
	mesh    *trust.Mesh
	members map[trust.Key]*member
	state   trust.Document // the last one that came; empty: as at joining
	count   int            // of members ever accepted
	log     *slog.Logger
}

func newRoster(m *membership, log *slog.Logger) (*roster, error) {
	mesh, err := trust.NewMesh(m.TrustHash, m.Genesis, m.State)
	if err != nil {
		return nil, fmt.Errorf("verify the mesh: %w", err)
	}
	self, err := mesh.Admit(m.Cap, m.Cert)
	if err != nil {
		return nil, fmt.Errorf("verify this machine's certificate: %w", err)
	}
	return &roster{self: self.Device, mesh: mesh, members: map[trust.Key]*member{}, log: log}, nil
}

// apply takes in a netmap, whole or a delta, and returns the peers that are
// gone and those that are new or changed, without relays. A member goes only by a signed
// revocation: were the server's word enough, it could give the name and the
// addresses of one device to another. Whom the server no longer names is
// offline.
func (r *roster) apply(m *coord.Netmap, whole bool) (gone []punch.Key, changed []punch.Peer) {
	if len(m.State) > 0 {
		if err := r.mesh.UpdateState(m.State); err != nil {
			r.log.Warn("mesh state refused", "err", err)
		} else {
			r.state = m.State
		}
	}
	for _, d := range m.Revocations {
		if err := r.mesh.AddRevocation(d); err != nil {
			r.log.Warn("revocation refused", "err", err)
		}
	}
	for _, d := range r.dropped() {
		gone = append(gone, punch.Key(r.members[d].cert.WireGuard))
		delete(r.members, d)
	}
	silent := m.Removed
	if whole {
		silent = append(r.missing(m.Nodes), m.Removed...)
	}
	for _, d := range silent {
		if old := r.members[d]; old != nil && old.node.Online {
			old.node.Online = false
			if old.peer() {
				changed = append(changed, old.punchPeer())
			}
		}
	}
	for _, n := range m.Nodes {
		if r.admit(n) && r.members[n.Device].peer() {
			changed = append(changed, r.members[n.Device].punchPeer())
		}
	}
	return gone, changed
}

// dropped lists the members that the mesh no longer holds: revoked, whether the
// server removes them or not.
func (r *roster) dropped() []trust.Key {
	var gone []trust.Key
	for d := range r.members {
		if _, ok := r.mesh.Device(d); !ok {
			gone = append(gone, d)
		}
	}
	return gone
}

// device finds the member that a WireGuard key belongs to.
func (r *roster) device(k punch.Key) (*member, bool) {
	for _, m := range r.members {
		if punch.Key(m.cert.WireGuard) == k {
			return m, true
		}
	}
	return nil, false
}

func (r *roster) missing(nodes []coord.Node) []trust.Key {
	listed := map[trust.Key]bool{}
	for _, n := range nodes {
		listed[n.Device] = true
	}
	var silent []trust.Key
	for d := range r.members {
		if !listed[d] {
			silent = append(silent, d)
		}
	}
	return silent
}

// admit verifies one node and says whether it is a member to configure.
func (r *roster) admit(n coord.Node) bool {
	if n.Device == r.self {
		return false
	}
	cert, err := r.mesh.Admit(n.Cap, n.Cert)
	if err == nil && cert.Device != n.Device {
		err = fmt.Errorf("the certificate is another device's")
	}
	if err != nil {
		r.log.Warn("node refused", "device", n.Device, "err", err)
		return false
	}
	m := r.members[n.Device]
	if m == nil {
		r.count++
		m = &member{order: r.count}
		r.members[n.Device] = m
	}
	known := m.node.Record
	m.node, m.cert = n, cert
	rec, ok := r.newerRecord(m.record, n)
	if ok && !m.peer() && len(rec.Candidates) == 0 {
		ok = len(m.record.Candidates) == 0 // a relay that looks for its address is where it was
	}
	if ok {
		m.record = rec
	} else {
		m.node.Record = known // for the cache: a server that restarted has none
	}
	return true
}

// newerRecord gives a node's record unless a newer one is known; the server may
// be behind or replay.
func (r *roster) newerRecord(known trust.Record, n coord.Node) (trust.Record, bool) {
	if len(n.Record) == 0 {
		return trust.Record{}, false
	}
	rec, err := trust.OpenRecord(n.Record)
	if err != nil || rec.Device != n.Device {
		r.log.Warn("node record refused", "device", n.Device, "err", err)
		return trust.Record{}, false
	}
	return rec, rec.Serial >= known.Serial
}

// peers is what the data plane is to be configured with.
func (r *roster) peers(own punch.Key) []tun.Peer {
	list := make([]tun.Peer, 0, len(r.members))
	for _, m := range r.members {
		if !m.peer() {
			continue
		}
		list = append(list, tun.Peer{
			Key:        tun.Key(m.cert.WireGuard),
			AllowedIPs: []netip.Prefix{host(m.cert.IP4), host(m.cert.IP6)},
			Handle:     m.cert.IP6,
			Keepalive:  keepalive,
			Initiate:   bytes.Compare(own[:], m.cert.WireGuard[:]) < 0,

			Capabilities: tun.Capabilities(m.record.Capabilities),
		})
	}
	return list
}

// snapshot is the roster as the cache keeps it.
func (r *roster) snapshot() cache {
	c := cache{State: r.state, Revocations: r.mesh.Revocations()}
	for _, m := range slices.SortedFunc(maps.Values(r.members), func(a, b *member) int { return cmp.Compare(a.order, b.order) }) {
		c.Nodes = append(c.Nodes, m.node)
	}
	return c
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// punchPeer is the member as the punching agent sees it.
func (m *member) punchPeer() punch.Peer {
	p := punch.Peer{
		Key:    punch.Key(m.cert.WireGuard),
		Nonce:  m.record.Nonce,
		Online: m.node.Online,
	}
	for _, e := range m.record.Candidates {
		p.Candidates = append(p.Candidates, punch.Candidate{Addr: e.Addr, Type: punch.CandidateType(e.Type)})
	}
	return p
}
