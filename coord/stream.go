package coord

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// Bounds of a stream.
const (
	writeTimeout = 5 * time.Second
	maxSession   = 64 // bytes of Welcome.Session
	maxSTUNPorts = 16
	relayKeySize = 32
)

// Stream carries events from the server and reports to it. Next is for one
// caller at a time; everything else is safe for concurrent use.
type Stream struct {
	conn *Conn
	key  []byte
	turn chan struct{} // holds one token; who takes it writes
}

// Stream turns the connection into a stream; it has no other use from then on.
// resume is the Resume of the last event seen, or empty. ctx bounds the request
// only.
func (c *Conn) Stream(ctx context.Context, resume string) (*Stream, error) {
	key, err := c.Export(ExporterSTUN)
	if err != nil {
		return nil, err
	}
	header := http.Header{}
	if resume != "" {
		header.Set(HeaderResume, resume)
	}
	if err := c.upgrade(ctx, request{path: "/v1/stream", header: header, limit: MaxBody}, "overlay"); err != nil {
		return nil, err
	}
	c.in.idle = 3 * PingInterval
	s := &Stream{conn: c, key: key, turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s, nil
}

// STUNKey is the key of MESSAGE-INTEGRITY in Binding requests to this server;
// Welcome.Session is their user name.
func (s *Stream) STUNKey() []byte { return s.key }

// Close ends the stream at once and makes Next return.
func (s *Stream) Close() error { return s.conn.Close() }

// Next waits for the next event of a kind this program knows. Pings are
// answered here. Any error is the end of the stream.
func (s *Stream) Next() (Event, error) {
	for {
		frame, err := ReadFrame(s.conn.br, MaxEvent)
		if err != nil {
			return Event{}, fmt.Errorf("read event of coordinator %s: %w", s.conn.server, err)
		}
		e, err := decodeEvent(frame)
		if err != nil {
			return Event{}, err
		}
		if e.Ping != nil {
			err = s.report(Report{})
		}
		if err != nil {
			return Event{}, err
		}
		if e.Welcome != nil || e.Netmap != nil || e.Delta != nil || e.Signal != nil || e.Refusal != nil {
			return e, nil
		}
	}
}

// decodeEvent reads one frame of the server. What it does not know it leaves
// out, so an event of an unknown kind comes back with no field set.
func decodeEvent(frame []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(frame, &e); err != nil {
		return Event{}, fmt.Errorf("decode event: %w", err)
	}
	if w := e.Welcome; w != nil {
		if len(w.Session) == 0 || len(w.Session) > maxSession || len(w.STUN) > maxSTUNPorts {
			return Event{}, fmt.Errorf("welcome with a session of %d bytes and %d STUN ports", len(w.Session), len(w.STUN))
		}
		if r := w.Relay; r != nil && (len(r.Key) != relayKeySize || len(r.Ports) > maxSTUNPorts) {
			return Event{}, fmt.Errorf("welcome with a relay key of %d bytes and %d relay ports", len(r.Key), len(r.Ports))
		}
	}
	if e.Refusal != nil {
		e.Refusal.Message, e.Refusal.Hint = printable(e.Refusal.Message), printable(e.Refusal.Hint)
	}
	if e.Signal != nil && len(e.Signal.Data) > MaxSignal {
		return Event{}, fmt.Errorf("signal of %d bytes, at most %d are allowed", len(e.Signal.Data), MaxSignal)
	}
	return e, nil
}

// Publish replaces this device's record.
func (s *Stream) Publish(p Publish) error { return s.report(Report{Publish: &p}) }

// Signal sends a sealed message to another device.
func (s *Stream) Signal(m Signal) error {
	if len(m.Data) > MaxSignal {
		return fmt.Errorf("signal of %d bytes, at most %d are allowed", len(m.Data), MaxSignal)
	}
	return s.report(Report{Signal: &m})
}

var errWriteTimeout = errors.New("the network takes no data")

// report writes one frame within writeTimeout, the wait for other writers
// included. A write that ran out of time leaves TLS unusable, so it ends the
// stream.
func (s *Stream) report(r Report) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	if len(b) > MaxBody {
		return fmt.Errorf("report of %d bytes, at most %d are allowed", len(b), MaxBody)
	}
	deadline := time.Now().Add(writeTimeout)
	late := time.NewTimer(writeTimeout)
	defer late.Stop()
	select {
	case <-s.turn:
	case <-late.C:
		return fmt.Errorf("report to coordinator %s: %w", s.conn.server, errWriteTimeout)
	}
	defer func() { s.turn <- struct{}{} }()
	err = s.conn.tls.SetWriteDeadline(deadline)
	if err == nil {
		err = WriteFrame(s.conn.tls, b)
	}
	if err != nil {
		_ = s.Close()
		return fmt.Errorf("report to coordinator %s: %w", s.conn.server, err)
	}
	return nil
}
