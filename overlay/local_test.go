package overlay

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startNode runs a node without a mesh.
func startNode(t *testing.T) (*Client, Config) {
	t.Helper()
	cfg := Config{StateDir: filepath.Join(t.TempDir(), "state"), Socket: filepath.Join(t.TempDir(), "s")}
	n := New(cfg)
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- n.Run(context.Background(), func() { close(ready) }) }()
	t.Cleanup(func() {
		n.Down()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("run: %v", err)
	}
	return NewClient(cfg.Socket), cfg
}

func wantKind(t *testing.T, err error, kind Kind, text string) {
	t.Helper()
	if KindOf(err) != kind || err == nil || !strings.Contains(err.Error(), text) {
		t.Fatalf("got %v (%s), want %q (%s)", err, KindOf(err), text, kind)
	}
}

func TestNotJoinedIsSaidEverywhere(t *testing.T) {
	c, _ := startNode(t)
	ctx := t.Context()
	_, err := c.Status(ctx)
	wantKind(t, err, Refused, "has not joined a mesh")
	_, err = c.Ping(ctx, "bob")
	wantKind(t, err, Refused, "has not joined a mesh")
	_, err = c.Up(ctx, UpRequest{}, func(Progress) {})
	wantKind(t, err, Refused, "has not joined a mesh")
	wantKind(t, c.Leave(ctx, LeaveRequest{}), Refused, "has not joined a mesh")
}

func TestUpRefusesBadValuesBeforeAnything(t *testing.T) {
	c, cfg := startNode(t)
	for _, x := range []struct {
		r    UpRequest
		text string
	}{
		{UpRequest{Invite: "ovl1_abc"}, "damaged"},
		{UpRequest{MTU: 90000}, "--mtu 90000"},
		{UpRequest{ListenPort: -1}, "--listen-port -1"},
		{UpRequest{Name: "Büro PC"}, `"Büro PC"`},
		{UpRequest{Interface: "a/b"}, `"a/b"`},
	} {
		_, err := c.Up(t.Context(), x.r, func(Progress) {})
		wantKind(t, err, Usage, x.text)
	}
	if files, _ := filepath.Glob(filepath.Join(cfg.StateDir, "*")); len(files) != 0 {
		t.Fatalf("left behind: %v", files)
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	_, cfg := startNode(t)
	err := New(cfg).Run(t.Context(), nil)
	wantKind(t, err, Failure, "already running")
}

// Another socket does not make a second daemon of one identity.
func TestStateOfARunningDaemonIsLocked(t *testing.T) {
	_, cfg := startNode(t)
	other := cfg
	other.Socket = filepath.Join(t.TempDir(), "s")
	wantKind(t, New(other).Run(t.Context(), nil), Failure, "another daemon uses the state directory "+cfg.StateDir)
	wantKind(t, Leave(t.Context(), other, LeaveRequest{}), Failure, "another daemon uses the state directory "+cfg.StateDir)
	if _, err := net.Dial("unix", other.Socket); err == nil {
		t.Error("the refused daemon left a socket")
	}
}

func TestClientWithoutDaemon(t *testing.T) {
	_, err := NewClient(filepath.Join(t.TempDir(), "none")).Status(t.Context())
	wantKind(t, err, NotRunning, "not running")
}

func TestDownEndsTheDaemon(t *testing.T) {
	c, _ := startNode(t)
	if err := c.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	for ctx, end := context.WithTimeout(t.Context(), 5*time.Second); ; {
		if _, err := c.Status(ctx); KindOf(err) == NotRunning {
			end()
			return
		}
		if ctx.Err() != nil {
			t.Fatal("the daemon still answers")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestBrowsersAreRefused(t *testing.T) {
	n := New(Config{})
	for _, set := range []func(r *http.Request){
		func(r *http.Request) { r.Host = "evil.example" },
		func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") },
		func(r *http.Request) { r.Header.Set("Referer", "https://evil.example") },
	} {
		r := httptest.NewRequest("GET", "http://"+localName+"/v1/status", nil)
		set(r)
		w := httptest.NewRecorder()
		localHost(n.mux()).ServeHTTP(w, r)
		if w.Code != 403 {
			t.Errorf("status %d, want 403", w.Code)
		}
	}
}

func TestOthersThanRootMayOnlyLook(t *testing.T) {
	n := New(Config{})
	for _, path := range []string{"POST /v1/up", "POST /v1/down", "POST /v1/leave", "POST /v1/invite", "GET /v1/invites", "GET /v1/nodes"} {
		method, url, _ := strings.Cut(path, " ")
		w := httptest.NewRecorder()
		n.mux().ServeHTTP(w, httptest.NewRequest(method, "http://"+localName+url, nil))
		if !strings.Contains(w.Body.String(), `"permission"`) {
			t.Errorf("%s: %s", path, w.Body)
		}
	}
	select {
	case <-n.stop:
		t.Error("somebody else stopped the daemon")
	default:
	}
}

// Whoever opens all the connections there may be does not keep root out.
func TestOthersCannotKeepRootOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	inner, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	var root atomic.Bool
	l := newLimited(inner, func(net.Conn) bool { return root.Load() })
	dial := func() net.Conn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	accept := func() *limitedConn {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return c.(*limitedConn)
	}
	var held []*limitedConn
	for range maxLocalConns {
		dial()
		held = append(held, accept())
	}
	extra, refused := dial(), make(chan error, 1)
	go func() { // one more is closed; then root comes
		_, err := extra.Read(make([]byte, 1))
		root.Store(true)
		c, dialErr := net.Dial("unix", path)
		if dialErr == nil {
			_ = c.Close()
		}
		refused <- errors.Join(err, dialErr)
	}()
	if c := accept(); !c.trusted {
		t.Error("root's connection is not trusted")
	}
	if err := <-refused; !errors.Is(err, io.EOF) {
		t.Errorf("one connection too many: %v", err)
	}
	root.Store(false)
	_ = held[0].Close()
	dial()
	if c := accept(); c.trusted {
		t.Error("somebody else's connection is trusted")
	}
}

func FuzzLocalRequest(f *testing.F) {
	f.Add(`{"invite":"ovl1_x","mtu":1400}`)
	f.Add(`{"peer":"bob"}{"peer":"eve"}`)
	f.Fuzz(func(t *testing.T, body string) {
		r := httptest.NewRequest("POST", "http://"+localName+"/v1/up", io.LimitReader(strings.NewReader(body), maxLocalBody))
		var q UpRequest
		if read(r, &q) == nil && strings.Count(body, "{") == 0 && strings.TrimSpace(body) != "null" {
			t.Fatalf("%q was taken for a request", body)
		}
	})
}

func TestUnknownPeerSuggests(t *testing.T) {
	names := []string{"alice-laptop", "bob", "carol"}
	for name, want := range map[string]string{
		"bpb": `did you mean "bob"?`, "alice": `did you mean "alice-laptop"?`, "carlo": `did you mean "carol"?`,
		"zzzzzz": `no node "zzzzzz"`,
	} {
		wantKind(t, UnknownPeer(name, names), Usage, want)
	}
	if got := UnknownPeer("zzzzzz", names).Error(); strings.Contains(got, "mean") {
		t.Fatal(got)
	}
}
