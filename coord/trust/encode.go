package trust

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// The parts of a mesh's IPv6 prefix and of an address under it, in octets.
const (
	ulaBits  = 48
	ulaBytes = ulaBits / 8
)

// The families of an Endpoint on the wire.
const (
	family4 = 4
	family6 = 6
)

func appendString(b []byte, s string) []byte {
	return append(append(b, uint8(len(s))), s...)
}

func appendStrings(b []byte, list []string) []byte {
	b = append(b, uint8(len(list)))
	for _, s := range list {
		b = appendString(b, s)
	}
	return b
}

func appendTime(b []byte, t time.Time) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(t.Unix()))
}

func (g Genesis) appendTo(b []byte) []byte {
	ula := g.ULA.Addr().As16()
	b = append(b, g.MeshID[:]...)
	b = append(b, g.Root[:]...)
	b = append(b, g.Signer[:]...)
	b = append(b, ula[:ulaBytes]...)
	return append(b, g.Pin[:]...)
}

func (s State) appendTo(b []byte) []byte {
	prefix := s.Prefix4.Addr().As4()
	b = binary.BigEndian.AppendUint64(b, s.Epoch)
	b = append(b, s.Prev[:]...)
	b = appendString(b, s.Name)
	b = append(b, prefix[:]...)
	b = append(b, uint8(s.Prefix4.Bits()))
	b = appendStrings(b, s.Servers)
	b = append(b, uint8(len(s.Pins)))
	for _, p := range s.Pins {
		b = append(append(b, p.Hash[:]...), uint8(p.Status))
	}
	b = append(b, uint8(len(s.Signers)))
	for _, k := range s.Signers {
		b = append(b, k[:]...)
	}
	return append(b, s.Policy[:]...)
}

func (c InviteCap) appendTo(b []byte) []byte {
	b = append(b, c.Invite[:]...)
	b = append(b, c.Signer[:]...)
	b = appendTime(b, c.NotBefore)
	b = appendTime(b, c.NotAfter)
	b = binary.BigEndian.AppendUint16(b, c.Uses)
	b = appendString(b, c.Name)
	return appendStrings(b, c.Tags)
}

func (c NodeCert) appendTo(b []byte) []byte {
	ip4, ip6 := c.IP4.As4(), c.IP6.As16()
	b = append(b, c.Invite[:]...)
	b = append(b, c.Device[:]...)
	b = append(b, c.WireGuard[:]...)
	b = appendString(b, c.Name)
	b = append(b, ip4[:]...)
	b = append(b, ip6[:]...)
	b = appendStrings(b, c.Tags)
	b = append(b, uint8(c.Role))
	b = binary.BigEndian.AppendUint64(b, c.Serial)
	return appendTime(b, c.IssuedAt)
}

func (c countersigned) appendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(c.cert)))
	b = append(b, c.cert...)
	b = appendTime(b, c.at)
	return append(b, c.server[:]...)
}

func (r Record) appendTo(b []byte) []byte {
	b = append(b, r.Device[:]...)
	b = binary.BigEndian.AppendUint64(b, r.Serial)
	b = append(b, r.Nonce[:]...)
	b = binary.BigEndian.AppendUint16(b, r.RelayPort)
	b = binary.BigEndian.AppendUint16(b, r.Capabilities)
	b = append(b, uint8(len(r.Candidates)))
	for _, e := range r.Candidates {
		family := uint8(family6)
		if e.Addr.Addr().Is4() {
			family = family4
		}
		b = append(b, family)
		b = append(b, e.Addr.Addr().AsSlice()...)
		b = binary.BigEndian.AppendUint16(b, e.Addr.Port())
		b = append(b, e.Type)
	}
	if len(r.Relays) == 0 {
		return b // as before there were relays
	}
	b = append(b, uint8(len(r.Relays)))
	for _, t := range r.Relays {
		b = append(b, t.Relay[:]...)
		b = binary.BigEndian.AppendUint16(b, t.Trip)
	}
	return b
}

func (r Revocation) appendTo(b []byte) []byte {
	b = append(b, r.Target[:]...)
	b = append(b, r.By[:]...)
	return appendTime(b, r.From)
}

// reader takes a body apart. It returns zeros once the body was too short, so
// that only the end has to be checked.
type reader struct {
	b     []byte
	short bool
}

// whole says that the body had exactly the length of what was read.
func (r *reader) whole() bool { return !r.short && len(r.b) == 0 }

func (r *reader) fill(dst []byte) {
	if r.short || len(r.b) < len(dst) {
		r.short = true
		return
	}
	r.b = r.b[copy(dst, r.b):]
}

func (r *reader) uint8() uint8 {
	var b [1]byte
	r.fill(b[:])
	return b[0]
}

func (r *reader) uint16() uint16 {
	var b [2]byte
	r.fill(b[:])
	return binary.BigEndian.Uint16(b[:])
}

func (r *reader) uint64() uint64 {
	var b [8]byte
	r.fill(b[:])
	return binary.BigEndian.Uint64(b[:])
}

func (r *reader) bytes32() (b [32]byte) {
	r.fill(b[:])
	return b
}

func (r *reader) bytes(n int) []byte {
	if r.short || len(r.b) < n {
		r.short = true
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) string() string { return string(r.bytes(int(r.uint8()))) }

func (r *reader) time() time.Time { return time.Unix(int64(r.uint64()), 0).UTC() }

func (r *reader) addr4() netip.Addr {
	var a [4]byte
	r.fill(a[:])
	return netip.AddrFrom4(a)
}

func (r *reader) addr6() netip.Addr {
	var a [16]byte
	r.fill(a[:])
	return netip.AddrFrom16(a)
}

// list reads a count and that many items, and stops at the end of the body.
func list[T any](r *reader, item func() T) []T {
	var items []T
	for range r.uint8() {
		if r.short {
			return nil
		}
		items = append(items, item())
	}
	return items
}

func readGenesis(r *reader) (g Genesis) {
	r.fill(g.MeshID[:])
	g.Root = r.bytes32()
	g.Signer = r.bytes32()
	var ula [16]byte
	r.fill(ula[:ulaBytes])
	g.ULA = netip.PrefixFrom(netip.AddrFrom16(ula), ulaBits)
	g.Pin = r.bytes32()
	return g
}

func readState(r *reader) (s State) {
	s.Epoch = r.uint64()
	s.Prev = r.bytes32()
	s.Name = r.string()
	s.Prefix4 = netip.PrefixFrom(r.addr4(), int(r.uint8()))
	s.Servers = list(r, r.string)
	s.Pins = list(r, func() Pin { return Pin{Hash: r.bytes32(), Status: PinStatus(r.uint8())} })
	s.Signers = list(r, func() Key { return r.bytes32() })
	s.Policy = r.bytes32()
	return s
}

func readInviteCap(r *reader) (c InviteCap) {
	c.Invite = r.bytes32()
	c.Signer = r.bytes32()
	c.NotBefore = r.time()
	c.NotAfter = r.time()
	c.Uses = r.uint16()
	c.Name = r.string()
	c.Tags = list(r, r.string)
	return c
}

func readNodeCert(r *reader) (c NodeCert) {
	c.Invite = r.bytes32()
	c.Device = r.bytes32()
	c.WireGuard = r.bytes32()
	c.Name = r.string()
	c.IP4 = r.addr4()
	c.IP6 = r.addr6()
	c.Tags = list(r, r.string)
	c.Role = Role(r.uint8())
	c.Serial = r.uint64()
	c.IssuedAt = r.time()
	return c
}

func readCountersigned(r *reader) (c countersigned) {
	c.cert = r.bytes(int(r.uint16()))
	c.at = r.time()
	c.server = r.bytes32()
	return c
}

func readRecord(r *reader) (rec Record) {
	rec.Device = r.bytes32()
	rec.Serial = r.uint64()
	r.fill(rec.Nonce[:])
	rec.RelayPort = r.uint16()
	rec.Capabilities = r.uint16()
	rec.Candidates = list(r, func() Endpoint { return readEndpoint(r) })
	if len(r.b) > 0 {
		rec.Relays = list(r, func() RelayTrip { return RelayTrip{Relay: r.bytes32(), Trip: r.uint16()} })
	}
	return rec
}

func readEndpoint(r *reader) Endpoint {
	var addr netip.Addr
	switch r.uint8() {
	case family4:
		addr = r.addr4()
	case family6:
		addr = r.addr6()
	default:
		r.short = true
	}
	return Endpoint{Addr: netip.AddrPortFrom(addr, r.uint16()), Type: r.uint8()}
}

func readRevocation(r *reader) (rev Revocation) {
	rev.Target = r.bytes32()
	rev.By = r.bytes32()
	rev.From = r.time()
	return rev
}
