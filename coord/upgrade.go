package coord

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"strings"
)

// Export derives 32 bytes that only the two ends of this connection have (RFC
// 8446 section 7.5); label is one of the Exporter constants.
func (c *Conn) Export(label string) ([]byte, error) {
	state := c.tls.ConnectionState()
	key, err := state.ExportKeyingMaterial(label, nil, exporterSize)
	if err != nil {
		return nil, fmt.Errorf("export key of the connection: %w", err)
	}
	return key, nil
}

// Upgrade turns the connection into one of another protocol; it has no other
// use from then on. Reading and writing the result is like that of a tls.Conn,
// but Close ends it at once. ctx bounds the request only.
func (c *Conn) Upgrade(ctx context.Context, path, protocol string) (net.Conn, error) {
	if err := c.upgrade(ctx, request{path: path, limit: MaxBody}, protocol); err != nil {
		return nil, err
	}
	return &upgradedConn{Conn: c.tls, from: c}, nil
}

// upgrade asks for a protocol (RFC 9110 section 7.8). What is read afterwards
// is not bounded here.
func (c *Conn) upgrade(ctx context.Context, r request, protocol string) error {
	header := http.Header{"Connection": {"Upgrade"}, "Upgrade": {protocol}}
	maps.Copy(header, r.header)
	r.header = header
	c.mu.Lock()
	defer c.mu.Unlock()
	resp, body, err := c.exchange(ctx, r)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return refusal(resp, body)
	}
	if !strings.EqualFold(resp.Header.Get("Upgrade"), protocol) {
		return fmt.Errorf("the server %s switched to another protocol", c.server)
	}
	c.end = errUpgraded
	c.in.left = math.MaxInt64
	return nil
}

var errUpgraded = errors.New("the connection has become a stream")

// upgradedConn is a Conn after Upgrade. Bytes that came right behind the answer are
// in the reader of its Conn.
type upgradedConn struct {
	*tls.Conn
	from *Conn
}

// Read implements net.Conn.
func (u *upgradedConn) Read(p []byte) (int, error) { return u.from.br.Read(p) }

// Close implements net.Conn. It does not wait for the network.
func (u *upgradedConn) Close() error { return u.from.Close() }
