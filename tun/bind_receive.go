package tun

import (
	"encoding/binary"
	"net"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

// strayInterval is the shortest time between two calls of Config.SessionUnknown
// about one peer.
const strayInterval = time.Second

// arrival is a datagram, or several of one sender, all of size segment but the
// last.
type arrival struct {
	data    []byte
	segment int
	gap     int            // bytes between them
	ep      *endpoint      // of the sender; nil: link says who that is
	link    uint16         // over whose own connection it came; 0: over UDP
	at      netip.AddrPort // local address, as Config.Receive gets it
}

// skip moves the cursor behind the first n datagrams.
func (a *arrival) skip(n int) {
	a.data = a.data[min(n*(a.segment+a.gap), len(a.data)):]
}

// arrivals are where a receiver's datagrams come from. One goroutine uses them.
type arrivals interface {
	// next makes a the next arrival at hand, and reports false when there is none.
	// What was the last one is not looked at any more.
	next(a *arrival) bool
	// wait waits until there is one. False means that there will be none.
	wait() bool
	// release gives up what is at hand.
	release()
}

// receiver is the receiving half of a bind, for one source of datagrams. What
// one call cannot take stays under the cursor for the next. One goroutine uses
// it.
type receiver struct {
	b    *bind
	in   arrivals
	done chan struct{} // closed with the source
	now  arrival
	from *endpoint // whom the datagram under the cursor is from
	way  found     // the flow looked up last

	slots slots // messages of which not all fragments are here

	known    bool              // of which peer index is
	index    uint32            // of the messages being counted
	peer     *peer             // whose session that is
	taken    int               // how many have content
	bytes    int               // and how large those are
	messages [batchSize]uint64 // their names
	counters [batchSize]uint64
	counted  int // how many counters
	timer    *time.Timer
}

// found is the result of looking a flow up.
type found struct {
	header uint64
	by     *endpoint // of the relay's port
	link   uint16
	way    *endpoint // nil: nothing is known
}

func newReceiver(b *bind, in arrivals, done chan struct{}) *receiver {
	r := &receiver{b: b, in: in, done: done, timer: time.NewTimer(time.Hour)}
	r.slots.drops = &b.drops
	r.timer.Stop()
	return r
}

// receive is a conn.ReceiveFunc. It returns an error only after Close.
func (r *receiver) receive(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	for {
		if len(r.now.data) == 0 && !r.in.next(&r.now) && !r.in.wait() {
			return 0, net.ErrClosed
		}
		if room, _ := r.b.inbound.wait(r.timer, r.done); room == 0 {
			r.now = arrival{}
			r.in.release()
			return 0, net.ErrClosed
		}
		if n := r.deliver(packets, sizes, eps); n > 0 {
			return n, nil
		}
	}
}

// deliver copies WireGuard's messages out until packets is full or nothing is
// left, and hands over on the way what is for Config.Receive.
func (r *receiver) deliver(packets [][]byte, sizes []int, eps []conn.Endpoint) int {
	n := 0
	for n < len(packets) {
		if len(r.now.data) == 0 {
			if !r.in.next(&r.now) {
				break
			}
			continue
		}
		got, done := r.unpack(packets[n])
		r.now.skip(done)
		if got > 0 {
			r.take(packets[n][:got])
			sizes[n], eps[n] = got, r.from
			n++
		}
	}
	r.charge()
	r.known, r.peer, r.way = false, nil, found{}
	return n
}

// unpack takes the datagram under the cursor. It returns the size of the message
// that is complete with it, in dst, or 0, and how many datagrams it has dealt
// with.
func (r *receiver) unpack(dst []byte) (got, done int) {
	b := r.now.data[:min(r.now.segment, len(r.now.data))]
	kind, lead, at := frameOf(b), 0, r.now.at
	r.from = r.now.ep
	switch {
	case kind == frameFlow || r.now.link != 0:
		kind = r.enter(kind, b)
		lead, at = min(flowHeader, len(b)), netip.AddrPort{}
	case kind == frameSignal:
		kind = frameOwn // only in a flow
	}
	switch b = b[lead:]; kind {
	case frameWireGuard:
		if len(b) <= len(dst) {
			return copy(dst, b), 1
		}
		r.b.drops.foreign.Add(1)
	case frameFragment:
		return r.gather(dst, b, lead)
	case frameSTUN, frameControl, frameSignal:
		if r.b.config.Receive != nil {
			r.b.config.Receive(b, r.from.to, at)
		}
	default:
		r.b.drops.foreign.Add(1)
	}
	return 0, 1
}

// enter finds whose flow the datagram b is of, and what it holds. frameOwn means
// that it is to be dropped: it is of no flow of the relay it came from, or holds
// what does not belong there.
func (r *receiver) enter(kind frame, b []byte) frame {
	if kind != frameFlow || len(b) <= flowHeader {
		return frameOwn
	}
	header := binary.BigEndian.Uint64(b)
	if w := &r.way; w.way == nil || w.header != header || w.by != r.now.ep || w.link != r.now.link {
		var from netip.AddrPort
		if r.now.ep != nil {
			from = r.now.ep.to
		}
		*w = found{header, r.now.ep, r.now.link, r.b.peers.flow(header, r.now.link, from)}
		if w.way == nil {
			return frameOwn
		}
	}
	r.from = r.way.way
	switch kind = frameOf(b[flowHeader:]); kind {
	case frameFlow, frameControl:
		return frameOwn
	}
	return kind
}

// gather takes the fragment b, which is under the cursor behind lead bytes. Whose
// it is tells the index of its session, which nobody can guess; the path it takes
// need not be the one this side uses. It returns what unpack does: when all of a
// message's fragments follow, it deals with all.
func (r *receiver) gather(dst, b []byte, lead int) (got, done int) {
	f, ok := parseFragment(b)
	if ok {
		p := r.owner(f.session)
		if p == nil {
			r.stray()
		}
		ok = p != nil && (r.from.peer == nil || r.from.peer == p) && !r.from.drop
	}
	if !ok {
		r.b.drops.fragments.Add(1)
		return 0, 1
	}
	done = 1
	if f.adjacent(dst, r.now.data, lead, lead+len(b)+r.now.gap) {
		got, done = f.length(), f.count
	} else if got = r.slots.put(dst, source{r.peer, r.from.peer != nil}, f, b[fragmentHeader:]); got == 0 {
		return 0, done
	}
	if !f.names(dst[:got]) {
		r.b.drops.fragments.Add(uint64(f.count))
		return 0, done
	}
	return got, done
}

// owner is the peer a session index was handed out to, nil when it was not. It
// is looked up once for neighbours, which are then counted together.
func (r *receiver) owner(index uint32) *peer {
	if !r.known || r.index != index {
		r.charge()
		r.peer, r.index, r.known = r.b.peers.byIndex(index), index, true
	}
	return r.peer
}

// take counts a message of a session of ours. Those of no session are dropped
// by wireguard-go at once and cost no credit.
func (r *receiver) take(b []byte) {
	if b[0] != typeData {
		if b[0] == typeResponse {
			r.b.response(b)
		}
		return
	}
	if r.owner(indexOf(b)) == nil {
		r.stray()
		return
	}
	if r.counted == len(r.counters) {
		r.charge()
	}
	r.counters[r.counted] = counterOf(b)
	r.slots.pass(r.index, r.counters[r.counted])
	r.counted++
	if isData(b) {
		r.messages[r.taken] = nameOf(b)
		r.taken++
		r.bytes += len(b)
	}
}

// stray looks at a message of no session: when it comes by a path of a peer with
// whom there was none, this side has forgotten it. At most once a second the node
// hears of that.
func (r *receiver) stray() {
	p := r.from.peer
	if p == nil || r.from.drop || r.b.config.SessionUnknown == nil || p.met.Load() {
		return
	}
	now, last := r.b.now(), p.unknown.Load()
	if (last == 0 || now-last >= int64(strayInterval)) && p.unknown.CompareAndSwap(last, now) {
		r.b.config.SessionUnknown(p.key)
	}
}

// charge books what take counted.
func (r *receiver) charge() {
	if r.counted == 0 {
		return
	}
	if !r.peer.met.Load() {
		r.peer.met.Store(true)
	}
	if r.taken > 0 {
		r.b.inbound.takeNamed(&r.peer.in, r.messages[:r.taken], r.bytes)
	}
	r.peer.meter.note(r.index, r.counters[:r.counted], r.b.overflow.Load())
	if r.b.reported != nil && r.peer.meter.due(time.Duration(r.b.now())) {
		r.b.reported(r.peer)
	}
	r.taken, r.bytes, r.counted = 0, 0, 0
}
