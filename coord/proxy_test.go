package coord

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord/trust"
)

// proxy is an HTTP proxy for CONNECT. It knows by which address the name of a
// request is reached.
type proxy struct {
	t     *testing.T
	login string // user:password that it wants; empty: anybody may
	names map[string]string

	mu    sync.Mutex
	asked []string // targets of the requests
	open  []net.Conn
}

// start serves on loopback until the test ends.
func (p *proxy) start() *url.URL {
	l, wg := listen(p.t), sync.WaitGroup{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(c) })
		}
	})
	p.t.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		for _, c := range p.open {
			_ = c.Close()
		}
		p.mu.Unlock()
		wg.Wait()
	})
	return &url.URL{Scheme: "http", Host: l.Addr().String()}
}

func (p *proxy) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = append(p.open, c)
}

func (p *proxy) serve(c net.Conn) {
	defer func() { _ = c.Close() }()
	p.keep(c)
	r, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil || r.Method != http.MethodConnect || r.Host != r.RequestURI {
		p.t.Errorf("request %+v: %v", r, err)
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, r.RequestURI)
	p.mu.Unlock()
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(p.login))
	if p.login != "" && r.Header.Get("Proxy-Authorization") != want {
		_, _ = io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"lab\"\r\nContent-Length: 2\r\n\r\nno")
		return
	}
	to, ok := p.names[r.RequestURI]
	if !ok {
		_, _ = io.WriteString(c, "HTTP/1.1 502 \x1b[31mBad\r\n\r\n")
		return
	}
	far, err := net.Dial("tcp", to)
	if err != nil {
		p.t.Error(err)
		return
	}
	p.keep(far)
	_, _ = io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n")
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(far, c); _ = far.Close() })
	_, _ = io.Copy(c, far)
	_ = c.Close()
	wg.Wait()
}

const proxiedServer = "vpn.example.org:8443"

// proxiedDialer knows a server's name only by the proxy.
func proxiedDialer(u *url.URL) *Dialer {
	return &Dialer{
		Servers: []string{proxiedServer}, Device: testKey("anna"), Proxy: u,
		lookup: func(context.Context, string) ([]netip.Addr, error) {
			return nil, &net.DNSError{IsNotFound: true, Name: "vpn.example.org"}
		},
	}
}

func TestProxy(t *testing.T) {
	addr := serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{}`) }))
	for _, login := range []string{"", "anna:pass:wörd", "anna:"} {
		p := &proxy{t: t, login: login, names: map[string]string{proxiedServer: addr}}
		u := p.start()
		if user, password, ok := strings.Cut(login, ":"); ok {
			u.User = url.UserPassword(user, password)
		}
		c, err := proxiedDialer(u).Dial(t.Context())
		if err != nil {
			t.Fatalf("%q: %v", login, err)
		}
		if _, err := c.Hello(t.Context()); err != nil {
			t.Error(err)
		}
		if !c.Proxied() || c.RemoteAddr().String() != u.Host || len(c.Hosts()) > 0 || c.Pin() != testPin(t, testKey("server")) {
			t.Errorf("proxied %v by %v, hosts %v", c.Proxied(), c.RemoteAddr(), c.Hosts())
		}
		if want := proxiedServer + " (through the proxy " + u.Host + ")"; c.where() != want {
			t.Errorf("%q, want %q", c.where(), want)
		}
		if !slices.Equal(p.asked, []string{proxiedServer}) {
			t.Errorf("asked for %q", p.asked)
		}
		_ = c.Close()
	}
}

// The name is looked up here as well, for STUN; a proxy that intercepts is
// found out; and a direct way that is there is taken when the proxy is not.
func TestProxyAndDirect(t *testing.T) {
	addr := serve(t, testKey("server"), http.NotFoundHandler())
	p := &proxy{t: t, names: map[string]string{addr: addr}}
	d := &Dialer{Servers: []string{addr}, Device: testKey("anna"), Proxy: p.start()}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if host := netip.MustParseAddrPort(addr).Addr(); !c.Proxied() || !slices.Equal(c.Hosts(), []netip.Addr{host}) {
		t.Errorf("proxied %v, hosts %v", c.Proxied(), c.Hosts())
	}

	d.Verify = func(trust.Hash) error { return errors.New("another key") }
	if _, err = d.Dial(t.Context()); err == nil || rank(err) != 4 {
		t.Errorf("an intercepting proxy: %v", err)
	}

	d.Verify, d.Proxy = nil, &url.URL{Scheme: "http", Host: closedPort(t)}
	if c, err = d.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if c.Proxied() {
		t.Error("it came through a closed port")
	}
}

func TestProxyErrors(t *testing.T) {
	login := &proxy{t: t, login: "anna:right"}
	wants := login.start()
	refuses := *wants
	refuses.User = url.UserPassword("anna", "s3cret")
	at := func(addr string) *url.URL { return &url.URL{Scheme: "http", Host: addr} }
	for _, tt := range []struct {
		name   string
		proxy  *url.URL
		status int
		text   string
	}{
		{"wants a password", wants, 407, "the proxy " + wants.Host + " wants a user name and password; give it with --proxy http://USER:PASSWORD@" + wants.Host},
		{"refuses the password", &refuses, 407, "does not accept the user name and password; give it with --proxy"},
		{"does not reach it", (&proxy{t: t}).start(), 502, "does not connect to it (502 Bad Gateway)"},
		{"forbids", at(answer(t, "HTTP/1.1 403 Go away\r\n\r\n")), 403, "does not connect to it (403 Forbidden)"},
		{"refused", at(closedPort(t)), 0, "connection refused"},
		{"garbage", at(answer(t, "SSH-2.0-OpenSSH_10.0\r\n")), 0, "is no HTTP proxy"},
		{"hangs up", at(answer(t, "")), 0, "is no HTTP proxy"},
		{"half an answer", at(answer(t, "HTTP/1.1 200 OK\r\nX-Half: ")), 0, "is no HTTP proxy"},
		{"endless header", at(answer(t, "HTTP/1.1 200 OK\r\nX-Long: "+strings.Repeat("a", 2*maxProxyHeader)+"\r\n\r\n")), 0, "is no HTTP proxy"},
		{"many headers", at(answer(t, "HTTP/1.1 200 OK\r\n"+strings.Repeat("X-Short: a\r\n", maxProxyHeader/8)+"\r\n")), 0, "is no HTTP proxy"},
		{"speaks first", at(answer(t, "HTTP/1.1 200 OK\r\n\r\nhello")), 0, "is no HTTP proxy"},
		{"unknown name", at("proxy.example.org:3128"), 0, `the proxy is not found: the name "proxy.example.org" does not exist`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := proxiedDialer(tt.proxy).Dial(t.Context())
			got, ok := errors.AsType[*ReachError](err)
			if !ok {
				t.Fatalf("error %v, want a ReachError", err)
			}
			if got.Stage != StageProxy || got.Server != proxiedServer || got.Proxy != tt.proxy.Host || got.Status != tt.status {
				t.Errorf("error %#v", got)
			}
			if !strings.Contains(err.Error(), tt.text) || !strings.HasPrefix(err.Error(), "cannot reach coordinator "+proxiedServer) {
				t.Errorf("error %q, want %q in it", err, tt.text)
			}
			if strings.ContainsAny(err.Error(), "\x1b\r\n") || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("error %q is not fit to be printed", err)
			}
		})
	}
}

// TLS that fails behind the proxy is told as that.
func TestProxyTLSError(t *testing.T) {
	p := &proxy{t: t, names: map[string]string{proxiedServer: answer(t, "")}}
	_, err := proxiedDialer(p.start()).Dial(t.Context())
	if err == nil || !strings.Contains(err.Error(), "closed the connection during TLS") || !strings.Contains(err.Error(), "(through the proxy 127.0.0.1:") {
		t.Errorf("error %v", err)
	}
}

func TestProxyForm(t *testing.T) {
	for _, s := range []string{"https://proxy:443", "socks5://proxy:1080", "http://", "http:///path", "anna:s3cret@proxy:3128", "http://proxy:0", "http://proxy:99999"} {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		_, err = (&Dialer{Servers: []string{proxiedServer}, Device: testKey("anna"), Proxy: u}).Dial(t.Context())
		if !errors.Is(err, errProxyForm) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", s, err)
		}
	}
	if got := portOf(&url.URL{Scheme: "http", Host: "proxy.example.org"}); got != "80" {
		t.Errorf("port %s", got)
	}
}

// A proxy that takes the connection and says nothing costs the head start when
// there is a direct way, and else the time of one address.
func TestProxyHangs(t *testing.T) {
	for name, direct := range map[string]bool{"with a direct way": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := network{t, map[string]host{"192.0.2.1": {mute: true}, "192.0.2.2": {}}}
				d := Dialer{Servers: []string{"192.0.2.2:443"}, Device: testKey("anna"), Connect: n.connect, Proxy: &url.URL{Scheme: "http", Host: "192.0.2.1:3128"}}
				if !direct {
					n.hosts["192.0.2.2"] = host{delay: time.Hour}
				}
				start := time.Now()
				c, err := d.Dial(t.Context())
				took := time.Since(start)
				if direct {
					if err != nil || c.Proxied() || took != headStart {
						t.Fatalf("%v after %s", err, took)
					}
					_ = c.Close()
					return
				}
				if err == nil || !strings.Contains(err.Error(), "the proxy 192.0.2.1:3128 does not answer") || took != addressTimeout+headStart {
					t.Errorf("error %v after %s", err, took)
				}
			})
		})
	}
}

// A look-up that nobody answers holds up neither the proxy nor the end.
func TestProxyWithoutNameServer(t *testing.T) {
	addr := serve(t, testKey("server"), http.NotFoundHandler())
	p := &proxy{t: t, names: map[string]string{proxiedServer: addr}}
	d := proxiedDialer(p.start())
	d.lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if len(c.Hosts()) > 0 {
		t.Errorf("hosts %v", c.Hosts())
	}
}

// answered is a connection on which a proxy says something.
type answered struct {
	net.Conn
	r io.Reader
}

func (a answered) Read(b []byte) (int, error)  { return a.r.Read(b) }
func (a answered) Write(b []byte) (int, error) { return len(b), nil }
func (a answered) Close() error                { return nil }

// FuzzProxyAnswer: whatever answers CONNECT, nothing of it gets into an error
// and no more of it is read than a header may have.
func FuzzProxyAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 200\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.1 407 \x1b[31mNo\r\nProxy-Authenticate: Basic\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "SSH-2.0-x\r\n", "",
	} {
		f.Add([]byte(s))
	}
	d, to := &Dialer{Proxy: &url.URL{Scheme: "http", Host: "192.0.2.1:3128"}}, target{host: "vpn.example.org", port: 443}
	f.Fuzz(func(t *testing.T, b []byte) {
		rest := bytes.NewReader(append(b[:len(b):len(b)], make([]byte, 2*maxProxyHeader)...))
		status, err := d.ask(t.Context(), to, answered{r: rest})
		if read := int(rest.Size()) - rest.Len(); read > maxProxyHeader {
			t.Errorf("%d bytes were read", read)
		}
		if err == nil { // the answer ended where a read did
			return
		}
		shown := (&ReachError{Stage: StageProxy, Server: proxiedServer, Proxy: d.Proxy.Host, Status: status, Err: err}).Error()
		if strings.ContainsAny(shown, "\x1b\r\n") {
			t.Errorf("error %q is not fit to be printed", shown)
		}
	})
}
