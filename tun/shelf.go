package tun

import (
	"encoding/binary"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the shelf.
const (
	shelfSlots    = batchSize / 2         // packets; the other buffers are for what is made of them
	shelfQueues   = 64                    // flows told apart
	shelfQuantum  = 16 << 10              // bytes a flow may send before it is another's turn
	shelfTarget   = time.Millisecond      // what packets of a flow may wait, or a round trip
	shelfInterval = 20 * time.Millisecond // for how long they may wait longer, or shelfTrips round trips;
	shelfTrips    = 20                    // also the shortest time between signals
	noSlot        = -1
)

// shelf holds packets read from the TUN that wait for wireguard-go, and says
// which goes next: flows that send little before those that send much, these in
// turn (flow queueing, RFC 8290 §4). A flow that keeps a queue is told so after
// the time its packets wait (CoDel, RFC 8289 §3), but at a bounded rate: nobody
// else waits for its packets. newShelf makes one. One goroutine uses it.
type shelf struct {
	slots  [shelfSlots]shelved
	free   uint64 // a bit for each free slot
	left   uint64 // free after renew
	queues [shelfQueues]queue
	sparse turns // queues of flows that send little
	heavy  turns // of the others
}

// shelved is a packet, in the buffer with its number.
type shelved struct {
	packet []byte
	head   virtio
	at     time.Duration // when it came
	cut    split         // what is left of it, once cutting has begun
	step   int           // segments of each part, then
	kind   uint8         // and of the record
	queue  uint8
	next   int8 // in the queue; noSlot: none
}

// queue is the packets of one flow, or of several whose hashes are equal.
type queue struct {
	first, last int8 // slots; noSlot: empty
	listed      bool
	deficit     int           // bytes it may send before it is another's turn
	slow        time.Duration // when it will have waited too long; 0: it does not
}

// turns is queues in the order of their turns.
type turns struct {
	items [shelfQueues]uint8
	head  int
	count int
}

func (l *turns) push(q uint8) {
	l.items[(l.head+l.count)%shelfQueues] = q
	l.count++
}

func (l *turns) pop() uint8 {
	q := l.items[l.head]
	l.head = (l.head + 1) % shelfQueues
	l.count--
	return q
}

func newShelf() *shelf {
	s := &shelf{free: 1<<shelfSlots - 1}
	for i := range s.queues {
		s.queues[i].first, s.queues[i].last = noSlot, noSlot
	}
	return s
}

// vacant is the first free slot, noSlot when there is none. Few slots are used
// when few packets wait: their buffers stay hot.
func (s *shelf) vacant() int {
	if s.free == 0 {
		return noSlot
	}
	return bits.TrailingZeros64(s.free)
}

// put keeps a packet in a free slot.
func (s *shelf) put(i int, packet []byte, head virtio, now time.Duration) {
	n := flowOf(packet)
	s.free &^= 1 << i
	s.slots[i] = shelved{packet: packet, head: head, at: now, queue: n, next: noSlot}
	q := &s.queues[n]
	if q.first == noSlot {
		q.first = int8(i)
	} else {
		s.slots[q.last].next = int8(i)
	}
	q.last = int8(i)
	if !q.listed {
		q.listed, q.deficit, q.slow = true, shelfQuantum, 0
		s.sparse.push(n)
	}
}

// turn is the slot whose turn it is, noSlot when nothing waits.
func (s *shelf) turn() int {
	for {
		l := &s.sparse
		if l.count == 0 {
			l = &s.heavy
		}
		if l.count == 0 {
			return noSlot
		}
		q := &s.queues[l.items[l.head]]
		switch {
		case q.first == noSlot && l == &s.sparse && s.heavy.count > 0:
			s.heavy.push(l.pop()) // so that a flow cannot be sparse anew with every packet
		case q.first == noSlot:
			l.pop()
			q.listed = false
		case q.deficit <= 0:
			q.deficit += shelfQuantum
			s.heavy.push(l.pop())
		default:
			return int(q.first)
		}
	}
}

// spend counts bytes that the flow of a slot sends.
func (s *shelf) spend(i, bytes int) { s.queues[s.slots[i].queue].deficit -= bytes }

// take takes the first packet of a queue off. Its slot is free at once, or, when
// its buffer leaves, after renew.
func (s *shelf) take(i int, leaves bool) {
	q := &s.queues[s.slots[i].queue]
	if q.first = s.slots[i].next; q.first == noSlot {
		q.last = noSlot
	}
	s.slots[i].packet = nil
	if leaves {
		s.left |= 1 << i
		return
	}
	s.free |= 1 << i
}

// renew frees the slots whose buffers left.
func (s *shelf) renew() { s.free, s.left = s.free|s.left, 0 }

// late reports whether the packet should tell its flow, to where a round trip
// takes so long, to slow down: far away the answer takes its time, and so does
// getting fast again. A flow of one packet has no queue, however long that waits.
func (s *shelf) late(i int, now, trip time.Duration) bool {
	p := &s.slots[i]
	q := &s.queues[p.queue]
	interval := max(shelfInterval, shelfTrips*trip)
	switch {
	case now-p.at < max(shelfTarget, trip) || p.next == noSlot:
		q.slow = 0
	case q.slow == 0:
		q.slow = now + interval
	case now >= q.slow:
		q.slow = now + interval
		return true
	}
	return false
}

// flowOf is the queue of a packet's flow: addresses, protocol and ports.
func flowOf(p []byte) uint8 {
	const odd = 0x9e3779b97f4a7c15 // 2^64 through the golden ratio
	var h uint64
	mix := func(v uint64) { h = bits.RotateLeft64((h^v)*odd, 29) }
	ports := 0
	switch {
	case len(p) >= ipv4HeaderSize && p[0]>>4 == 4:
		mix(binary.LittleEndian.Uint64(p[12:]))
		mix(uint64(p[9]))
		if p[9] == unix.IPPROTO_TCP || p[9] == unix.IPPROTO_UDP {
			ports = int(p[0]&15) * 4
		}
	case len(p) >= ipv6HeaderSize && p[0]>>4 == 6:
		for at := 8; at < ipv6HeaderSize; at += 8 {
			mix(binary.LittleEndian.Uint64(p[at:]))
		}
		mix(uint64(p[6]))
		if p[6] == unix.IPPROTO_TCP || p[6] == unix.IPPROTO_UDP {
			ports = ipv6HeaderSize
		}
	}
	if ports > 0 && len(p) >= ports+4 {
		mix(uint64(binary.LittleEndian.Uint32(p[ports:])))
	}
	return uint8(h >> (64 - 6))
}
