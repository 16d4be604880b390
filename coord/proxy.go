package coord

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
)

const (
	proxyPort      = 80       // of a proxy that names none
	maxProxyHeader = 16 << 10 // of its answer to CONNECT
)

var (
	errProxyForm = errors.New("the proxy is not of the form http://[USER:PASSWORD@]HOST:PORT")
	errNotProxy  = errors.New("no answer of an HTTP proxy")
	errNoLogin   = errors.New("wants a user name and password")
	errBadLogin  = errors.New("does not accept the user name and password")
)

// checkProxy refuses what no connection can go through. It repeats nothing of
// it: where the password stands in a damaged URL nobody can tell.
func checkProxy(u *url.URL) error {
	if u == nil {
		return nil
	}
	if u.Scheme != "http" || u.Hostname() == "" {
		return errProxyForm
	}
	if port, err := strconv.ParseUint(portOf(u), 10, 16); err != nil || port == 0 {
		return errProxyForm
	}
	return nil
}

func portOf(u *url.URL) string {
	if u.Port() == "" {
		return strconv.Itoa(proxyPort)
	}
	return u.Port()
}

// proxied asks the addresses of the proxy side by side for the server.
func (d *Dialer) proxied(ctx context.Context, t target) outcome {
	name := net.JoinHostPort(d.Proxy.Hostname(), portOf(d.Proxy))
	port, _ := strconv.ParseUint(portOf(d.Proxy), 10, 16) // checkProxy has looked at it
	addrs, err := d.resolve(ctx, d.Proxy.Hostname(), uint16(port))
	if err == nil && len(addrs) == 0 {
		err = errNoAddress
	}
	if err != nil {
		return outcome{err: &ReachError{Stage: StageProxy, Server: t.server, Proxy: name, Err: err}}
	}
	attempts := make([]attempt, len(addrs))
	for i, addr := range addrs {
		attempts[i] = func(ctx context.Context) outcome { return d.through(ctx, t, addr) }
	}
	won := race(ctx, attempts)
	won.proxy = name
	if failed, ok := errors.AsType[*ReachError](won.err); ok {
		failed.Proxy = name
	}
	return won
}

// through does TCP and CONNECT with one address of the proxy, and TLS with the
// server behind it.
func (d *Dialer) through(ctx context.Context, t target, addr netip.AddrPort) outcome {
	ctx, cancel := context.WithTimeout(ctx, addressTimeout)
	defer cancel()
	raw, err := d.dialTCP(ctx, addr)
	if err != nil {
		return outcome{err: &ReachError{Stage: StageProxy, Server: t.server, Err: err}}
	}
	status, err := d.ask(ctx, t, raw)
	if err != nil {
		_ = raw.Close()
		return outcome{err: &ReachError{Stage: StageProxy, Server: t.server, Status: status, Err: err}}
	}
	return d.secure(ctx, t, raw)
}

// ask sends CONNECT (RFC 9110 section 9.3.6) and reads the answer. Its status
// is 0 when there was none.
func (d *Dialer) ask(ctx context.Context, t target, raw net.Conn) (status int, err error) {
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer func() {
		if !stop() {
			err = ctx.Err()
		}
	}()
	to := net.JoinHostPort(t.host, strconv.Itoa(int(t.port)))
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: to}, Host: to, Header: http.Header{}}
	req.Header.Set("User-Agent", "overlay")
	if u := d.Proxy.User; u != nil {
		password, _ := u.Password()
		pair := base64.StdEncoding.EncodeToString([]byte(u.Username() + ":" + password)) // RFC 7617
		req.Header.Set("Proxy-Authorization", "Basic "+pair)
	}
	if err := req.Write(raw); err != nil {
		return 0, fmt.Errorf("ask proxy: %w", err)
	}
	br := bufio.NewReader(io.LimitReader(raw, maxProxyHeader))
	resp, err := http.ReadResponse(br, req)
	_, broken := errors.AsType[net.Error](err)
	switch {
	case broken:
		return 0, err // by the network
	case err != nil:
		return 0, errNotProxy // nothing of what it said is fit to be printed
	case resp.StatusCode == http.StatusProxyAuthRequired && d.Proxy.User == nil:
		return resp.StatusCode, errNoLogin
	case resp.StatusCode == http.StatusProxyAuthRequired:
		return resp.StatusCode, errBadLogin
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		return resp.StatusCode, fmt.Errorf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	case br.Buffered() > 0:
		return 0, errNotProxy // in TLS the server never speaks first
	}
	return resp.StatusCode, nil
}

// proxyReason says what went wrong at or before the proxy.
func proxyReason(e *ReachError) string {
	_, dns := errors.AsType[*net.DNSError](e.Err)
	switch {
	case e.Status == http.StatusProxyAuthRequired:
		return fmt.Sprintf("the proxy %s %s; give it with --proxy http://USER:PASSWORD@%s", e.Proxy, e.Err, e.Proxy)
	case e.Status != 0:
		return fmt.Sprintf("the proxy %s does not connect to it (%s)", e.Proxy, e.Err)
	case dns || errors.Is(e.Err, errNoAddress):
		return "the proxy is not found: " + dnsReason(e.Proxy, e.Err)
	case errors.Is(e.Err, errNotProxy):
		return fmt.Sprintf("what answers at %s is no HTTP proxy", e.Proxy)
	case timedOut(e.Err):
		return fmt.Sprintf("the proxy %s does not answer", e.Proxy)
	}
	return fmt.Sprintf("the proxy %s: %s", e.Proxy, networkReason(e.Err))
}
