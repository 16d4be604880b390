package relay

import (
	"context"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"
)

// Stream carries flow frames between two nodes over a connection of their own,
// as a relay's connection does: each datagram behind its length in two bytes.
type Stream struct {
	framed *framed
	group  *errgroup.Group
}

// NewStream makes a Stream of a connection; Run uses it up.
func NewStream(c net.Conn, log *slog.Logger) *Stream {
	var group errgroup.Group
	return &Stream{framed: newFramed(c, &group, &blocks{}, log), group: &group}
}

// Run hands runs of flow frames to deliver, which may use them until it returns,
// until the connection or ctx ends. It closes the connection, and always returns
// an error.
func (s *Stream) Run(ctx context.Context, deliver func(run []byte)) error {
	stop := context.AfterFunc(ctx, s.framed.close)
	defer stop()
	err := s.framed.read(func(run []byte) error {
		if run[framePrefix] == FlowByte {
			deliver(run)
		}
		return nil
	})
	s.framed.close()
	_ = s.group.Wait() // writers return no errors
	return err
}

// Offer queues copies of a run of flow frames. It never blocks; frames that find
// no room push out older ones. Safe for concurrent use.
func (s *Stream) Offer(run []byte) { s.framed.offer(run) }
