package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"

	"overlay/coord"
)

// localName is the Host of every local request; a browser cannot send it.
const localName = "local-overlay.sock"

// maxLocalReply bounds what a daemon may answer.
const maxLocalReply = 64 << 20

// Client speaks to a daemon over its socket. It may be used from any goroutine.
type Client struct{ http http.Client }

// NewClient makes a client; an empty socket means the default. Nothing is
// opened before the first request.
func NewClient(socket string) *Client {
	if socket == "" {
		socket = DefaultSocket
	}
	return &Client{http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// Status asks for the node's view of the mesh.
func (c *Client) Status(ctx context.Context) (st Status, err error) {
	return st, c.call(ctx, "GET", "/v1/status", nil, &st)
}

// Ping sends one echo to a peer, by name or overlay address.
func (c *Client) Ping(ctx context.Context, peer string) (p PingReply, err error) {
	return p, c.call(ctx, "POST", "/v1/ping", pingRequest{peer}, &p)
}

// Why asks how a peer, by name or overlay address, is reached, and why not directly.
func (c *Client) Why(ctx context.Context, peer string) (w Why, err error) {
	return w, c.call(ctx, "POST", "/v1/why", pingRequest{peer}, &w)
}

// Netcheck has the daemon look at its network; see NetcheckAlone for where none
// runs.
func (c *Client) Netcheck(ctx context.Context, r NetcheckRequest) (n Netcheck, err error) {
	return n, c.call(ctx, "POST", "/v1/netcheck", r, &n)
}

// Invite makes an invite on a signer's node.
func (c *Client) Invite(ctx context.Context, r InviteRequest) (i InviteReply, err error) {
	return i, c.call(ctx, "POST", "/v1/invite", r, &i)
}

// Invites lists the mesh's invites, on a signer's node.
func (c *Client) Invites(ctx context.Context) (l coord.InviteList, err error) {
	return l, c.call(ctx, "GET", "/v1/invites", nil, &l)
}

// Nodes lists the mesh's members.
func (c *Client) Nodes(ctx context.Context) (l coord.NodeList, err error) {
	return l, c.call(ctx, "GET", "/v1/nodes", nil, &l)
}

// Down ends the daemon and takes the interface down.
func (c *Client) Down(ctx context.Context) error {
	return c.call(ctx, "POST", "/v1/down", struct{}{}, nil)
}

// Leave gives the node's identity up and ends the daemon.
func (c *Client) Leave(ctx context.Context, r LeaveRequest) error {
	return c.call(ctx, "POST", "/v1/leave", r, nil)
}

// Up brings the node up; progress is called for every step.
func (c *Client) Up(ctx context.Context, r UpRequest, progress func(Progress)) (UpResult, error) {
	body, err := c.do(ctx, "POST", "/v1/up", r)
	if err != nil {
		return UpResult{}, err
	}
	defer body.Close()
	for d := json.NewDecoder(io.LimitReader(body, maxLocalReply)); ; {
		var l localLine
		if err := d.Decode(&l); err != nil {
			return UpResult{}, fail(Failure, "see its log: overlay.log in the state directory", "the daemon ended before it was up")
		}
		switch {
		case l.Error != nil:
			return UpResult{}, l.Error
		case l.Result != nil:
			return *l.Result, nil
		case l.Progress != nil:
			progress(*l.Progress)
		}
	}
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	body, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(body, maxLocalReply)).Decode(out); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

func (c *Client) do(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	b, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("encode the request: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+localName+path, bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("make the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, dialError(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	var e Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxLocalBody)).Decode(&e); err != nil || e.Kind == "" {
		return nil, fmt.Errorf("the daemon answered %s", resp.Status)
	}
	return nil, &e
}

func dialError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fail(NotRunning, "start it: sudo overlay up", "the daemon is not running")
	case errors.Is(err, fs.ErrPermission):
		return fail(Permission, "run it with sudo", "the daemon's socket may not be opened")
	}
	return fmt.Errorf("ask the daemon: %w", err)
}
