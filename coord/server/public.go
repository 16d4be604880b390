package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"overlay/coord/trust"
	"overlay/punch"
)

// publicAddress is the host:port that goes into invites: what the operator
// says, the address listened on, the machine's only public address, or the one
// its default route leaves from.
func publicAddress(public string, listen net.Addr, log *slog.Logger) (string, error) {
	host, port := splitPublic(public, strconv.Itoa(int(listen.(*net.TCPAddr).AddrPort().Port())))
	if host == "" {
		addr, err := ownAddress(listen)
		if err != nil {
			return "", err
		}
		host = addr.String()
	}
	address := net.JoinHostPort(host, port)
	if a, err := netip.ParseAddr(host); err == nil && !punch.Routed(a) {
		log.Warn(fmt.Sprintf("%v is a private address; invites will only work in this LAN", a), "mend", "--public HOST[:PORT]")
	}
	return address, nil
}

// splitPublic gives the host that the operator names, which may be none, and the port:
// that one, or the other.
func splitPublic(public, other string) (host, port string) {
	host, port = public, other
	if h, p, err := net.SplitHostPort(public); err == nil {
		host, port = h, p
	}
	return strings.Trim(host, "[]"), port
}

// checkPublic refuses what no invite may name.
func checkPublic(public string) error {
	host, port := splitPublic(public, "443")
	if host == "" {
		host = "localhost" // it is found out later
	}
	if err := trust.ValidServer(net.JoinHostPort(host, port)); err != nil {
		return fmt.Errorf("--public %q: %w", public, err)
	}
	return nil
}

func ownAddress(listen net.Addr) (netip.Addr, error) {
	if a := hostOf(listen); a.IsValid() {
		return a, nil
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses: %w", err)
	}
	if only := onlyReachable(addrs); only.IsValid() {
		return only, nil
	}
	// Connecting a UDP socket sends nothing; it asks the routing table.
	for _, far := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		c, err := net.Dial("udp", far)
		if err != nil {
			continue
		}
		a := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
		_ = c.Close()
		return a, nil
	}
	return netip.Addr{}, errors.New("this machine has no address that others reach. Name one with --public HOST[:PORT]")
}

// onlyReachable is the machine's public address if it has exactly one. A
// machine with IPv4 and IPv6 is reached by more networks at its IPv4 address.
func onlyReachable(addrs []net.Addr) netip.Addr {
	var four, six []netip.Addr
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !punch.Routed(p.Addr()) {
			continue
		}
		if p.Addr().Is4() {
			four = append(four, p.Addr())
		} else {
			six = append(six, p.Addr())
		}
	}
	switch {
	case len(four) == 1:
		return four[0]
	case len(four) == 0 && len(six) == 1:
		return six[0]
	}
	return netip.Addr{}
}
