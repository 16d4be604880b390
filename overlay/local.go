package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The local API is HTTP over a unix socket that everybody may open: root may do
// everything, others may look and ping. Requests and replies are JSON; up
// answers with lines, each a localLine.
const (
	maxLocalBody  = 64 << 10
	maxLocalConns = 64
)

// localLine is one line of a streamed answer: progress, then a result or an
// error.
type localLine struct {
	Progress *Progress `json:"progress,omitempty"`
	Result   *UpResult `json:"result,omitempty"`
	Error    *Error    `json:"error,omitempty"`
}

type pingRequest struct {
	Peer string `json:"peer"`
}

// rootKey marks a request's context with whether the caller is root.
type rootKey struct{}

func (n *Node) serveLocal(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           localHost(n.mux()),
		ReadHeaderTimeout: 5 * time.Second,
		MaxHeaderBytes:    8 << 10,
		ConnContext:       peerContext,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := srv.Serve(newLimited(l, fromRoot)); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(last) != nil {
			return srv.Close() // who is still asking is cut off
		}
		return nil
	})
	return g.Wait()
}

func (n *Node) mux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", n.handleStatus)
	mux.HandleFunc("POST /v1/ping", n.handlePing)
	mux.HandleFunc("POST /v1/why", n.handleWhy)
	mux.HandleFunc("POST /v1/netcheck", n.handleNetcheck)
	mux.HandleFunc("POST /v1/up", rootOnly(n.handleUp))
	mux.HandleFunc("POST /v1/down", rootOnly(n.handleDown))
	mux.HandleFunc("POST /v1/leave", rootOnly(n.handleLeave))
	mux.HandleFunc("POST /v1/invite", rootOnly(n.handleInvite))
	mux.HandleFunc("GET /v1/invites", rootOnly(n.handleInvites))
	mux.HandleFunc("GET /v1/nodes", rootOnly(n.handleNodes))
	return mux
}

// peerContext notes who is on the other side.
func peerContext(ctx context.Context, c net.Conn) context.Context {
	l, ok := c.(*limitedConn)
	return context.WithValue(ctx, rootKey{}, ok && l.trusted)
}

// fromRoot asks the kernel whether root is on the other side.
func fromRoot(c net.Conn) bool {
	root := false
	if raw, err := c.(*net.UnixConn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			root = err == nil && cred.Uid == 0
		})
	}
	return root
}

func isRoot(r *http.Request) bool { return r.Context().Value(rootKey{}) == true }

// localHost refuses what a browser might have been tricked into sending.
func localHost(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != localName || r.Header.Get("Origin") != "" || r.Header.Get("Referer") != "" {
			http.Error(w, "not for browsers", http.StatusForbidden)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxLocalBody)
		h.ServeHTTP(w, r)
	})
}

func rootOnly(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !isRoot(r) {
			answer(w, nil, fail(Permission, "run it with sudo", "only root may do this"))
			return
		}
		h(w, r)
	}
}

// answer writes a value or an error.
func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusConflict)
		v = asError(err)
	}
	_ = json.NewEncoder(w).Encode(v) // the caller is gone: nobody to tell
}

func asError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: Failure, Message: err.Error()}
}

func read(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fail(Usage, "the command and the daemon may be of different versions: overlay down, then overlay up", "the daemon does not understand the request: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fail(Usage, "", "the request has more than one value")
	}
	return nil
}

// with runs a handler on the session, or says that there is none.
func (n *Node) with(w http.ResponseWriter, do func(*session) (any, error)) {
	s := n.current()
	if s == nil {
		answer(w, nil, errNotJoined())
		return
	}
	v, err := do(s)
	answer(w, v, err)
}

func (n *Node) handleStatus(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) { return s.status(isRoot(r)) })
}

func (n *Node) handlePing(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) {
		var q pingRequest
		if err := read(r, &q); err != nil {
			return nil, err
		}
		return s.ping(r.Context(), q.Peer, isRoot(r))
	})
}

func (n *Node) handleInvite(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) {
		var q InviteRequest
		if err := read(r, &q); err != nil {
			return nil, err
		}
		return s.invite(r.Context(), q)
	})
}

func (n *Node) handleInvites(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) { return s.invites(r.Context()) })
}

func (n *Node) handleNodes(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) { return s.nodes(r.Context()) })
}

func (n *Node) handleUp(w http.ResponseWriter, r *http.Request) {
	var q UpRequest
	if err := read(r, &q); err != nil {
		answer(w, nil, err)
		return
	}
	w.Header().Set("Content-Type", "application/jsonl")
	enc, flush := json.NewEncoder(w), http.NewResponseController(w)
	say := func(l localLine) {
		_ = enc.Encode(l) // the caller is gone: go on without
		_ = flush.Flush()
	}
	res, err := n.Up(r.Context(), q, func(p Progress) { say(localLine{Progress: &p}) })
	if err != nil {
		say(localLine{Error: asError(err)})
		return
	}
	say(localLine{Result: &res})
}

func (n *Node) handleDown(w http.ResponseWriter, _ *http.Request) {
	answer(w, struct{}{}, nil)
	n.Down()
}

func (n *Node) handleLeave(w http.ResponseWriter, r *http.Request) {
	var q LeaveRequest
	err := read(r, &q)
	if err == nil {
		err = n.Leave(r.Context(), q)
	}
	answer(w, struct{}{}, err)
}

// limited is a listener with a bounded number of open connections from whom it
// does not trust; further ones are closed. Whoever holds connections open cannot
// keep root out.
type limited struct {
	net.Listener
	trusts func(net.Conn) bool
	slots  chan struct{}
}

type limitedConn struct {
	net.Conn
	trusted bool
	release func()
}

func newLimited(l net.Listener, trusts func(net.Conn) bool) *limited {
	return &limited{Listener: l, trusts: trusts, slots: make(chan struct{}, maxLocalConns)}
}

// Accept gives the next connection there is room for.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.trusts(c) {
			return &limitedConn{Conn: c, trusted: true, release: func() {}}, nil
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			_ = c.Close()
		}
	}
}

// Close frees the slot.
func (c *limitedConn) Close() error {
	c.release()
	return c.Conn.Close()
}
