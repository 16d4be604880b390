package coord

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlay/coord/trust"
)

func TestDial(t *testing.T) {
	device := testKey("anna")
	var seen atomic.Pointer[tls.ConnectionState]
	addr := serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r.TLS)
		_, _ = io.WriteString(w, `{}`)
	}))
	c := dial(t, addr)
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := c.Pin(), testPin(t, testKey("server")); got != want {
		t.Errorf("pin %x, want %x", got, want)
	}
	if got := c.RemoteAddr().String(); got != addr {
		t.Errorf("remote address %s, want %s", got, addr)
	}
	if got := c.LocalAddr(); !got.Addr().IsLoopback() || got.Port() == 0 {
		t.Errorf("local address %s", got)
	}
	tlsState := seen.Load()
	if tlsState.CurveID != tls.X25519MLKEM768 || tlsState.Version != tls.VersionTLS13 || tlsState.NegotiatedProtocol != "http/1.1" {
		t.Errorf("curve %s, version %x, protocol %q", tlsState.CurveID, tlsState.Version, tlsState.NegotiatedProtocol)
	}
	if got := tlsState.PeerCertificates[0].PublicKey.(ed25519.PublicKey); !got.Equal(device.Public()) {
		t.Errorf("the server saw the key %x", got)
	}
}

func TestDialVerify(t *testing.T) {
	var reached atomic.Bool
	addr := serve(t, testKey("server"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Store(true) }))
	right, wrong := testPin(t, testKey("server")), testPin(t, testKey("other"))
	said := errors.New("not in the state")
	verify := func(err error) func(trust.Hash) error {
		return func(trust.Hash) error { return err }
	}
	for _, tt := range []struct {
		name   string
		verify func(trust.Hash) error
		want   *PinError
		text   string
	}{
		{name: "accepted", verify: verify(nil)},
		{
			name: "named", verify: verify(&PinError{Want: wrong}), want: &PinError{Server: addr, Want: wrong, Got: right},
			text: "expected key " + shortHash(wrong) + ", got " + shortHash(right),
		},
		{name: "other error", verify: verify(said), want: &PinError{Server: addr, Got: right, Err: said}, text: "(got key " + shortHash(right)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := Dialer{Servers: []string{"127.0.0.1:1", addr}, Device: testKey("anna"), Verify: tt.verify}
			c, err := d.Dial(t.Context())
			if tt.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				_ = c.Close()
				return
			}
			got, ok := errors.AsType[*PinError](err)
			if !ok {
				t.Fatalf("error %v, want a PinError", err)
			}
			if got.Server != tt.want.Server || got.Want != tt.want.Want || got.Got != tt.want.Got || !errors.Is(got, tt.want.Err) && tt.want.Err != nil {
				t.Errorf("error %#v, want %#v", got, tt.want)
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q, want %q in it", err, tt.text)
			}
		})
	}
	if reached.Load() {
		t.Error("a request reached a server whose key was refused")
	}
}

// answer is a server that sends text to every connection and closes it.
func answer(t *testing.T, text string) string {
	l := listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4096))
			_, _ = io.WriteString(c, text)
			_ = c.Close()
		}
	}()
	return l.Addr().String()
}

func oldTLS(t *testing.T) string {
	l := listen(t)
	config := testTLS(t, testKey("server"))
	config.MinVersion, config.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = tls.Server(c, config).Handshake()
			_ = c.Close()
		}
	}()
	return l.Addr().String()
}

func closedPort(t *testing.T) string {
	l := listen(t)
	_ = l.Close()
	return l.Addr().String()
}

func TestReachError(t *testing.T) {
	for _, tt := range []struct {
		name, server, stage, text string
		lookup                    error
	}{
		{"no such name", "vpn.example.org:443", StageDNS, `the name "vpn.example.org" does not exist`, &net.DNSError{IsNotFound: true}},
		{"no name server", "vpn.example.org:443", StageDNS, "no name server answered", &net.DNSError{IsTimeout: true}},
		{"name server fails", "vpn.example.org:443", StageDNS, "failed: server misbehaving", &net.DNSError{Err: "server misbehaving"}},
		{"no address", "vpn.example.org:443", StageDNS, "has no address", nil},
		{"no port", "vpn.example.org", StageDNS, "is not host:port", nil},
		{"bad port", "vpn.example.org:https?", StageDNS, "is not a port", nil},
		{"refused", closedPort(t), StageTCP, "connection refused", nil},
		{"captive portal", answer(t, "HTTP/1.1 302 Found\r\n\r\n"), StageTLS, "captive portal", nil},
		{"another service", answer(t, "SSH-2.0-OpenSSH_10.0\r\n"), StageTLS, "does not speak TLS", nil},
		{"closed", answer(t, ""), StageTLS, "closed the connection during TLS", nil},
		{"TLS 1.2", oldTLS(t), StageTLS, "refused TLS 1.3", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := Dialer{Servers: []string{tt.server}, Device: testKey("anna")}
			d.lookup = func(context.Context, string) ([]netip.Addr, error) { return nil, tt.lookup }
			_, err := d.Dial(t.Context())
			got, ok := errors.AsType[*ReachError](err)
			if !ok {
				t.Fatalf("error %v, want a ReachError", err)
			}
			if got.Stage != tt.stage || got.Server != tt.server || (len(got.Tried) > 0) != (tt.stage != StageDNS) {
				t.Errorf("error %#v", got)
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q, want %q in it", err, tt.text)
			}
			if tt.lookup != nil && !errors.Is(err, tt.lookup) {
				t.Errorf("error %v does not wrap its cause", err)
			}
		})
	}
}

func TestReachErrorSaysWhatWasTried(t *testing.T) {
	d := Dialer{Servers: []string{"vpn.example.org:8443"}, Device: testKey("anna")}
	d.lookup = func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("::ffff:203.0.113.5"), netip.MustParseAddr("203.0.113.6"), netip.MustParseAddr("2001:db8::5")}, nil
	}
	d.Connect = func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, syscall.EHOSTUNREACH }
	_, err := d.Dial(t.Context())
	want := "cannot reach coordinator vpn.example.org:8443: no route to host (tried 203.0.113.5, 2001:db8::5, 203.0.113.6; DNS ok)"
	if err == nil || err.Error() != want {
		t.Errorf("error %v\nwant  %s", err, want)
	}
}

// network is a set of addresses in memory: each takes its time and then either
// refuses or leads to a TLS server.
type network struct {
	t     *testing.T
	hosts map[string]host
}

type host struct {
	delay time.Duration
	err   error
	mute  bool // accepts and says nothing
}

func (n network) lookup(context.Context, string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for i := range len(n.hosts) {
		addrs = append(addrs, netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}))
	}
	return addrs, nil
}

func (n network) connect(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	h := n.hosts[addr.Addr().String()]
	select {
	case <-time.After(h.delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if h.err != nil {
		return nil, h.err
	}
	near, far := net.Pipe()
	if h.mute {
		go func() { _, _ = io.Copy(io.Discard, far) }()
		return near, nil
	}
	config := testTLS(n.t, testKey(addr.Addr().String()))
	go func() { _ = tls.Server(far, config).Handshake() }()
	return near, nil
}

func TestRace(t *testing.T) {
	const never = time.Hour
	for _, tt := range []struct {
		name  string
		hosts map[string]host
		took  time.Duration
		won   string // address, or what the error says
	}{
		{"first", map[string]host{"192.0.2.1": {}, "192.0.2.2": {}}, 0, "192.0.2.1"},
		{"second after the head start", map[string]host{"192.0.2.1": {delay: never}, "192.0.2.2": {}}, headStart, "192.0.2.2"},
		{"second at once after a refusal", map[string]host{"192.0.2.1": {err: syscall.ECONNREFUSED}, "192.0.2.2": {}}, 0, "192.0.2.2"},
		{"slow first wins", map[string]host{"192.0.2.1": {delay: 2 * headStart}, "192.0.2.2": {delay: never}}, 2 * headStart, "192.0.2.1"},
		{"first is mute", map[string]host{"192.0.2.1": {mute: true}, "192.0.2.2": {}}, headStart, "192.0.2.2"},
		{"all time out", map[string]host{"192.0.2.1": {delay: never}, "192.0.2.2": {delay: never}}, addressTimeout + headStart, "timed out"},
		{"mute says most", map[string]host{"192.0.2.1": {mute: true}, "192.0.2.2": {err: syscall.ECONNREFUSED}}, addressTimeout, "does not answer TLS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := network{t, tt.hosts}
				d := Dialer{Servers: []string{"vpn.example.org:443"}, Device: testKey("anna"), lookup: n.lookup, Connect: n.connect}
				start := time.Now()
				c, err := d.Dial(t.Context())
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %s, want %s", took, tt.took)
				}
				if err != nil {
					if !strings.Contains(err.Error(), tt.won) {
						t.Errorf("error %q, want %q", err, tt.won)
					}
					return
				}
				if c.Pin() != testPin(t, testKey(tt.won)) {
					t.Errorf("reached another address than %s", tt.won)
				}
				_ = c.Close()
			})
		})
	}
}

func TestDialServersShareTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{t, map[string]host{"192.0.2.1": {delay: time.Hour}, "192.0.2.2": {delay: time.Hour}, "192.0.2.9": {}}}
		d := Dialer{Servers: []string{"192.0.2.1:443", "192.0.2.2:443", "192.0.2.9:443"}, Device: testKey("anna"), Connect: n.connect}
		c, err := d.Dial(t.Context())
		if err != nil {
			t.Fatalf("the last server was not reached: %v", err)
		}
		_ = c.Close()
	})
}

func TestDialNowhere(t *testing.T) {
	if _, err := (&Dialer{Device: testKey("anna")}).Dial(t.Context()); err == nil {
		t.Error("dialled no server")
	}
	if _, err := (&Dialer{Servers: []string{"127.0.0.1:1"}}).Dial(t.Context()); err == nil {
		t.Error("dialled without a device key")
	}
}

func TestHosts(t *testing.T) {
	at := netip.MustParseAddrPort
	four, six := at("192.0.2.1:443"), at("[2001:db8::1]:443")
	for _, x := range []struct {
		used netip.AddrPort
		all  []netip.AddrPort
		want []netip.Addr
	}{
		{four, []netip.AddrPort{four}, []netip.Addr{four.Addr()}},
		{four, []netip.AddrPort{six, four, at("[2001:db8::2]:443")}, []netip.Addr{four.Addr(), six.Addr()}},
		{six, []netip.AddrPort{six, four}, []netip.Addr{six.Addr(), four.Addr()}},
	} {
		if got := hosts(x.used.Addr(), x.all); !slices.Equal(got, x.want) {
			t.Errorf("hosts(%v, %v) = %v, want %v", x.used, x.all, got, x.want)
		}
	}
}

func TestAlternate(t *testing.T) {
	parse := func(s string) (addrs []netip.Addr) {
		for f := range strings.FieldsSeq(s) {
			addrs = append(addrs, netip.MustParseAddr(f))
		}
		return addrs
	}
	for in, want := range map[string]string{
		"":                          "",
		"::1 ::2 ::3 1.1.1.1":       "::1 1.1.1.1 ::2 ::3",
		"1.1.1.1 1.1.1.2 ::1 ::2":   "1.1.1.1 ::1 1.1.1.2 ::2",
		"1.1.1.1 ::ffff:1.1.1.2 ::": "1.1.1.1 :: ::ffff:1.1.1.2",
	} {
		if diff := cmp.Diff(parse(want), append([]netip.Addr(nil), alternate(parse(in))...), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: %s", in, diff)
		}
	}
}
