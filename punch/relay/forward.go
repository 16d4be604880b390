package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
)

// maxPending is how many admissions wait on one socket. The node whose ADMIT
// finds no room sends it again.
const maxPending = 256

// pending is an ADMIT that has passed screen.
type pending struct {
	msg []byte
	t   *transport
}

// ServeUDP forwards and answers what comes in on a socket, until it is closed or
// ctx ends. It returns nil then. It sets the socket's options, and answers from
// the address that was asked. It leaves the socket open, but with its read
// deadline in the past.
func (s *Server) ServeUDP(ctx context.Context, c *net.UDPConn) error {
	sock, err := openSocket(c)
	if err != nil {
		return err
	}
	l := &loop{
		s: s, receiver: newReceiver(sock), train: newTrain(s), admissions: make(chan pending, maxPending),
		port: c.LocalAddr().(*net.UDPAddr).AddrPort().Port(),
	}
	defer context.AfterFunc(ctx, sock.stop)()
	var g errgroup.Group
	g.Go(func() error {
		l.admit()
		return nil
	})
	g.Go(l.run)
	if err := g.Wait(); err != nil {
		return fmt.Errorf("relay on %s: %w", c.LocalAddr(), err)
	}
	return nil
}

// loop forwards what one socket receives.
type loop struct {
	s          *Server
	receiver   *receiver
	train      *train
	admissions chan pending // closed by run
	port       uint16       // of the socket
}

func (l *loop) run() error {
	defer close(l.admissions)
	for {
		n, err := l.receiver.receive()
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		}
		l.train.now = l.s.clock()
		for i := range n {
			a := l.receiver.arrival(i)
			l.take(&a)
		}
		l.train.flush()
	}
}

// take deals with one arrival: trains of one flow together, all else one by one.
func (l *loop) take(a *arrival) {
	data := a.data
	for len(data) > 0 {
		n := min(a.stride, len(data))
		if data[0] == FlowByte && n >= headerSize {
			n = trainLength(data, a.stride)
			l.forward(a, data[:n])
		} else {
			l.answer(a, data[:n])
		}
		data = data[n:]
	}
}

// trainLength is how many bytes at the beginning of data are datagrams of one
// flow that can be sent as one train: every one begins with the same header. The
// first has one.
func trainLength(data []byte, stride int) int {
	limit := min(len(data), stride*maxSegments, maxTrain-maxTrain%stride)
	n := min(stride, len(data))
	for header := binary.NativeEndian.Uint64(data); n < limit; n = min(n+stride, len(data)) {
		if len(data)-n < headerSize || binary.NativeEndian.Uint64(data[n:]) != header {
			break
		}
	}
	return n
}

// forward passes a train of one flow on.
func (l *loop) forward(a *arrival, run []byte) {
	count := (len(run) + a.stride - 1) / a.stride
	f := l.s.flow(binary.BigEndian.Uint64(run))
	if f == nil {
		l.s.count.flow.Add(uint64(count))
		return
	}
	side := f.from(a.name)
	if side < 0 {
		l.s.count.source.Add(uint64(count))
		return
	}
	l.train.pass(f, side, run, min(a.stride, len(run)))
}

// pass sends a train of a flow to the other end, or what the limits let through.
func (t *train) pass(f *flow, side int, run []byte, stride int) {
	count := (len(run) + stride - 1) / stride
	to := f.ends[1-side].active.Load()
	switch {
	case to == nil:
		t.s.count.offline.Add(uint64(count))
		return
	case stride > MaxFrame:
		t.s.count.oversize.Add(uint64(count))
		return
	}
	f.touch(t.now)
	if t.s.pay(f, side, len(run), t.now) {
		t.deliver(to, run, stride)
		return
	}
	if count == 1 {
		t.s.count.rate.Add(1)
		return
	}
	for ; len(run) > 0; run = run[min(stride, len(run)):] {
		t.pass(f, side, run[:min(stride, len(run))], min(stride, len(run)))
	}
}

func (t *train) deliver(to *transport, run []byte, stride int) {
	if to.conn == nil {
		t.add(to, run, stride)
		return
	}
	t.sent((len(run)+stride-1)/stride, len(run))
	to.conn.offerTrain(run, stride)
}

// pay takes what an end sends from its limits.
func (s *Server) pay(f *flow, side, size int, now int64) bool {
	n := f.ends[side]
	return f.sent[side].take(&s.flowRate, now, size) && n.sent.take(&s.nodeRate, now, size) &&
		(s.totalRate == nil || s.payTotal(n, size, now))
}

// payTotal takes what a node sends from what all may send together. Half of what
// may come at once is for those who are within their share.
func (s *Server) payTotal(n *node, size int, now int64) bool {
	limit := *s.totalRate
	if share := s.fair.Load(); share == nil || !n.fair.take(share, now, size) {
		limit.burst /= 2
	}
	return s.total.take(&limit, now, size)
}

// answer deals with a datagram that is not of a flow.
func (l *loop) answer(a *arrival, b []byte) {
	var reply []byte
	switch {
	case l.s.cfg.Refuse != nil && l.s.cfg.Refuse(a.name.get().Addr()):
		l.s.count.source.Add(1)
	case b[0] == FlowByte:
		l.s.count.malformed.Add(1)
	case b[0] == ControlByte && kindOf(b) == kindAdmit:
		reply = l.screen(a, b)
	case b[0] == ControlByte && kindOf(b) != 0:
		reply = l.s.control(nil, b, a.transport(l.receiver.socket))
	case b[0] != ControlByte && l.s.cfg.Answer != nil:
		reply = l.s.cfg.Answer(b, a.name.get(), netip.AddrPortFrom(a.local, l.port))
	default:
		l.s.count.malformed.Add(1)
	}
	if len(reply) > 0 {
		l.train.reply(a.transport(l.receiver.socket), reply)
	}
}

// reply sends what is no datagram of a flow.
func (t *train) reply(to *transport, b []byte) {
	t.begin(to, 1)
	t.append(b)
	t.groups[t.count].own = true
	t.end()
}

// screen passes an ADMIT whose sender is where it says it is to admit.
func (l *loop) screen(a *arrival, b []byte) (reply []byte) {
	m, ok := parseAdmit(b, MaxAdmission)
	if !ok {
		l.s.count.malformed.Add(1)
		return nil
	}
	t := a.transport(l.receiver.socket)
	reply, ok = l.s.screen(&m, func(c cookie) bool { return l.s.cookies.valid(c, t.addr, l.train.now) }, t)
	if !ok {
		return reply
	}
	select {
	case l.admissions <- pending{append([]byte(nil), b...), t}:
	default:
		l.s.count.limited.Add(1)
	}
	return nil
}

// admit enrols nodes beside the loop, which must not wait for it.
func (l *loop) admit() {
	out := newTrain(l.s)
	for p := range l.admissions {
		a, _ := parseAdmit(p.msg, MaxAdmission)
		if reply, _ := l.s.enrol(&a, p.msg, p.t); reply != nil {
			out.now = l.s.clock()
			out.reply(p.t, reply)
			out.flush()
		}
	}
}

// trains lends trains to connections. The zero trains is ready. It is safe for
// concurrent use.
type trains struct{ pool sync.Pool }

func (p *trains) borrow(s *Server) *train {
	if t, ok := p.pool.Get().(*train); ok {
		return t
	}
	return newTrain(s)
}

// forwardRun passes on a run of frames that came from a node over a connection.
// Frames of one flow and size that follow each other leave as one train. The run
// is used only during the call, which takes a few milliseconds at most.
func (s *Server) forwardRun(n *node, run []byte) {
	t := s.trains.borrow(s)
	defer s.trains.pool.Put(t)
	t.now = s.clock()
	for len(run) > 0 {
		datagram, rest, ok := cutFrame(run)
		if !ok || len(datagram) < headerSize || datagram[0] != FlowByte {
			s.count.malformed.Add(1)
			if !ok {
				break
			}
			run = rest
			continue
		}
		run = t.collect(n, datagram, rest)
	}
	t.flush()
}

// collect forwards a datagram and those of its flow and size in the frames behind
// it. It returns the frames it left.
func (t *train) collect(n *node, first, rest []byte) []byte {
	f := t.s.flow(binary.BigEndian.Uint64(first))
	side := -1
	if f == nil {
		t.s.count.flow.Add(1)
		return rest
	}
	if side = f.of(n); side < 0 {
		t.s.count.source.Add(1)
		return rest
	}
	to := f.ends[1-side].active.Load()
	if to == nil || to.conn != nil || !to.segments(t.now) || !t.s.pay(f, side, len(first), t.now) {
		t.pass(f, side, first, len(first))
		return rest
	}
	f.touch(t.now)
	t.begin(to, maxSegments)
	t.append(first)
	g := &t.groups[t.count]
	for g.count < maxSegments {
		next, after, ok := cutFrame(rest)
		if !ok || len(next) < headerSize || len(next) > g.stride || g.bytes+len(next) > maxTrain ||
			[headerSize]byte(next) != [headerSize]byte(first) || !t.s.pay(f, side, len(next), t.now) {
			break
		}
		t.append(next)
		if rest = after; len(next) < g.stride {
			break
		}
	}
	t.end()
	return rest
}
