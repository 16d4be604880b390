package coord

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"overlay/coord/trust"
)

// Bounds of one request.
const (
	requestTimeout = 10 * time.Second
	maxReplyHeader = 16 << 10
	maxRetryAfter  = time.Hour
	maxErrorText   = 1000 // bytes of each text of an Error
)

// Conn is one TLS connection to a server. Requests go one after another on it,
// so that all of them, and the Stream in the end, share its TLS exporter. It is
// safe for concurrent use. After any failure but an Error it is closed.
type Conn struct {
	tls    *tls.Conn
	in     *meter
	br     *bufio.Reader
	server string
	proxy  string // host:port; empty: none
	hosts  []netip.Addr
	pin    trust.Hash

	mu  sync.Mutex // held from the first byte of a request to the last of its answer
	end error      // why there can be no more requests
}

func newConn(t *tls.Conn, server string) *Conn {
	in := &meter{conn: t}
	return &Conn{
		tls:    t,
		in:     in,
		br:     bufio.NewReader(in),
		server: server,
		pin:    pinOf(t.ConnectionState().PeerCertificates[0]),
	}
}

// Pin is the SHA-256 of the server's SubjectPublicKeyInfo.
func (c *Conn) Pin() trust.Hash { return c.pin }

// Server is the host:port that was dialled.
func (c *Conn) Server() string { return c.server }

// Proxied says whether the connection goes through a proxy. LocalAddr and
// RemoteAddr are then those of the connection to the proxy.
func (c *Conn) Proxied() bool { return c.proxy != "" }

// RemoteAddr is the server's address.
func (c *Conn) RemoteAddr() netip.AddrPort { return addrPort(c.tls.RemoteAddr()) }

// where says for people what was reached.
func (c *Conn) where() string {
	if c.Proxied() {
		return fmt.Sprintf("%s (through the proxy %s)", c.server, c.proxy)
	}
	return fmt.Sprintf("%s (%s)", c.server, c.RemoteAddr().Addr())
}

// Hosts are the server's addresses whose STUN ports to ask: the one of this
// connection, and one of the other family when the server's name has it, because
// a node wants to know its outside address in both. Through a proxy they are
// what this machine found the name to be by then, one of each family, or none.
func (c *Conn) Hosts() []netip.Addr { return c.hosts }

// LocalAddr is this end of the connection.
func (c *Conn) LocalAddr() netip.AddrPort { return addrPort(c.tls.LocalAddr()) }

func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Close ends the connection at once; closing it again does nothing. It skips
// the TLS farewell, which can wait for seconds on a dead network and says
// nothing here: every message carries its length.
func (c *Conn) Close() error {
	if err := c.tls.NetConn().Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close connection to coordinator %s: %w", c.server, err)
	}
	return nil
}

// Hello asks for the mesh's documents and this connection's challenge. Nothing
// in it is verified yet.
func (c *Conn) Hello(ctx context.Context) (Hello, error) {
	return call[Hello](ctx, c, request{path: "/v1/hello", limit: MaxBody})
}

// Own founds the mesh.
func (c *Conn) Own(ctx context.Context, r OwnRequest) (CertReply, error) {
	return call[CertReply](ctx, c, request{path: "/v1/own", body: r, limit: MaxBody})
}

// Join reserves a name and an address.
func (c *Conn) Join(ctx context.Context, r JoinRequest) (JoinReply, error) {
	return call[JoinReply](ctx, c, request{path: "/v1/join", body: r, limit: MaxBody})
}

// Cert hands in the signed certificate and gives the countersigned one.
func (c *Conn) Cert(ctx context.Context, r CertRequest) (CertReply, error) {
	return call[CertReply](ctx, c, request{path: "/v1/cert", body: r, limit: MaxBody})
}

// Revoke hands in a signed revocation.
func (c *Conn) Revoke(ctx context.Context, r RevokeRequest) error {
	_, err := call[struct{}](ctx, c, request{path: "/v1/revoke", body: r, limit: MaxBody})
	return err
}

// Invite hands in a signed invite capability.
func (c *Conn) Invite(ctx context.Context, r InviteRequest) error {
	_, err := call[struct{}](ctx, c, request{path: "/v1/invites", body: r, limit: MaxBody})
	return err
}

// Invites lists the mesh's invites.
func (c *Conn) Invites(ctx context.Context) (InviteList, error) {
	return call[InviteList](ctx, c, request{path: "/v1/invites", limit: MaxEvent})
}

// Nodes lists the mesh's members.
func (c *Conn) Nodes(ctx context.Context) (NodeList, error) {
	return call[NodeList](ctx, c, request{path: "/v1/nodes", limit: MaxEvent})
}

// Address tells how the server sees this end of the connection.
func (c *Conn) Address(ctx context.Context) (netip.AddrPort, error) {
	seen, err := call[Seen](ctx, c, request{path: "/v1/address", limit: MaxBody})
	return seen.Address, err
}

// request is one HTTP request: a GET, or with a body a POST.
type request struct {
	path   string
	body   any
	header http.Header
	limit  int // bytes of the answer's body
}

// call sends r and decodes the answer. Fields this program does not know are
// ignored, so that a newer server can say more.
func call[T any](ctx context.Context, c *Conn, r request) (T, error) {
	var out T
	c.mu.Lock()
	defer c.mu.Unlock()
	resp, body, err := c.exchange(ctx, r)
	if err != nil {
		return out, err
	}
	if resp.StatusCode != http.StatusOK {
		return out, refusal(resp, body)
	}
	if err := json.Unmarshal(body, &out); err != nil {
		return out, fmt.Errorf("read the answer of coordinator %s to %s: %w", c.server, r.path, err)
	}
	return out, nil
}

// refusal is the Error in an answer, made fit to be printed: before its key is
// checked the server can be anybody.
func refusal(resp *http.Response, body []byte) error {
	var e Error
	if err := json.Unmarshal(body, &e); err != nil || e.Code == "" {
		return fmt.Errorf("the coordinator answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	e.Code, e.Message, e.Hint = Code(printable(string(e.Code))), printable(e.Message), printable(e.Hint)
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		e.RetryAfter = min(time.Duration(min(s, int(maxRetryAfter/time.Second)))*time.Second, maxRetryAfter)
	}
	return &e
}

func printable(s string) string {
	s = strings.ToValidUTF8(s[:min(len(s), maxErrorText)], "")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, s)
}

// meter reads from the connection no more than it was granted.
type meter struct {
	conn *tls.Conn
	left int64
	// idle, when set, is the longest wait for more bytes.
	idle time.Duration
}

var errTooLong = errors.New("the answer is too long")

func (m *meter) Read(p []byte) (int, error) {
	if m.left <= 0 {
		return 0, errTooLong
	}
	if m.idle > 0 {
		if err := m.conn.SetReadDeadline(time.Now().Add(m.idle)); err != nil {
			return 0, err
		}
	}
	n, err := m.conn.Read(p[:min(int64(len(p)), m.left)])
	m.left -= int64(n)
	return n, err
}
