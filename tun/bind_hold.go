package tun

import (
	"sync"
	"time"
)

// holdTime is how long an initiation of the side that should not initiate
// waits for the other side's.
const holdTime = 200 * time.Millisecond

// holds keeps handshake initiations back. When both sides initiate at once the
// initiations cross, each side drops the other's response, and nothing flows
// for five seconds; so one side waits a moment and lets the other begin. One
// initiation per peer, the newest. Safe for concurrent use.
type holds struct {
	mu   sync.Mutex
	held map[*peer]*held // nil: stopped
	send func(message []byte, to *endpoint)
}

type held struct {
	message [initiationSize]byte
	to      *endpoint
	timer   *time.Timer
}

func newHolds(send func([]byte, *endpoint)) *holds {
	return &holds{send: send}
}

func (h *holds) start() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held = make(map[*peer]*held)
}

// stop forgets all.
func (h *holds) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, one := range h.held {
		one.timer.Stop()
	}
	h.held = nil
}

// keep copies an initiation and sends it after holdTime.
func (h *holds) keep(message []byte, to *endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held == nil {
		return
	}
	if old := h.held[to.peer]; old != nil {
		old.timer.Stop()
	}
	one := &held{to: to}
	copy(one.message[:], message)
	one.timer = time.AfterFunc(holdTime, func() { h.release(one) })
	h.held[to.peer] = one
}

// release sends one unless it was dropped or replaced meanwhile.
func (h *holds) release(one *held) {
	h.mu.Lock()
	current := h.held[one.to.peer] == one
	if current {
		delete(h.held, one.to.peer)
	}
	h.mu.Unlock()
	if current {
		h.send(one.message[:], one.to)
	}
}

// drop forgets the initiation kept for p.
func (h *holds) drop(p *peer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if one := h.held[p]; one != nil {
		one.timer.Stop()
		delete(h.held, p)
	}
}
