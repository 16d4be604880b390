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

// acceptSmall puts the packet into the container of its peer, or begins one with
// it.
func (r *reader) acceptSmall(n int, p *peer, to netip.Addr) {
	b := r.gather(n, recordAt)
	if b == nil || packetSize(b) != n { // the far side would find no end
		r.acceptPlain(n, p)
		return
	}
	kind := uint8(recordFull)
	if r.head.flags&needsSum != 0 {
		if l := layoutOf(b); l.matches(r.head) {
			kind = recordPartial
		} else if !complete(b, r.head) {
			return
		}
	}
	x := r.pack.of(p)
	if x != nil && x.size+recordHeaderSize+n > r.mtu {
		r.ship(x)
		x = nil
	}
	r.bytes -= n
	if x != nil {
		out := r.bufs[x.index][r.offset+x.size:]
		putRecord(out, kind, n, 0)
		copy(out[recordHeaderSize:], b)
		x.size += recordHeaderSize + n
		x.count++
		return
	}
	if r.pack.count == maxBoxes {
		r.ship(&r.pack.boxes[0])
	}
	putRecord(r.bufs[r.count][r.offset+ipv4HeaderSize:], kind, n, 0)
	r.pack.boxes[r.pack.count] = box{peer: p, to: to, head: r.head, index: r.count, size: recordAt + n, count: 1}
	r.pack.count++
	r.room--
	r.count++
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

// shipOf closes the container of a peer, if there is one, so that nothing joins
// it that comes after the packet under way.
func (r *reader) shipOf(p *peer) {
	if x := r.pack.of(p); x != nil {
		r.ship(x)
	}
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
