package overlay

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
)

// Bounds of a request to a relay over TLS, and its words.
const (
	relayHeaderTimeout = 5 * time.Second
	relayIdleTimeout   = 10 * time.Second
	maxRelayHeader     = 8 << 10
	relaySwitch        = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + coord.RelayProtocol + "\r\n\r\n"
)

// relayWeb is the TLS side of a relay: HTTP/1.1 with one path, whose
// connections become the relay's.
type relayWeb struct {
	// known says whether a device is a node of the mesh.
	known func(trust.Key) bool
	// serve takes a connection over and returns when it has ended. binding is
	// of the TLS connection.
	serve func(ctx context.Context, c net.Conn, binding [16]byte) error
	log   *slog.Logger

	mu    sync.Mutex
	group *errgroup.Group // of the relay's connections; nil: no more are taken
}

// relayConnKey finds a connection in the context of its requests.
type relayConnKey struct{}

// run serves until ctx ends.
func (w *relayWeb) run(ctx context.Context, l net.Listener, cert tls.Certificate) error {
	only1 := new(http.Protocols)
	only1.SetHTTP1(true)
	g, ctx := errgroup.WithContext(ctx)
	w.group = g
	srv := &http.Server{
		Handler:           w.handler(ctx),
		ReadHeaderTimeout: relayHeaderTimeout,
		ReadTimeout:       relayHeaderTimeout,
		WriteTimeout:      relayHeaderTimeout,
		IdleTimeout:       relayIdleTimeout,
		MaxHeaderBytes:    maxRelayHeader,
		Protocols:         only1,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, relayConnKey{}, c.(*tls.Conn).NetConn())
		},
		ErrorLog: slog.NewLogLogger(w.log.Handler(), slog.LevelDebug),
	}
	g.Go(func() error {
		if err := srv.Serve(tls.NewListener(newRelayGate(l), relayTLS(cert))); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve relay clients: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		w.mu.Lock()
		w.group = nil
		w.mu.Unlock()
		return srv.Close() // those that are the relay's it ends itself
	})
	return g.Wait()
}

// handler answers requests.
func (w *relayWeb) handler(ctx context.Context) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set(coord.HeaderVersion, strconv.Itoa(coord.Version))
		refused := w.check(r)
		if refused != nil {
			w.log.Debug("relay request refused", "from", r.RemoteAddr, "reason", refused)
			refuseRelay(rw, refused)
			return
		}
		c, binding, err := hijackRelay(rw, r)
		if err != nil {
			w.log.Debug("relay connection not taken over", "from", r.RemoteAddr, "err", err)
			return
		}
		w.take(ctx, c, binding)
	})
}

// take gives a connection to the relay, in a goroutine of its own, so that an
// idle one does not hold what HTTP needed.
func (w *relayWeb) take(ctx context.Context, c net.Conn, binding [16]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.group == nil {
		_ = c.Close()
		return
	}
	w.group.Go(func() error {
		if err := w.serve(ctx, c, binding); err != nil && ctx.Err() == nil {
			w.log.Debug("relay connection ended", "from", c.RemoteAddr(), "err", err)
		}
		_ = c.Close() // done already, unless serve refused it
		return nil
	})
}

// check refuses what is no request for the relay.
func (w *relayWeb) check(r *http.Request) *coord.Error {
	version, err := strconv.Atoi(r.Header.Get(coord.HeaderVersion))
	switch {
	case r.URL.Path != coord.RelayPath || r.Method != http.MethodGet:
		return &coord.Error{Code: coord.CodeBadRequest, Message: fmt.Sprintf("the relay has no %s %.100q", r.Method, r.URL.Path)}
	case err != nil || version < coord.Version-1 || version > coord.Version+1:
		return &coord.Error{
			Code:    coord.CodeVersion,
			Message: fmt.Sprintf("the relay speaks protocol %d, this request protocol %.20q", coord.Version, r.Header.Get(coord.HeaderVersion)),
			Hint:    "update overlay on the older of the two",
		}
	case !strings.EqualFold(r.Header.Get("Upgrade"), coord.RelayProtocol):
		return &coord.Error{Code: coord.CodeBadRequest, Message: "the request is not for " + coord.RelayProtocol}
	}
	if d, ok := clientDevice(r); ok && w.known(d) {
		if c, ok := r.Context().Value(relayConnKey{}).(*relayConn); ok && !c.admit(d) {
			return &coord.Error{Code: coord.CodeRateLimited, Message: fmt.Sprintf("this device has %d connections to the relay, the most there may be", maxRelayMember)}
		}
	}
	return nil
}

// clientDevice is the key that the client proved in TLS, if any: it need not,
// because it proves itself to the relay again.
func clientDevice(r *http.Request) (trust.Key, bool) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return trust.Key{}, false
	}
	k, ok := r.TLS.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !ok {
		return trust.Key{}, false
	}
	return trust.Key(k), true
}

func refuseRelay(rw http.ResponseWriter, e *coord.Error) {
	code := map[coord.Code]int{
		coord.CodeVersion:     http.StatusUpgradeRequired,
		coord.CodeRateLimited: http.StatusTooManyRequests,
	}[e.Code]
	if code == 0 {
		code = http.StatusBadRequest
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set("Connection", "close")
	rw.WriteHeader(code)
	_ = json.NewEncoder(rw).Encode(e) // who hung up does not want the answer
}

// hijackRelay takes the connection out of HTTP's hands.
func hijackRelay(rw http.ResponseWriter, r *http.Request) (net.Conn, [16]byte, error) {
	exported, err := r.TLS.ExportKeyingMaterial(coord.ExporterRelay, nil, 32)
	if err != nil {
		return nil, [16]byte{}, fmt.Errorf("export key of the connection: %w", err)
	}
	c, buffered, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		return nil, [16]byte{}, err
	}
	if buffered.Reader.Buffered() > 0 {
		return nil, [16]byte{}, errors.Join(errors.New("the client did not wait for the answer"), c.Close())
	}
	err = c.SetDeadline(time.Now().Add(relayHeaderTimeout))
	if err == nil {
		_, err = c.Write([]byte(relaySwitch))
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, c.Close())
	}
	return c, [16]byte(exported), nil
}

// relayTLS is TLS 1.3. A client certificate is asked for but not needed: it only
// tells members from strangers while connections are counted.
func relayTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{cert},
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"http/1.1"},
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
	}
}

// relayCertificate wraps the device key as TLS wants it. Nodes look at nothing
// in it but the key, so its dates are wide.
func relayCertificate(device ed25519.PrivateKey) (tls.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "overlay relay"},
		NotBefore:    time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 section 4.1.2.5: no end
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, device.Public(), device)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make the relay's certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: device}, nil
}
