package direct

import (
	"context"
	"errors"
	"net"

	"overlay/punch"
)

// Conn is a UDP connection to one peer. Dial makes it. It is safe for concurrent
// use.
type Conn struct {
	*PacketConn
	peer Addr
}

var _ net.Conn = (*Conn)(nil)

// Dial opens a UDP port and finds a path to a peer that does the same. It waits
// until there is one or ctx ends; neither side has to be first. The connection
// stays when the path moves, or is lost for a while.
func Dial(ctx context.Context, c Config, peer punch.Key) (*Conn, error) {
	p, err := Listen(c)
	if err != nil {
		return nil, err
	}
	if err := p.Connect(ctx, peer); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &Conn{p, Addr{peer}}, nil
}

// Read implements net.Conn: one datagram. What does not fit into b is lost.
func (c *Conn) Read(b []byte) (int, error) {
	n, _, err := c.ReadFrom(b)
	return n, err
}

// Write implements net.Conn: one datagram. While there is no path it is lost.
func (c *Conn) Write(b []byte) (int, error) { return c.WriteTo(b, c.peer) }

// RemoteAddr implements net.Conn: an Addr, which stays the same when the path
// moves.
func (c *Conn) RemoteAddr() net.Addr { return c.peer }
