package coord

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// reply answers a request with a status and a body.
func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func TestRequestsShareOneConnection(t *testing.T) {
	var mu sync.Mutex
	var asked, peers []string
	addr := serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, fmt.Sprintf("%s %s %s %s", r.Method, r.URL.Path, r.Header.Get(HeaderVersion), body))
		peers = append(peers, r.RemoteAddr)
		_, _ = io.WriteString(w, `{"name":"anna","cert":"AQ==","nodes":[{"name":"bob"}],"invites":[{"uses":3}],"challenge":"AQI=","unknown":[1]}`)
	}))
	c, ctx := dial(t, addr), t.Context()
	hello, err1 := c.Hello(ctx)
	own, err2 := c.Own(ctx, OwnRequest{})
	join, err3 := c.Join(ctx, JoinRequest{Name: "anna"})
	cert, err4 := c.Cert(ctx, CertRequest{Cert: []byte{7}})
	nodes, err5 := c.Nodes(ctx)
	invites, err6 := c.Invites(ctx)
	if err := errors.Join(err1, err2, err3, err4, err5, err6, c.Revoke(ctx, RevokeRequest{}), c.Invite(ctx, InviteRequest{})); err != nil {
		t.Fatal(err)
	}
	if string(hello.Challenge) != "\x01\x02" || string(own.Cert) != "\x01" || join.Name != "anna" || string(cert.Cert) != "\x01" ||
		nodes.Nodes[0].Name != "bob" || invites.Invites[0].Uses != 3 {
		t.Error("an answer was decoded wrongly", hello, own, join, cert, nodes, invites)
	}
	for i := range asked {
		asked[i], _, _ = strings.Cut(asked[i], " 1 ")
	}
	want := []string{
		"GET /v1/hello", "POST /v1/own", "POST /v1/join", "POST /v1/cert",
		"GET /v1/nodes", "GET /v1/invites", "POST /v1/revoke", "POST /v1/invites",
	}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Error(diff)
	}
	for _, p := range peers {
		if p != c.LocalAddr().String() {
			t.Errorf("a request came from %s, the connection is %s", p, c.LocalAddr())
		}
	}
}

func TestRefusal(t *testing.T) {
	for _, tt := range []struct {
		name, retryAfter, body string
		status                 int
		want                   *Error
		text                   string
	}{
		{
			name: "code", status: 409, body: `{"code":"name_taken","message":"name \"anna\" is taken","hint":"take another"}`,
			want: &Error{Code: CodeNameTaken, Message: `name "anna" is taken`, Hint: "take another"},
		},
		{
			name: "rate", status: 429, retryAfter: "7", body: `{"code":"rate_limited","message":"too many"}`,
			want: &Error{Code: CodeRateLimited, Message: "too many", RetryAfter: 7 * time.Second},
		},
		{
			name: "rate for ever", status: 429, retryAfter: "9223372036854775807", body: `{"code":"rate_limited"}`,
			want: &Error{Code: CodeRateLimited, RetryAfter: maxRetryAfter},
		},
		{name: "rate by date", status: 429, retryAfter: "Wed, 21 Oct 2026 07:28:00 GMT", body: `{"code":"rate_limited"}`, want: &Error{Code: CodeRateLimited}},
		{
			name: "terminal escapes", status: 403, body: `{"code":"revoked","message":"a\u001b[2Jb\u009bc\nd\u202e","hint":"e\u0007"}`,
			want: &Error{Code: CodeRevoked, Message: "a[2Jbcd", Hint: "e"},
		},
		{
			name: "long text", status: 403, body: `{"code":"revoked","message":"` + strings.Repeat("ä", maxErrorText) + `"}`,
			want: &Error{Code: CodeRevoked, Message: strings.Repeat("ä", maxErrorText/2)},
		},
		{name: "no JSON", status: 502, body: "<html>", text: "answered 502 Bad Gateway"},
		{name: "no code", status: 400, body: `{"message":"x"}`, text: "answered 400 Bad Request"},
		{name: "redirect", status: 302, body: "", text: "answered 302 Found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr := serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if tt.retryAfter != "" {
					w.Header().Set("Retry-After", tt.retryAfter)
				}
				w.WriteHeader(tt.status)
				_, _ = io.WriteString(w, tt.body)
			}))
			c := dial(t, addr)
			for range 2 { // a refusal does not cost the connection
				_, err := c.Hello(t.Context())
				got, _ := errors.AsType[*Error](err)
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Error(diff)
				}
				if err == nil || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("error %v, want %q", err, tt.text)
				}
			}
		})
	}
}

func FuzzRefusal(f *testing.F) {
	f.Add([]byte(`{"code":"revoked","message":"a\u001b[2J","hint":"\ud800"}`), "5")
	f.Add([]byte(`<html>`), "-1")
	f.Fuzz(func(t *testing.T, body []byte, retry string) {
		resp := &http.Response{StatusCode: http.StatusForbidden, Header: http.Header{"Retry-After": {retry}}}
		err := refusal(resp, body)
		if e, ok := errors.AsType[*Error](err); ok && (e.RetryAfter < 0 || e.RetryAfter > maxRetryAfter || len(e.Message) > maxErrorText) {
			t.Fatalf("%#v", e)
		}
		if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r == 0x7f || r == 0x9b }) {
			t.Fatalf("%q", err)
		}
	})
}

func TestBrokenAnswers(t *testing.T) {
	endless := func(w http.ResponseWriter, text string) {
		for range 2 * MaxBody / len(text) {
			if _, err := io.WriteString(w, text); err != nil {
				return
			}
		}
	}
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		text    string
	}{
		"endless body": {func(w http.ResponseWriter, _ *http.Request) { endless(w, strings.Repeat(" ", 4096)) }, "too long"},
		"endless header": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Long", strings.Repeat("x", 4*maxReplyHeader))
		}, "too long"},
		"not HTTP": {func(w http.ResponseWriter, _ *http.Request) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			_, _ = io.WriteString(conn, "ICY 200 OK\r\n\r\n")
			_ = conn.Close()
		}, "malformed HTTP"},
		"closed": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
		"cut short": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "{")
		}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, serve(t, testKey("server"), tt.handler))
			_, err := c.Hello(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want %q", err, tt.text)
			}
			if _, again := c.Nodes(t.Context()); again == nil || !strings.Contains(again.Error(), tt.text) {
				t.Errorf("the next request on the broken connection: error %v", again)
			}
		})
	}
}

func TestAnswerIsNoJSON(t *testing.T) {
	c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "hello")
	})))
	if _, err := c.Hello(t.Context()); err == nil || !strings.Contains(err.Error(), "/v1/hello") {
		t.Errorf("error %v", err)
	}
}

func TestServerCloses(t *testing.T) {
	c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		_, _ = io.WriteString(w, "{}")
	})))
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Nodes(t.Context()); !errors.Is(err, errServerClosed) {
		t.Errorf("error %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("close what the server closed: %v", err)
	}
}

func TestRequestEndsWithContext(t *testing.T) {
	arrived := make(chan struct{})
	c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
	})))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		<-arrived
		cancel()
	}()
	if _, err := c.Hello(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
	if _, err := c.Hello(t.Context()); err == nil {
		t.Error("a late answer could be taken for that of the next request")
	}
}
