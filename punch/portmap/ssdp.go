package portmap

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"
)

const (
	ssdpPort   = 1900
	maxSSDP    = 2048
	maxURL     = 1024
	deviceType = "urn:schemas-upnp-org:device:InternetGatewayDevice:"
	// bootHeader changes when a device starts anew (UPnP Device Architecture 1.1
	// section 1.2.2).
	bootHeader = "Bootid.upnp.org"

	// Searches are repeated after 150, 300, 600 ms.
	searchGap = 150 * time.Millisecond
	searches  = 4
)

// ssdpGroup is where routers listen for searches, and announce themselves.
func ssdpGroup() netip.Addr { return netip.AddrFrom4([4]byte{239, 255, 255, 250}) }

var (
	errNoDevice = errors.New("no answer of a UPnP router")
	errLocation = errors.New("not a URL of the router")
)

// beacon is what a device says of itself, asked or unasked.
type beacon struct {
	location *url.URL
	boot     string // empty: it does not say
}

// search looks for the router's device description: by multicast, which some
// need, and at its address, which crosses networks that drop multicast. The
// socket's own address makes the system send multicast over the right link.
func search(ctx context.Context, r Route) (beacon, error) {
	conn, err := net.ListenUDP("udp4", udpAddr(r.Local, 0))
	if err != nil {
		return beacon{}, fmt.Errorf("search: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	b := make([]byte, maxSSDP)
	for i := range searches {
		sendSearches(conn, r.Gateway)
		wait := searchGap << i
		if i == searches-1 {
			wait = answerWait
		}
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return beacon{}, fmt.Errorf("search: %w", err)
		}
		for {
			if ctx.Err() != nil {
				return beacon{}, fmt.Errorf("search: %w", ctx.Err())
			}
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return beacon{}, fmt.Errorf("search: %w", err)
			}
			if from.Addr().Unmap() != r.Gateway {
				continue
			}
			if got, err := parseSearchAnswer(b[:n], r.Gateway); err == nil {
				return got, nil
			}
		}
	}
	return beacon{}, errNoDevice
}

// sendSearches does not mind errors: networks without multicast refuse one of
// them.
func sendSearches(conn *net.UDPConn, gateway netip.Addr) {
	for _, to := range []netip.Addr{gateway, ssdpGroup()} {
		for version := 1; version <= 2; version++ {
			text := fmt.Sprintf("M-SEARCH * HTTP/1.1\r\nHOST: %v:%d\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: %s%d\r\n\r\n",
				ssdpGroup(), ssdpPort, deviceType, version)
			_, _ = conn.WriteToUDPAddrPort([]byte(text), netip.AddrPortFrom(to, ssdpPort))
		}
	}
}

// parseSearchAnswer reads the answer to a search (UPnP Device Architecture 1.1
// section 1.3.3).
func parseSearchAnswer(b []byte, gateway netip.Addr) (beacon, error) {
	if len(b) > maxSSDP {
		return beacon{}, errFormat
	}
	answer, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
	if err != nil {
		return beacon{}, fmt.Errorf("read answer: %w", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK || !strings.HasPrefix(answer.Header.Get("St"), deviceType) {
		return beacon{}, errNoDevice
	}
	return readBeacon(answer.Header, gateway)
}

// parseNotify reads an announcement that a router is there (section 1.2.2).
func parseNotify(b []byte, gateway netip.Addr) (beacon, error) {
	if len(b) > maxSSDP {
		return beacon{}, errFormat
	}
	note, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
	if err != nil {
		return beacon{}, fmt.Errorf("read announcement: %w", err)
	}
	defer note.Body.Close()
	h := note.Header
	if note.Method != "NOTIFY" || h.Get("Nts") != "ssdp:alive" || !strings.HasPrefix(h.Get("Nt"), deviceType) {
		return beacon{}, errNoDevice
	}
	return readBeacon(h, gateway)
}

func readBeacon(h http.Header, gateway netip.Addr) (beacon, error) {
	location, err := routerURL(nil, h.Get("Location"), gateway)
	return beacon{location, h.Get(bootHeader)}, err
}

// routerURL reads a URL, which may be relative to base, and refuses one that
// leads elsewhere than to the router.
func routerURL(base *url.URL, text string, gateway netip.Addr) (*url.URL, error) {
	if len(text) > maxURL {
		return nil, errLocation
	}
	u, err := url.Parse(strings.TrimSpace(text))
	if err != nil {
		return nil, errLocation
	}
	if base != nil {
		u = base.ResolveReference(u)
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if err != nil || ip != gateway || u.Scheme != "http" || u.User != nil {
		return nil, errLocation
	}
	return u, nil
}
