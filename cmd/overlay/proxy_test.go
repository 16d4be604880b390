package main

import (
	"context"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sync/errgroup"
)

// connectProxy is an HTTP proxy (RFC 9110 section 9.3.6) that leads every
// CONNECT to one address.
type connectProxy struct {
	to    string
	login string // user:password; empty: it asks for none

	mu    sync.Mutex
	conns []net.Conn
}

func (p *connectProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(p.login))
	switch {
	case r.Method != http.MethodConnect:
		http.Error(w, "only CONNECT", http.StatusMethodNotAllowed)
		return
	case p.login != "" && r.Header.Get("Proxy-Authorization") != want:
		w.Header().Set("Proxy-Authenticate", `Basic realm="test"`)
		http.Error(w, "who are you?", http.StatusProxyAuthRequired)
		return
	}
	far, err := net.Dial("tcp", p.to)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	near, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = far.Close()
		return
	}
	p.mu.Lock()
	p.conns = append(p.conns, near, far)
	p.mu.Unlock()
	_, _ = io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n")
	p.pipe(near, far)
}

// pipe copies both ways until one end is closed.
func (p *connectProxy) pipe(a, b net.Conn) {
	var g errgroup.Group
	for from, to := range map[net.Conn]net.Conn{a: b, b: a} {
		g.Go(func() error {
			_, err := io.Copy(to, from)
			_ = to.Close()
			return err
		})
	}
	_ = g.Wait()
}

func (p *connectProxy) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
}

// proxy VAR SERVER [USER:PASSWORD] runs an HTTP proxy that leads to SERVER
// whatever it is asked for. VAR is its address.
func startProxy(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) < 2 || len(args) > 3, "proxy VAR SERVER [USER:PASSWORD]")
	p := &connectProxy{to: args[1]}
	if len(args) == 3 {
		p.login = args[2]
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	srv := &http.Server{Handler: p}
	var g errgroup.Group
	g.Go(func() error { return srv.Serve(l) })
	ts.Defer(func() {
		p.close()
		_ = srv.Shutdown(context.Background())
		_ = g.Wait()
	})
	ts.Setenv(args[0], l.Addr().String())
}
