package coord

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"overlay/coord/trust"
)

// The stages of reaching a server, in order.
const (
	StageDNS   = "dns"
	StageTCP   = "tcp"
	StageTLS   = "tls"
	StageProxy = "proxy" // before TLS, instead of the two others
)

var errNoAddress = errors.New("the name has no address")

// ReachError says that no address of a server could be reached, and how far
// the best attempt came.
type ReachError struct {
	Stage  string           // one of the Stage constants
	Server string           // host:port
	Proxy  string           // host:port of the proxy of that attempt; empty: none
	Status int              // what the proxy answered (RFC 9110 section 15), 407: it wants other credentials; 0: nothing
	Tried  []netip.AddrPort // of the server
	Err    error
}

// Error is one line for the user.
func (e *ReachError) Error() string {
	text := fmt.Sprintf("cannot reach coordinator %s: %s", e.Server, e.reason())
	host, _, _ := net.SplitHostPort(e.Server)
	_, literal := netip.ParseAddr(host)
	switch {
	case e.Stage == StageTLS && e.Proxy != "":
		return fmt.Sprintf("%s (through the proxy %s)", text, e.Proxy)
	case e.Stage == StageDNS || len(e.Tried) == 0:
		return text
	case literal == nil:
		return text
	}
	tried := make([]string, len(e.Tried))
	for i, a := range e.Tried {
		tried[i] = a.Addr().String()
	}
	return fmt.Sprintf("%s (tried %s; DNS ok)", text, strings.Join(tried, ", "))
}

// Unwrap gives the cause.
func (e *ReachError) Unwrap() error { return e.Err }

func (e *ReachError) reason() string {
	switch e.Stage {
	case StageDNS:
		return dnsReason(e.Server, e.Err)
	case StageTLS:
		return tlsReason(e.Err)
	case StageProxy:
		return proxyReason(e)
	}
	return networkReason(e.Err)
}

func networkReason(err error) string {
	if timedOut(err) {
		return "connection timed out"
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	return err.Error()
}

func dnsReason(server string, err error) string {
	host, _, _ := net.SplitHostPort(server)
	failed, ok := errors.AsType[*net.DNSError](err)
	switch {
	case ok && failed.IsNotFound, errors.Is(err, errNoAddress):
		return fmt.Sprintf("the name %q does not exist or has no address; check its spelling", host)
	case timedOut(err):
		return fmt.Sprintf("no name server answered for %q; check this machine's DNS and network", host)
	case ok:
		return fmt.Sprintf("looking up %q failed: %s", host, failed.Err)
	}
	return err.Error()
}

func tlsReason(err error) string {
	stranger, notTLS := errors.AsType[tls.RecordHeaderError](err)
	failed, isNet := errors.AsType[*net.OpError](err)
	switch {
	case notTLS && bytes.HasPrefix(stranger.RecordHeader[:], []byte("HTTP/")):
		return "plain HTTP answers there instead of TLS; is this network waiting for a login page (captive portal), or is the port wrong?"
	case notTLS:
		return "what answers there does not speak TLS; is a captive portal in the way, or is the port wrong?"
	case timedOut(err):
		return "it accepts connections but does not answer TLS; is a firewall or captive portal in the way?"
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return "it closed the connection during TLS; is a firewall or captive portal in the way?"
	case isNet && failed.Op == "remote error": // an alert, RFC 8446 section 6
		return fmt.Sprintf("it refused TLS 1.3 (%s); this is no coordinator, or something intercepts the connection", failed.Err)
	}
	return fmt.Sprintf("TLS failed: %s", err)
}

func timedOut(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, &timeout) && timeout.Timeout()
}

// PinError says that a server answered whose key is not an accepted one. There
// is no way around it.
type PinError struct {
	Server string     // host:port; a Verify function may leave it empty
	Want   trust.Hash // zero when several would do
	Got    trust.Hash
	Err    error // what Verify said, or nil
}

// Error is one line for the user.
func (e *PinError) Error() string {
	what := fmt.Sprintf("the one this invite names (expected key %s, got %s)", shortHash(e.Want), shortHash(e.Got))
	if e.Want == (trust.Hash{}) {
		what = fmt.Sprintf("one of this mesh (got key %s)", shortHash(e.Got))
	}
	return fmt.Sprintf("the server at %s is not %s. Do not continue on this network; it may be intercepted", e.Server, what)
}

// Unwrap gives what Verify said.
func (e *PinError) Unwrap() error { return e.Err }

func shortHash(h trust.Hash) string { return hex.EncodeToString(h[:4]) + ".." }

// rank orders failures by how much they say: the further an attempt came, the
// more; who names a proxy needs it; and a wrong key is an alarm.
func rank(err error) int {
	if _, ok := errors.AsType[*PinError](err); ok {
		return 4
	}
	if failed, ok := errors.AsType[*ReachError](err); ok {
		return map[string]int{StageTCP: 1, StageTLS: 2, StageProxy: 3}[failed.Stage]
	}
	return 0
}
