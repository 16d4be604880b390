package punch

import (
	"container/heap"
	"time"
)

// queue orders peers by the time of their next step.
type queue []*peer

// set makes p due at the given time, or earlier if it was due earlier.
func (q *queue) set(p *peer, at time.Time) {
	switch {
	case p.index < 0:
		p.due = at
		heap.Push(q, p)
	case at.Before(p.due):
		p.due = at
		heap.Fix(q, p.index)
	}
}

func (q *queue) remove(p *peer) {
	if p.index >= 0 {
		heap.Remove(q, p.index)
	}
}

func (q *queue) popDue(now time.Time) []*peer {
	var due []*peer
	for len(*q) > 0 && !(*q)[0].due.After(now) {
		due = append(due, heap.Pop(q).(*peer))
	}
	return due
}

func (q queue) first() time.Time {
	if len(q) == 0 {
		return time.Time{}
	}
	return q[0].due
}

// Len, Less, Swap, Push and Pop are heap.Interface.
func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push is part of heap.Interface.
func (q *queue) Push(x any) {
	p := x.(*peer)
	p.index = len(*q)
	*q = append(*q, p)
}

// Pop is part of heap.Interface.
func (q *queue) Pop() any {
	last := len(*q) - 1
	p := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	p.index = -1
	return p
}
