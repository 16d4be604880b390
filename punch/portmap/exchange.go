package portmap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

const (
	// routerPort is where routers listen for PCP and NAT-PMP (RFC 6887 section 19).
	routerPort = 5351

	// A request is repeated after 100, 200, 400 and 800 ms. The RFCs begin with
	// 250 ms and 3 s; one lost on the air must not cost the race.
	requestGap = 100 * time.Millisecond
	requests   = 5
	// answerWait is how long the answer to the last of them may take.
	answerWait = 1600 * time.Millisecond
)

var errNoAnswer = errors.New("the router does not answer")

// exchange sends a request to the router until accept takes an answer. The socket
// is connected, so that the kernel drops what comes from elsewhere, and tells of a
// closed port.
func exchange(ctx context.Context, r Route, request []byte, accept func(answer []byte) bool) error {
	conn, err := net.DialUDP("udp", udpAddr(r.Local, 0), udpAddr(r.Gateway, routerPort))
	if err != nil {
		return fmt.Errorf("ask the router: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	answer := make([]byte, maxPCP)
	for i := range requests {
		if _, err := conn.Write(request); err != nil {
			return fmt.Errorf("ask the router: %w", err)
		}
		wait := requestGap << i
		if i == requests-1 {
			wait = answerWait
		}
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return fmt.Errorf("ask the router: %w", err)
		}
		for {
			if ctx.Err() != nil { // whose deadline that of the read may have replaced
				return fmt.Errorf("ask the router: %w", ctx.Err())
			}
			n, err := conn.Read(answer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("ask the router: %w", err)
			}
			if accept(answer[:n]) {
				return nil
			}
		}
	}
	return errNoAnswer
}

func udpAddr(ip netip.Addr, port uint16) *net.UDPAddr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, port))
}

// seconds is a lifetime on the wire.
func seconds(d time.Duration) uint32 { return uint32(d / time.Second) }

// duration is a lifetime from the wire, without more than can be of use.
func duration(seconds uint32) time.Duration {
	return min(time.Duration(seconds)*time.Second, maxLifetime)
}
