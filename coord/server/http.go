package server

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"overlay/coord"
	"overlay/coord/trust"
)

const (
	maxDepth     = 16 // of JSON from the network
	exporterSize = 32
)

// peerKey finds a connection's peer in the context of its requests.
type peerKey struct{}

// peer is one TLS connection: who is at the other end, and the challenge that
// only this connection's answers may answer.
type peer struct {
	source    netip.Prefix
	gate      *gatedConn
	challenge *ecdh.PrivateKey
}

func newPeer(ctx context.Context, c net.Conn) context.Context {
	p := &peer{source: networkOf(c.RemoteAddr())}
	if t, ok := c.(*tls.Conn); ok {
		p.gate, _ = t.NetConn().(*gatedConn)
	}
	var err error
	if p.challenge, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
		panic(fmt.Sprintf("make challenge: %v", err)) // only a broken random source fails
	}
	return context.WithValue(ctx, peerKey{}, p)
}

// admit says that the connection is a member's; it says false when that member
// has too many.
func (p *peer) admit(member trust.Key) bool { return p.gate == nil || p.gate.admit(member) }

// release says that the connection is about to be a member's.
func (p *peer) release() {
	if p.gate != nil {
		p.gate.release()
	}
}

// call is one request with what is known of its sender.
type call struct {
	*peer
	r      *http.Request
	device trust.Key
}

func (c call) exporter(label string) ([]byte, error) {
	return c.r.TLS.ExportKeyingMaterial(label, nil, exporterSize)
}

// handler answers a call with something to encode as JSON.
type handler func(call) (any, error)

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	for pattern, h := range map[string]handler{
		"GET /v1/hello":    s.hello,
		"POST /v1/own":     s.limited(s.own),
		"POST /v1/join":    s.limited(s.join),
		"POST /v1/cert":    s.limited(s.cert),
		"POST /v1/revoke":  s.revoke,
		"POST /v1/invites": s.addInvite,
		"GET /v1/invites":  s.listInvites,
		"GET /v1/nodes":    s.listNodes,
		"GET /v1/address":  s.address,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.handle(w, r, h) })
	}
	mux.HandleFunc("GET /v1/stream", func(w http.ResponseWriter, r *http.Request) {
		s.handle(w, r, func(c call) (any, error) { return nil, s.upgrade(w, c) })
	})
	mux.HandleFunc("GET "+coord.RelayPath, func(w http.ResponseWriter, r *http.Request) {
		s.handle(w, r, func(c call) (any, error) { return nil, s.upgradeRelay(w, c) })
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.handle(w, r, func(call) (any, error) {
			return nil, refuse(coord.CodeBadRequest, "the coordinator has no %s %.100q", r.Method, r.URL.Path)
		})
	})
	return mux
}

// handle does what is common to all requests.
func (s *Server) handle(w http.ResponseWriter, r *http.Request, h handler) {
	w.Header().Set(coord.HeaderVersion, strconv.Itoa(coord.Version))
	c, err := s.begin(w, r)
	var out any
	if err == nil {
		out, err = h(c)
	}
	switch {
	case err != nil:
		e := asError(err, s.log)
		s.log.Debug("request refused", "path", r.URL.Path, "from", r.RemoteAddr, "code", e.Code, "reason", e.Message)
		writeError(w, e)
	case out != nil:
		writeJSON(w, http.StatusOK, out)
	}
}

// begin checks what every request must have.
func (s *Server) begin(w http.ResponseWriter, r *http.Request) (call, error) {
	p, ok := r.Context().Value(peerKey{}).(*peer)
	if !ok || r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return call{}, refuse(coord.CodeNoIdentity, "no client certificate")
	}
	key, ok := r.TLS.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !ok {
		return call{}, refuse(coord.CodeNoIdentity, "the client certificate is not of an Ed25519 key")
	}
	version, err := strconv.Atoi(r.Header.Get(coord.HeaderVersion))
	if err != nil || version < coord.Version-1 || version > coord.Version+1 {
		return call{}, hinted(refuse(coord.CodeVersion, "the coordinator speaks protocol %d, this request protocol %.20q",
			coord.Version, r.Header.Get(coord.HeaderVersion)), "update overlay on the older of the two")
	}
	c := call{peer: p, r: r, device: trust.Key(key)}
	limit := int64(coord.MaxAnonymousBody)
	if s.hub.knows(c.device) {
		if !p.admit(c.device) {
			w.Header().Set("Connection", "close")
			e := refuse(coord.CodeRateLimited, "this device has %d connections to the coordinator, the most there may be", maxOfMember)
			e.RetryAfter = time.Minute
			return call{}, e
		}
		limit = coord.MaxBody
	}
	r.Body = http.MaxBytesReader(w, r.Body, limit)
	return c, nil
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode answer: %v", err)) // our own types always encode
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b) // who hung up does not want the answer
}

// decodeBody reads a request's body strictly.
func decodeBody[T any](c call) (T, error) {
	var out T
	b, err := io.ReadAll(c.r.Body)
	var tooLong *http.MaxBytesError
	if errors.As(err, &tooLong) {
		return out, refuse(coord.CodeTooLarge, "the request is longer than %d bytes", tooLong.Limit)
	}
	if err == nil {
		out, err = decodeStrict[T](b)
	}
	if err != nil {
		return out, refuse(coord.CodeBadRequest, "the request is not understood: %v", err)
	}
	return out, nil
}

// decodeStrict takes one JSON value and nothing else: no unknown and no double
// names, no invalid UTF-8, no deep nesting, nothing after it.
func decodeStrict[T any](b []byte) (T, error) {
	var out T
	if !utf8.Valid(b) {
		return out, errors.New("not UTF-8")
	}
	tokens := json.NewDecoder(bytes.NewReader(b))
	if err := checkValue(tokens, 0); err != nil {
		return out, err
	}
	if _, err := tokens.Token(); !errors.Is(err, io.EOF) {
		return out, errors.New("something follows the value")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	return out, d.Decode(&out)
}

func checkValue(d *json.Decoder, depth int) error {
	t, err := d.Token()
	if err != nil {
		return err
	}
	if depth > maxDepth {
		return errors.New("nested too deeply")
	}
	open, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	names := map[string]bool{}
	for d.More() {
		if open == '{' {
			name, err := d.Token()
			if err != nil {
				return err
			}
			// encoding/json takes names in any case.
			folded := strings.ToLower(fmt.Sprint(name))
			if names[folded] {
				return fmt.Errorf("%.40q twice", name)
			}
			names[folded] = true
		}
		if err := checkValue(d, depth+1); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}

// limited slows down who fails again and again. It counts failures only, so a
// room full of new laptops is never held up.
func (s *Server) limited(h handler) handler {
	return func(c call) (any, error) {
		if s.failures.left(c.source) < 1 || s.allFailures.left(netip.Prefix{}) < 1 {
			e := refuse(coord.CodeRateLimited, "too many failed attempts to join")
			e.RetryAfter = time.Minute / failuresPerSource
			return nil, hinted(e, "Wait %v and try again.", e.RetryAfter)
		}
		out, err := h(c)
		var refused *coord.Error
		if errors.As(err, &refused) && refused.Code != coord.CodeNoAddress {
			s.failures.spend(c.source)
			s.allFailures.spend(netip.Prefix{})
		}
		return out, err
	}
}

// prove verifies, for this connection only, that the sender holds the invite
// and the WireGuard key.
func (c call) prove(invite, wireguard trust.Key, p coord.Proofs) error {
	if err := trust.CanonicalKey(wireguard); err != nil {
		return refuse(coord.CodeBadKey, "%v", err)
	}
	x, err := c.exporter(coord.ExporterJoin)
	if err != nil {
		return fmt.Errorf("export key of the connection: %w", err)
	}
	remote, err := ecdh.X25519().NewPublicKey(wireguard[:])
	if err != nil {
		return refuse(coord.CodeBadKey, "%v", err)
	}
	shared, err := c.challenge.ECDH(remote)
	if err != nil {
		return refuse(coord.CodeBadKey, "%v", err)
	}
	challenge := [32]byte(c.challenge.PublicKey().Bytes())
	if !hmac.Equal(p.WireGuard, coord.WireGuardProof(shared, x, challenge, c.device, wireguard)) {
		return refuse(coord.CodeBadProof, "the proof of the WireGuard key is wrong")
	}
	if !ed25519.Verify(invite[:], coord.InviteProofMessage(x, c.device, wireguard), p.Invite) {
		return errInviteProof
	}
	return nil
}

var errInviteProof = errors.New("the proof of the invite is wrong")
