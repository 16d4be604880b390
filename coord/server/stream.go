package server

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"overlay/coord"
	"overlay/coord/trust"
)

const (
	maxQueue      = 256              // frames a stream may be behind
	writeDeadline = 10 * time.Second // for what is queued
	writeBuffer   = 16 << 10         // one TLS record
	readDeadline  = 3 * coord.PingInterval
	reportRate    = 100 // frames a second of one stream; faster ones wait
	reportBurst   = 200
	reportUnit    = 4 << 10 // bytes that count as one frame
	publishRate   = 2
	publishBurst  = 20
)

// stream is one node's connection. An idle one costs a goroutine that waits for
// bytes: what writes is started when there is something to write.
type stream struct {
	hub     *hub
	device  trust.Key
	session sessionID
	key     []byte // of MESSAGE-INTEGRITY in its Binding requests
	conn    net.Conn
	group   *errgroup.Group // outlives every caller of send

	mu     sync.Mutex
	queue  []*frame
	busy   bool // somebody writes
	ended  bool
	pinged time.Time
}

// streams are those that are open, by their STUN user name. They have a lock of
// their own: who answers STUN forwards datagrams as well and must not wait while
// the hub encodes a netmap. It is safe for concurrent use.
type streams struct {
	mu       sync.RWMutex
	sessions map[sessionID]*stream
}

func (o *streams) add(s *stream) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sessions[s.session] = s
}

func (o *streams) remove(s *stream) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.sessions, s.session)
}

// find gives the stream behind a STUN user name, or nil.
func (o *streams) find(id sessionID) *stream {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.sessions[id]
}

func (o *streams) close() {
	o.mu.RLock()
	defer o.mu.RUnlock()
	for _, s := range o.sessions {
		s.close()
	}
}

// attach makes conn the stream of a member, in place of an older one, and
// begins with the netmap. It says false when the device is no member.
func (h *hub) attach(s *stream, welcome coord.Welcome, resume string) bool {
	_, _ = rand.Read(s.session[:]) // fills it or ends the program
	welcome.Session = s.session[:]
	h.mu.Lock()
	defer h.mu.Unlock()
	s.hub, s.group, s.pinged = h, h.group, h.now()
	m := h.members[s.device]
	if m == nil || h.group == nil {
		return false
	}
	h.group.Go(func() error { h.serve(s); return nil })
	if m.stream != nil {
		h.log.Info("stream replaced", "device", s.device, "by", s.conn.RemoteAddr())
		m.stream.close()
	}
	m.stream = s
	h.open.add(s)
	if !m.node.Online {
		m.node.Online = true
		h.touch(m)
	}
	s.send(single(coord.Event{Welcome: &welcome}))
	s.send(h.since(resume)...)
	return true
}

// serve reads from a stream until it ends.
func (h *hub) serve(s *stream) {
	err := s.read()
	s.close()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open.remove(s)
	if m := h.members[s.device]; m != nil && m.stream == s {
		m.stream, m.silent, m.lastSeen = nil, h.now(), h.now()
	}
	h.log.Debug("stream ended", "device", s.device, "err", err)
}

// watchClocks sends pings and lets those go offline that did not come back.
func (h *hub) watchClocks(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	ping := single(coord.Event{Ping: &struct{}{}})
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			h.clock(ping)
		}
	}
}

func (h *hub) clock(ping *frame) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	for _, m := range h.members {
		switch {
		case m.stream != nil && m.stream.due(now):
			m.stream.send(ping)
		case m.stream == nil && m.node.Online && now.Sub(m.silent) >= grace:
			m.node.Online = false
			h.touch(m)
		}
	}
}

// presence says whether a device is online, and when it was last seen if not.
func (h *hub) presence(device trust.Key) (online bool, lastSeen time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.members[device]
	if m == nil {
		return false, time.Time{}
	}
	return m.node.Online, m.lastSeen
}

// knows says whether a device is a member, as far as the hub has heard.
func (h *hub) knows(device trust.Key) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.members[device] != nil
}

func (h *hub) online(device trust.Key) bool {
	online, _ := h.presence(device)
	return online
}

// roleOf is what a member does in the mesh; zero: it is none.
func (h *hub) roleOf(device trust.Key) trust.Role {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m := h.members[device]; m != nil {
		return m.role
	}
	return 0
}

// publish replaces a device's record.
func (h *hub) publish(device trust.Key, p coord.Publish) error {
	rec, err := h.tokens.checkRecord(publisher{device, h.roleOf(device)}, p)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.members[device]
	if m == nil {
		return refuse(coord.CodeNotMember, "the device is no member")
	}
	if rec.Serial <= m.serial {
		if m.node.Record.Hash() == p.Record.Hash() {
			return nil
		}
		return refuse(coord.CodeBadCandidates, "record %d is not newer than %d", rec.Serial, m.serial)
	}
	m.serial, m.node.Record = rec.Serial, p.Record
	h.touch(m)
	return nil
}

// signal carries a message to the newest stream of another member; it is lost
// when there is none, as on any network.
func (h *hub) signal(from trust.Key, s coord.Signal) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sender, receiver := h.members[from], h.members[s.Peer]
	if sender == nil || receiver == nil || receiver.stream == nil || len(s.Data) > coord.MaxSignal {
		return
	}
	if !sender.signals.AllowN(h.now(), 1) {
		return
	}
	receiver.stream.offer(single(coord.Event{Signal: &coord.Signal{Peer: from, Data: s.Data}}))
}

// read takes reports until the connection fails or the node says nonsense.
func (s *stream) read() error {
	ctx := context.Background() // the waits are short
	reports := rate.NewLimiter(reportRate, reportBurst)
	publishes := rate.NewLimiter(publishRate, publishBurst)
	for {
		if err := s.conn.SetReadDeadline(time.Now().Add(readDeadline)); err != nil {
			return err
		}
		b, err := coord.ReadFrame(s.conn, coord.MaxBody)
		if err != nil {
			return err
		}
		var r coord.Report
		if err := json.Unmarshal(b, &r); err != nil {
			return fmt.Errorf("read report: %w", err)
		}
		if err := reports.WaitN(ctx, min(1+len(b)/reportUnit, reportBurst)); err != nil {
			return err
		}
		if r.Signal != nil {
			s.hub.signal(s.device, *r.Signal)
		}
		if r.Publish == nil {
			continue
		}
		if err := publishes.Wait(ctx); err != nil {
			return err
		}
		s.publish(*r.Publish)
	}
}

func (s *stream) publish(p coord.Publish) {
	err := s.hub.publish(s.device, p)
	if err == nil {
		return
	}
	e := asError(err, s.hub.log)
	s.hub.log.Warn("record refused", "device", s.device, "code", e.Code, "reason", e.Message)
	s.send(single(coord.Event{Refusal: e}))
}

// send queues frames. A node that does not keep up is disconnected: it comes
// back and gets the netmap as it is then.
func (s *stream) send(frames ...*frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	for _, f := range frames {
		if !f.empty(s.device) {
			s.queue = append(s.queue, f)
		}
	}
	if len(s.queue) > maxQueue {
		s.hub.log.Warn("stream does not keep up", "device", s.device)
		s.closeLocked()
		return
	}
	if len(s.queue) > 0 && !s.busy {
		s.busy = true
		s.group.Go(func() error { s.drain(); return nil })
	}
}

// offer queues a frame that may be lost. It takes half of the queue at most, so
// that no flood of signals gets a slow receiver disconnected.
func (s *stream) offer(f *frame) {
	s.mu.Lock()
	crowded := len(s.queue) >= maxQueue/2
	s.mu.Unlock()
	if !crowded {
		s.send(f)
	}
}

// drain writes until nothing is queued.
func (s *stream) drain() {
	for {
		s.mu.Lock()
		frames := s.queue
		s.queue = nil
		if len(frames) == 0 || s.ended {
			s.busy = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		if err := s.write(frames); err != nil {
			s.hub.log.Debug("write to stream", "device", s.device, "err", err)
			s.close()
			return
		}
	}
}

func (s *stream) write(frames []*frame) error {
	size := 0
	for _, f := range frames {
		size += f.size()
	}
	w := bufio.NewWriterSize(s.conn, min(size, writeBuffer))
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeDeadline)); err != nil {
		return err
	}
	for _, f := range frames {
		if err := f.write(w, s.device); err != nil {
			return err
		}
	}
	return w.Flush()
}

// due says whether it is time for a ping.
func (s *stream) due(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.pinged) < coord.PingInterval {
		return false
	}
	s.pinged = now
	return true
}

func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *stream) closeLocked() {
	if s.ended {
		return
	}
	s.ended, s.queue = true, nil
	var c io.Closer = s.conn
	if t, ok := s.conn.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn() // without TLS's farewell, which can wait for seconds
	}
	if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		s.hub.log.Debug("close stream", "device", s.device, "err", err)
	}
}
