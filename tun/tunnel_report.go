package tun

import (
	"slices"
	"sync"
	"time"
)

// maxReports bounds the reports that wait to be sent.
const maxReports = 64

// reports are peers that are to be told how many of their messages arrive. The
// zero value is empty. Safe for concurrent use.
type reports struct {
	mu    sync.Mutex
	peers []*peer
}

// add queues p once, and reports false when there is no room.
func (q *reports) add(p *peer) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if slices.Contains(q.peers, p) {
		return true
	}
	if len(q.peers) == maxReports {
		return false
	}
	q.peers = append(q.peers, p)
	return true
}

// next takes the peer that waits longest, nil when none does.
func (q *reports) next() *peer {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.peers) == 0 {
		return nil
	}
	p := q.peers[0]
	q.peers = slices.Delete(q.peers, 0, 1)
	return p
}

func (q *reports) waiting() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.peers) > 0
}

// wakeReport makes Read send p a report, although the kernel has no packet. When
// too many wait already, the next report says the same and more.
func (n *tunnel) wakeReport(p *peer) {
	if n.reports.add(p) {
		n.wake()
	}
}

// wake ends the wait of Read. What Read is to find must be in place before;
// Read calls asleep before it looks.
func (n *tunnel) wake() { _ = n.File().SetReadDeadline(time.Unix(1, 0)) } // fails once closed

func (n *tunnel) asleep() { _ = n.File().SetReadDeadline(time.Time{}) }

// report fills buffers with reports that wait.
func (r *reader) report() {
	r.n.asleep()
	for r.out < len(r.bufs) {
		p := r.n.reports.next()
		if p == nil {
			return
		}
		to, ok := r.takes(p)
		if !ok || !p.pathed.Load() {
			continue
		}
		b := r.next()
		received, missing := p.meter.totals()
		putReport(b[ipv4HeaderSize:], received, missing)
		size := ipv4HeaderSize + reportRecord
		putContainer(b[:size], r.self, to)
		if r.n.bind.out.take(&p.out, 1, size) {
			r.sizes[r.out] = size
			r.out++
			r.count = r.out
		}
	}
	if r.n.reports.waiting() {
		r.n.wake()
	}
}
