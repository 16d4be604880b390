package tun

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// emit passes packets on as long as there is room.
func (r *reader) emit() {
	for !r.full() {
		i := r.shelf.turn()
		if i == noSlot {
			return
		}
		r.pass(i)
	}
}

// pass passes the packet on whose turn it is, or a part of it.
func (r *reader) pass(i int) {
	p := &r.shelf.slots[i]
	to := r.route(p.packet)
	if to != nil && p.cut.left() == 0 {
		trip := time.Duration(to.trip.Load())
		if trip > 0 && r.shelf.late(i, r.now, trip) && !r.slow(p) {
			r.shelf.take(i, false)
			return
		}
	}
	addr, able := r.takes(to)
	switch {
	case p.head.kind != kindNone:
		r.passSuper(i, to, addr, able)
	case able && r.small(len(p.packet)):
		r.passSmall(i, to, addr)
	default:
		r.passPlain(i, to)
	}
}

// place says that buffer i has a message of n bytes with packets of a slot.
func (r *reader) place(i, n int, slot int) {
	r.sizes[i] = n
	r.count = max(r.count, i+1)
	r.placed[r.shelf.slots[slot].queue] = i + 1
}

// next is the next buffer for what is cut or packed.
func (r *reader) next() []byte { return r.bufs[r.out][r.offset:] }

// passPlain makes the packet a message of its own.
func (r *reader) passPlain(i int, to *peer) {
	p := &r.shelf.slots[i]
	b := r.next()
	r.shelf.spend(i, len(p.packet))
	if len(p.packet) <= len(b) && (p.head.flags&needsSum == 0 || complete(p.packet, p.head)) && r.charge(to, len(p.packet)) {
		r.place(r.out, copy(b, p.packet), i)
		r.out++
	}
	r.shelf.take(i, false)
}

// passSuper passes a super-packet on whole, or in parts.
func (r *reader) passSuper(i int, to *peer, addr netip.Addr, able bool) {
	p := &r.shelf.slots[i]
	if p.cut.left() == 0 {
		p.step = 1
		if able {
			p.step, p.kind = r.parts(p, to.level.segments())
		}
		if p.step >= levelWhole {
			r.passWhole(i, p.kind, to, addr)
			return
		}
		if !p.cut.start(p.packet, p.head) {
			r.shelf.take(i, false)
			return
		}
	}
	step := p.step
	if !able {
		step = 1 // no longer
	}
	for !r.full() && p.cut.left() > 0 {
		r.cut(i, step, p.kind, to, addr)
	}
	if p.cut.left() == 0 {
		r.shelf.take(i, false)
	}
}

// parts is how many segments of a super-packet one message takes, levelWhole for
// all, and of which kind its record is.
func (r *reader) parts(p *shelved, level int) (step int, kind uint8) {
	if level <= 1 {
		return 1, 0
	}
	s, segment := piece{data: p.packet, layout: layoutOf(p.packet)}, int(p.head.segment)
	kind = s.layout.superKind()
	switch {
	case !s.layout.matches(p.head) || !s.is(kind, segment):
		return 1, 0
	case level >= levelWhole && len(p.packet) <= r.largest:
		return levelWhole, kind
	}
	return max(1, min(level, levelWhole-1, (r.largest-s.layout.headers)/segment)), kind
}

// passWhole makes a super-packet one message, in its place. Behind other packets
// of its flow in this call it must have a later buffer.
func (r *reader) passWhole(i int, kind uint8, to *peer, addr netip.Addr) {
	p := &r.shelf.slots[i]
	if i < r.placed[p.queue] {
		r.stuck = true
		return
	}
	n := len(p.packet)
	r.shelf.spend(i, n)
	passes := r.charge(to, n)
	if passes {
		b := r.bufs[i][r.offset:]
		r.place(i, r.record(b, kind, n, int(p.head.segment), to, addr), i)
	}
	r.shelf.take(i, passes)
}

// record makes the super-packet of n bytes behind the headers in b a container.
func (r *reader) record(b []byte, kind uint8, n, segment int, p *peer, to netip.Addr) int {
	putRecord(b[ipv4HeaderSize:], kind, n, segment)
	return r.seal(b, p, to, recordAt+n, recordAt+r.largest+reportRecord)
}

// cut makes the next message of a super-packet.
func (r *reader) cut(i, step int, kind uint8, to *peer, addr netip.Addr) {
	s, b, n := &r.shelf.slots[i].cut, r.next(), 0
	if step > 1 && s.left() > 1 {
		if n = s.chunk(b[recordAt:], step); n > 0 {
			n = r.record(b, kind, n, s.segment, to, addr)
		}
	} else {
		n = s.next(b)
	}
	r.shelf.spend(i, n)
	if n > 0 && r.charge(to, n) {
		r.place(r.out, n, i)
		r.out++
	}
}

// Where TCP's congestion control reads that a queue is long (RFC 3168 §5).
const (
	ecnMask    = 3
	ecnNone    = 0
	ecnOverran = 3
)

// slow tells the flow of a packet to slow down: by a mark where the flow
// understands it, else by the loss of one segment. It reports false when
// nothing is left.
func (r *reader) slow(p *shelved) bool {
	if mark(p.packet) {
		return true
	}
	l := layoutOf(p.packet)
	segment := int(p.head.segment)
	if p.head.kind == kindNone || segment == 0 || !l.matches(p.head) || len(p.packet)-l.headers <= segment {
		return false
	}
	size := len(p.packet) - segment
	if last := (len(p.packet) - l.headers) % segment; last > 0 {
		size = len(p.packet) - last
	}
	p.packet = p.packet[:size]
	g := group{layout: l, packets: [][]byte{p.packet}}
	g.resize(size)
	if l.flow.proto == unix.IPPROTO_TCP {
		p.packet[l.transport+tcpFlags] &^= flagFIN | flagPSH
	}
	binary.BigEndian.PutUint16(p.packet[l.transport+l.sumOffset():], fold(l.pseudo(size)))
	return true
}

// mark says in the IP header that a queue was long, and reports whether the flow
// reads that.
func mark(p []byte) bool {
	switch {
	case len(p) >= ipv4HeaderSize && p[0]>>4 == 4 && p[1]&ecnMask != ecnNone:
		// By the difference alone (RFC 1624 §3): a header that was damaged
		// stays so.
		before := uint64(be16(p))
		p[1] |= ecnOverran
		rest := uint64(^uint16(be16(p[10:]))) + uint64(^uint16(before)) + uint64(be16(p))
		binary.BigEndian.PutUint16(p[10:], ^fold(rest))
		return true
	case len(p) >= ipv6HeaderSize && p[0]>>4 == 6 && p[1]>>4&ecnMask != ecnNone:
		p[1] |= ecnOverran << 4
		return true
	}
	return false
}
