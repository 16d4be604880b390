package tun

// Drops counts what a Device received and did not pass on since Open. The zero
// value is that of a new Device.
type Drops struct {
	Foreign    uint64 // datagrams of no kind that is taken there, or of no flow of the relay they come from
	Fragments  uint64 // fragments that fit to no peer's session and path, or are broken
	Incomplete uint64 // messages of which some fragments came, but not all
	Broken     uint64 // containers with a record that is not valid
	Forged     uint64 // packets in containers, with a source that is not the peer's
}

// Drops are those until now.
func (d *Device) Drops() Drops {
	b, t := &d.bind.drops, &d.tunnel.dropped
	return Drops{
		Foreign:    b.foreign.Load(),
		Fragments:  b.fragments.Load(),
		Incomplete: b.incomplete.Load(),
		Broken:     t.broken.Load(),
		Forged:     t.forged.Load(),
	}
}

// Segments is how many packets of a super-packet one message to a peer may hold
// now: 1, 4 or 64, which means all. It is 1 for peers that take no large messages
// and 0 for unknown ones.
func (d *Device) Segments(k Key) int {
	p := d.peers.byKey(k)
	switch {
	case p == nil:
		return 0
	case !p.large.Load() || p.inner4.Load() == nil:
		return levelPlain
	}
	return p.level.segments()
}
