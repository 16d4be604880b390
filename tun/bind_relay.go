package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Bounds of what goes to a relay over its own connection.
const (
	frameLength = 2         // bytes that say how long the frame behind them is
	maxFrame    = 9216 + 64 // bytes of a frame
	streamSize  = 1 << 16   // bytes of one Link.Send
)

// errDown says that nothing goes to a relay now.
var errDown = errors.New("link to the relay is down")

// errHops says that a datagram was to end on its way to a relay.
var errHops = errors.New("no hop limit through a relay")

// relay sends a batch into the flow of o.to, as the link to its relay is now.
func (b *bind) relay(o *batch) error {
	way := o.to
	r := way.relay.now.Load()
	switch {
	case r == nil:
		return errDown
	case r.send == nil:
		o.to, o.lead = r.to, way.head[:]
		return b.ship(o)
	case b.open.Load() == nil:
		return net.ErrClosed
	}
	if o.limit > 0 {
		o.limit = min(o.limit, maxFrame-flowHeader)
	}
	s := b.streams.Get().(*stream)
	defer b.streams.Put(s)
	s.load(o, way.head[:], r.send)
	b.drops.full.Add(s.dropped)
	return nil
}

// sendFlow sends one datagram of ours into the flow with a handle.
func (b *bind) sendFlow(p []byte, handle netip.AddrPort, ttl int) error {
	e := b.peers.at(handle)
	err := errMesh
	switch {
	case e == nil || e.relay == nil:
	case ttl > 0:
		err = errHops
	default:
		err = b.relay(&batch{bufs: [][]byte{p}, to: e})
	}
	if err != nil {
		return fmt.Errorf("send to %s: %w", handle, err)
	}
	return nil
}

// stream puts flow frames behind each other, for Link.Send. Pooled; one
// goroutine uses it at a time.
//
//	+-------------------+---------------+---------------------------+-----
//	| length, 2 bytes   | flow header 8 | message or fragment       | ...
//	+-------------------+---------------+---------------------------+-----
type stream struct {
	run     []byte // capacity streamSize
	dropped uint64 // messages too long for a frame
}

// load sends all of a batch with a header before each datagram.
func (s *stream) load(o *batch, head []byte, send func(run []byte)) {
	s.dropped = 0
	for _, m := range o.bufs {
		f, fragmented := cut(m, o.limit)
		switch {
		case fragmented:
			s.parts(m, f, head, send)
		case flowHeader+len(m) > maxFrame:
			s.dropped++
		default:
			s.begin(len(m), head, send)
			s.run = append(s.run, m...)
		}
	}
	s.flush(send)
}

// parts adds the fragments of a message.
func (s *stream) parts(m []byte, f fragment, head []byte, send func(run []byte)) {
	for f.index = range f.count {
		s.begin(fragmentHeader+f.size, head, send)
		at := len(s.run)
		s.run = s.run[:at+fragmentHeader]
		f.put(s.run[at:])
		s.run = append(s.run, f.part(m)...)
		if f.index == f.count-1 {
			end := len(s.run)
			s.run = s.run[:end+f.padding]
			clear(s.run[end:])
		}
	}
}

// begin adds the header of a frame with n bytes behind the flow's.
func (s *stream) begin(n int, head []byte, send func(run []byte)) {
	if len(s.run)+frameLength+flowHeader+n > cap(s.run) {
		s.flush(send)
	}
	s.run = binary.BigEndian.AppendUint16(s.run, uint16(flowHeader+n))
	s.run = append(s.run, head...)
}

func (s *stream) flush(send func(run []byte)) {
	if len(s.run) > 0 {
		send(s.run)
	}
	s.run = s.run[:0]
}

// handover is where Deliver and its receiver meet. What is in one run is parted
// into arrivals of frames of one size. One goroutine receives; Deliver may be
// called by many.
type handover struct {
	b     *bind
	runs  chan handed
	taken chan struct{} // the receiver has let go of a run
	done  chan struct{} // closed when the sockets are

	holds bool // a run
	link  uint16
	rest  []byte // of the run
}

// handed is a run on its way from Deliver to the receiver.
type handed struct {
	link uint16
	run  []byte
}

func newHandover(b *bind) *handover {
	return &handover{b: b, runs: make(chan handed), taken: make(chan struct{}), done: make(chan struct{})}
}

// deliver is Device.Deliver.
func (b *bind) deliver(link uint16, run []byte) {
	open := b.open.Load()
	if open == nil || link == 0 || len(run) == 0 {
		return
	}
	select {
	case open.runs.runs <- handed{link, run}:
		// The receiver reads in run until it says so; it does in any case, when it
		// ends, too.
		<-open.runs.taken
	case <-open.runs.done:
	}
}

// wait waits for the next run. False means that the sockets are closed.
func (h *handover) wait() bool {
	h.b.bells.look(h.b.now())
	select {
	case one := <-h.runs:
		h.holds, h.link, h.rest = true, one.link, one.run
		return true
	case <-h.done:
		return false
	}
}

// next cuts frames of one size off the run.
func (h *handover) next(a *arrival) bool {
	size := frameSize(h.rest)
	if size == 0 {
		if len(h.rest) > 0 {
			h.b.drops.foreign.Add(1)
			h.rest = nil
		}
		h.release()
		return false
	}
	end, step := 0, frameLength+size
	for frameSize(h.rest[end:]) == size {
		end += step
	}
	*a = arrival{data: h.rest[frameLength:end], segment: size, gap: frameLength, link: h.link}
	h.rest = h.rest[end:]
	return true
}

// frameSize is the length of the first frame of a run, 0 when there is none.
func frameSize(run []byte) int {
	if len(run) < frameLength {
		return 0
	}
	size := be16(run)
	if size > maxFrame || len(run) < frameLength+size {
		return 0
	}
	return size
}

// release lets go of the run.
func (h *handover) release() {
	if h.holds {
		h.holds, h.rest = false, nil
		h.taken <- struct{}{}
	}
}
