package tun

import (
	"net/netip"
	"time"
)

// maxBoxes bounds the containers that are open at a time; one more peer closes
// the oldest.
const maxBoxes = 8

// box is a container of small packets being filled. It holds its place among
// the messages from the first packet on.
type box struct {
	peer  *peer
	to    netip.Addr // of the container
	head  virtio     // of the first packet
	index int        // of the buffer
	size  int        // so far
	count int        // packets
}

// packer holds the open containers of one Read, the oldest first. The zero
// value has none.
type packer struct {
	boxes [maxBoxes]box
	count int
}

// of finds the box of a peer, nil when there is none.
func (k *packer) of(p *peer) *box {
	for i := range k.boxes[:k.count] {
		if k.boxes[i].peer == p {
			return &k.boxes[i]
		}
	}
	return nil
}

// remove takes a box out.
func (k *packer) remove(x *box) {
	for i := range k.boxes[:k.count] {
		if &k.boxes[i] == x {
			copy(k.boxes[i:], k.boxes[i+1:k.count])
			k.count--
			k.boxes[k.count] = box{}
			return
		}
	}
}

// small reports whether a packet of n bytes leaves room for another in a
// container of one datagram.
func (r *reader) small(n int) bool { return recordAt+n+recordHeaderSize+ipv4HeaderSize <= r.mtu }

// passSmall puts the packet into the container of its peer, or begins one with
// it.
func (r *reader) passSmall(i int, to *peer, addr netip.Addr) {
	p := &r.shelf.slots[i]
	n := len(p.packet)
	if packetSize(p.packet) != n { // the far side would find no end
		r.passPlain(i, to)
		return
	}
	kind := uint8(recordFull)
	if p.head.flags&needsSum != 0 {
		if l := layoutOf(p.packet); l.matches(p.head) {
			kind = recordPartial
		} else if !complete(p.packet, p.head) {
			r.shelf.take(i, false)
			return
		}
	}
	x := r.pack.of(to)
	if x != nil && (x.size+recordHeaderSize+n > r.mtu || x.index < r.placed[p.queue]-1) {
		r.ship(x)
		x = nil
	}
	if x == nil {
		x = r.open(to, addr, p.head)
	}
	out := r.bufs[x.index][r.offset+x.size:]
	putRecord(out, kind, n, 0)
	copy(out[recordHeaderSize:], p.packet)
	x.size += recordHeaderSize + n
	x.count++
	r.bytes -= n
	r.shelf.spend(i, n)
	r.placed[p.queue] = x.index + 1
	r.shelf.take(i, false)
}

// open begins a container in the next buffer.
func (r *reader) open(to *peer, addr netip.Addr, head virtio) *box {
	if r.pack.count == maxBoxes {
		r.ship(&r.pack.boxes[0])
	}
	x := &r.pack.boxes[r.pack.count]
	*x = box{peer: to, to: addr, head: head, index: r.out, size: ipv4HeaderSize}
	r.pack.count++
	r.room--
	r.out++
	r.count = max(r.count, r.out)
	return x
}

// matches reports whether the kernel left just the checksum of the flow's protocol
// to the device, so that the far side can tell where it is.
func (l *layout) matches(h virtio) bool {
	return l.headers > 0 && int(h.sumStart) == l.transport && int(h.sumOffset) == l.sumOffset()
}

// ship closes a container. A packet alone leaves without one.
func (r *reader) ship(x *box) {
	b, size := r.bufs[x.index][r.offset:], x.size
	if x.count > 1 {
		size = r.seal(b, x.peer, x.to, size, r.mtu)
	} else {
		p := b[recordAt:size]
		if b[ipv4HeaderSize] == recordPartial {
			complete(p, x.head)
		}
		size = copy(b, p)
	}
	if !r.n.bind.out.take(&x.peer.out, 1, size) {
		size = 0 // wireguard-go skips it
	}
	r.sizes[x.index] = size
	r.pack.remove(x)
}

// shipAll closes all containers.
func (r *reader) shipAll() {
	for r.pack.count > 0 {
		r.ship(&r.pack.boxes[0])
	}
}

// seal finishes the container of size bytes in b, with a report when one is due
// and there is room up to limit, and returns its size.
func (r *reader) seal(b []byte, p *peer, to netip.Addr, size, limit int) int {
	if size+reportRecord <= min(limit, len(b)) && p.meter.due(time.Duration(r.n.bind.now())) {
		received, missing := p.meter.totals()
		putReport(b[size:], received, missing)
		size += reportRecord
	}
	putContainer(b[:size], r.self, to)
	return size
}
