package relay

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
)

// admitDeadline is how long a connection may take to say whose it is.
const admitDeadline = 10 * time.Second

var errNotAdmitted = errors.New("not admitted")

// ServeConn serves a node over an upgraded TLS connection, whose exporter gives
// the binding, until the connection or ctx ends. It closes the connection, and
// always returns an error. An idle connection costs the caller's goroutine, whose
// stack stays small when it is a new one.
func (s *Server) ServeConn(ctx context.Context, c net.Conn, binding [16]byte) error {
	var writers errgroup.Group
	f := newFramed(c, &writers, &s.lender, s.log)
	f.queue.dropped = &s.count.full
	stop := context.AfterFunc(ctx, f.close)
	defer stop()
	err := s.serveFramed(f, binding)
	f.close()
	_ = writers.Wait() // writers return no errors
	return err
}

func (s *Server) serveFramed(f *framed, binding [16]byte) error {
	remote, _ := netip.ParseAddrPort(f.conn.RemoteAddr().String()) // limits count by it; zero is one network as well
	t := streamTransport(f, remote)
	var n *node
	var admission errgroup.Group // its stack is deep, and not needed again
	admission.Go(func() (err error) {
		n, err = s.admitFramed(f, t, binding)
		return err
	})
	if err := admission.Wait(); err != nil {
		return err
	}
	defer s.leave(n, t)
	return f.read(func(run []byte) error {
		switch run[framePrefix] {
		case FlowByte:
			s.forwardRun(n, run)
		case ControlByte:
			if reply := s.control(n, run[framePrefix:], t); reply != nil {
				f.control(reply)
			}
		}
		return nil
	})
}

// admitFramed takes the first frame, which must be an ADMIT made for this
// connection.
func (s *Server) admitFramed(f *framed, t *transport, binding [16]byte) (*node, error) {
	if err := f.conn.SetReadDeadline(time.Now().Add(admitDeadline)); err != nil {
		return nil, fmt.Errorf("bound admission: %w", err)
	}
	msg, err := f.first()
	if err != nil {
		return nil, fmt.Errorf("read admission: %w", err)
	}
	reply, n := s.admit(msg, func(k cookie) bool { return subtle.ConstantTimeCompare(k[:], binding[:]) == 1 }, t)
	if n == nil {
		if reply != nil {
			_ = f.send(appendFrame(nil, reply), nil) // that it is refused is all that matters here
		}
		return nil, errNotAdmitted
	}
	f.control(reply)
	if err := f.conn.SetReadDeadline(time.Time{}); err != nil { // a silent node expires
		s.leave(n, t)
		return nil, fmt.Errorf("unbound reading: %w", err)
	}
	return n, nil
}
