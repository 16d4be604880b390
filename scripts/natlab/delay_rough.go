package natlab

import (
	"container/heap"
	"io"
	"time"
)

// rateBucket is how many bytes pass a line with a rate at once after a pause.
const rateBucket = 4000

// each says that every datagram of a train crosses the line by itself.
func (l Line) each() bool { return l.Rate > 0 || l.Jitter > 0 }

// lost draws whether the next packet vanishes. Losses in bursts follow Gilbert and
// Elliott: in a bad state, which lasts Burst packets on average, all vanish, in a
// good one none.
func (d *delayLine) lost() bool {
	l := d.line
	if l.Loss <= 0 {
		return false
	}
	if l.Burst <= 1 {
		return d.random.Float64() < l.Loss
	}
	leave := 1 / l.Burst
	enter := leave * l.Loss / (1 - l.Loss)
	if d.bad {
		d.bad = d.random.Float64() >= leave
	} else {
		d.bad = d.random.Float64() < enter
	}
	return d.bad
}

// turn is when the last bit of a packet has passed the line's rate; false: it would
// have to wait too long.
func (d *delayLine) turn(now time.Time, size int) (time.Time, bool) {
	if d.line.Rate <= 0 {
		return now, true
	}
	free := d.free
	if full := now.Add(-d.line.takes(rateBucket)); free.Before(full) {
		free = full
	}
	if free.Sub(now) > d.line.Queue {
		return now, false
	}
	d.free = free.Add(d.line.takes(size))
	if d.free.After(now) {
		return d.free, true
	}
	return now, true
}

// takes is how long so many bytes need.
func (l Line) takes(size int) time.Duration {
	return time.Duration(size) * 8 * time.Second / time.Duration(l.Rate)
}

func (d *delayLine) jitter() time.Duration {
	return time.Duration((2*d.random.Float64() - 1) * float64(d.line.Jitter))
}

// sendSorted writes packets as they are due, in whatever order they come.
func (d *delayLine) sendSorted(queue <-chan heldPacket, dev io.Writer) error {
	var waiting packetHeap
	timer := time.NewTimer(0)
	defer timer.Stop()
	for queue != nil || len(waiting) > 0 {
		var due <-chan time.Time
		if len(waiting) > 0 {
			timer.Reset(time.Until(waiting[0].due))
			due = timer.C
		}
		select {
		case p, ok := <-queue:
			if !ok {
				queue = nil
				continue
			}
			heap.Push(&waiting, p)
		case <-due:
			if err := d.deliver(heap.Pop(&waiting).(heldPacket), dev); err != nil {
				return err
			}
		}
	}
	return nil
}

// packetHeap has the packet that is due first at its top.
type packetHeap []heldPacket

func (h packetHeap) Len() int           { return len(h) }
func (h packetHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h packetHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }

// Push adds a heldPacket at the end.
func (h *packetHeap) Push(x any) { *h = append(*h, x.(heldPacket)) }

// Pop takes the last one.
func (h *packetHeap) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
