package relay

import (
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// maxQueued is how many bytes of frames wait for one connection.
	maxQueued = 256 << 10
	// blockSize is what one write takes at most.
	blockSize = 64 << 10
)

// block is a piece of memory that is borrowed while frames pass.
type block struct {
	data       [blockSize]byte
	start, end int // what of data is in use
}

func (b *block) bytes() []byte { return b.data[b.start:b.end] }

// blocks lends blocks. The zero blocks is ready. It is safe for concurrent use.
type blocks struct{ pool sync.Pool }

func (p *blocks) borrow() *block {
	if b, ok := p.pool.Get().(*block); ok {
		b.start, b.end = 0, 0
		return b
	}
	return new(block)
}

func (p *blocks) giveBack(b *block) { p.pool.Put(b) }

// queue holds frames that wait to be written, at most maxQueued bytes. What is
// too much pushes out the oldest frames: in a tunnel a late packet is worth
// less than a new one. An empty queue holds no memory. Its owner guards it.
type queue struct {
	lender  *blocks
	blocks  []*block       // oldest first, none empty
	size    int            // bytes of frames
	dropped *atomic.Uint64 // counts frames; nil: nobody wants to know
}

// put appends a copy of a run of whole frames. It stops at a damaged one.
func (q *queue) put(run []byte) {
	for len(run) > 0 {
		datagram, rest, ok := cutFrame(run)
		if !ok {
			return
		}
		room := q.room(framePrefix + len(datagram))
		n := len(run) - len(rest)
		for len(rest) > 0 { // as many as fit are one copy
			d, r, ok := cutFrame(rest)
			if !ok || len(run)-len(r) > len(room) {
				break
			}
			n, rest = n+framePrefix+len(d), r
		}
		q.commit(copy(room, run[:n]))
		run = rest
	}
}

// putTrain appends copies of the datagrams of a train: all but the last are
// stride bytes long. Those that are no frame are left out.
func (q *queue) putTrain(train []byte, stride int) {
	if stride <= 0 || stride > MaxFrame {
		return
	}
	for len(train) > 0 {
		n := min(stride, len(train))
		room := q.room(framePrefix + n)
		binary.BigEndian.PutUint16(room, uint16(n))
		copy(room[framePrefix:], train[:n])
		q.commit(framePrefix + n)
		train = train[n:]
	}
}

// room is the free end of the newest block, at least n bytes.
func (q *queue) room(n int) []byte {
	if last := len(q.blocks) - 1; last >= 0 && blockSize-q.blocks[last].end >= n {
		return q.blocks[last].data[q.blocks[last].end:]
	}
	q.blocks = append(q.blocks, q.lender.borrow())
	return q.blocks[len(q.blocks)-1].data[:]
}

// commit takes the first n bytes of room as frames.
func (q *queue) commit(n int) {
	q.blocks[len(q.blocks)-1].end += n
	q.size += n
	for q.size > maxQueued {
		q.drop()
	}
}

// drop forgets the oldest frame.
func (q *queue) drop() {
	b := q.blocks[0]
	n := framePrefix + int(binary.BigEndian.Uint16(b.bytes()))
	b.start += n
	q.size -= n
	if q.dropped != nil {
		q.dropped.Add(1)
	}
	if b.start == b.end {
		q.lender.giveBack(q.take())
	}
}

// take removes the oldest frames, as many as are in one block; nil when none
// wait. The caller gives the block back.
func (q *queue) take() *block {
	if len(q.blocks) == 0 {
		return nil
	}
	b := q.blocks[0]
	q.size -= b.end - b.start
	if q.blocks = slices.Delete(q.blocks, 0, 1); len(q.blocks) == 0 {
		q.blocks = nil
	}
	return b
}

// clear forgets all frames.
func (q *queue) clear() {
	for b := q.take(); b != nil; b = q.take() {
		q.lender.giveBack(b)
	}
}
