package relay

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"testing"

	"golang.org/x/sync/errgroup"
)

// TestStream carries flow frames both ways, and nothing else.
func TestStream(t *testing.T) {
	near, far := net.Pipe()
	log := slog.New(slog.DiscardHandler)
	one, two := NewStream(near, log), NewStream(far, log)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var g errgroup.Group
	got := make(chan []byte, 2)
	take := func(run []byte) { got <- bytes.Clone(run) }
	g.Go(func() error { _ = one.Run(ctx, take); return nil })
	g.Go(func() error { _ = two.Run(ctx, take); return nil })
	flow := appendFrame(nil, append([]byte{FlowByte}, "datagram"...))
	for _, s := range []*Stream{one, two} {
		s.Offer(append(appendFrame(nil, []byte{ControlByte, 1}), flow...))
		if run := <-got; !bytes.Equal(run, flow) {
			t.Errorf("got %x, want %x", run, flow)
		}
	}
	cancel()
	_ = g.Wait()
	one.Offer(flow) // does nothing
}
