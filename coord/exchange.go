package coord

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
)

// exchange sends one request and reads its answer whole. The caller holds mu.
// What breaks the connection is remembered: a late answer must never be taken
// for that of the next request.
func (c *Conn) exchange(ctx context.Context, r request) (*http.Response, []byte, error) {
	if c.end != nil {
		return nil, nil, fmt.Errorf("ask coordinator %s for %s: %w", c.server, r.path, c.end)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	resp, body, err := c.roundTrip(r)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err == nil && resp.Close {
		c.end = errServerClosed
		_ = c.Close()
	}
	if err != nil {
		c.end = err
		_ = c.Close()
		return nil, nil, fmt.Errorf("ask coordinator %s for %s: %w", c.server, r.path, err)
	}
	return resp, body, nil
}

var (
	errNoAnswer     = fmt.Errorf("no answer within %s: %w", requestTimeout, context.DeadlineExceeded)
	errServerClosed = errors.New("the server closed the connection")
)

func (c *Conn) roundTrip(r request) (*http.Response, []byte, error) {
	req, err := c.compose(r)
	if err != nil {
		return nil, nil, err
	}
	if err := req.Write(c.tls); err != nil {
		return nil, nil, err
	}
	c.in.left = maxReplyHeader
	resp, err := http.ReadResponse(c.br, req)
	if err != nil {
		return nil, nil, fmt.Errorf("read answer: %w", err)
	}
	c.in.left = int64(r.limit) + maxReplyHeader // room for the chunks' headers
	body, err := io.ReadAll(io.LimitReader(resp.Body, int64(r.limit)+1))
	if err != nil {
		return nil, nil, fmt.Errorf("read answer: %w", err)
	}
	if len(body) > r.limit {
		return nil, nil, errTooLong
	}
	return resp, body, nil
}

func (c *Conn) compose(r request) (*http.Request, error) {
	method, body := http.MethodGet, io.Reader(nil)
	if r.body != nil {
		b, err := json.Marshal(r.body)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		method, body = http.MethodPost, bytes.NewReader(b)
	}
	req, err := http.NewRequest(method, "https://"+c.server+r.path, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, r.header)
	req.Header.Set("User-Agent", "overlay")
	req.Header.Set(HeaderVersion, strconv.Itoa(Version))
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, nil
}
