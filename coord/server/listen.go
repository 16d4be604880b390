package server

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	portTries     = 32 // for two free ports in a row, when the system chooses
	maxProcLine   = 1024
	unprivileged  = 1024
	listenerState = "0A" // TCP_LISTEN in /proc/net/tcp
)

// listenError is a socket that could not be opened, said for the operator. The
// cause stays inside for who wants to branch on it.
type listenError struct {
	text  string
	cause error
}

func (e *listenError) Error() string { return e.text }
func (e *listenError) Unwrap() error { return e.cause }

// listen opens the TCP port, the UDP port of the same number, and the two STUN
// ports.
func (s *Server) listen(c Config) error {
	var err error
	if s.listener, err = net.Listen("tcp", c.Listen); err != nil {
		return explain(err, "--listen", c.Listen, "tcp")
	}
	host, _, _ := net.SplitHostPort(c.Listen)
	stunHost, stunPort, err := splitPort(c.STUN, true)
	if err != nil {
		return fmt.Errorf("--stun %q: %w", c.STUN, err)
	}
	port := s.Addr().Port()
	if err := s.listenUDP(host, port); err != nil {
		return explain(err, "--listen", c.Listen, "udp")
	}
	if stunPort == 0 {
		return s.listenFreePair(stunHost)
	}
	for _, p := range []uint16{stunPort, stunPort + 1} {
		if slices.Contains(s.stunPorts, p) {
			continue
		}
		if err := s.listenUDP(stunHost, p); err != nil {
			return explain(err, "--stun", net.JoinHostPort(stunHost, strconv.Itoa(int(p))), "udp")
		}
	}
	return nil
}

// splitPort takes an address to listen on apart; pair: also on the port behind it.
func splitPort(address string, pair bool) (string, uint16, error) {
	last, why := uint64(65535), ""
	if pair {
		last, why = 65534, ": the next one is used too"
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, errors.New("use [HOST]:PORT")
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n > last {
		return "", 0, fmt.Errorf("the port is 0 to %d%s", last, why)
	}
	return host, uint16(n), nil
}

// listenFreePair takes two free ports in a row.
func (s *Server) listenFreePair(host string) error {
	for range portTries {
		before := len(s.udp)
		if err := s.listenUDP(host, 0); err != nil {
			return explain(err, "--stun", host+":0", "udp")
		}
		first := s.stunPorts[len(s.stunPorts)-1]
		if first < 65535 && s.listenUDP(host, first+1) == nil {
			return nil
		}
		for _, c := range s.udp[before:] {
			_ = c.Close()
		}
		s.udp, s.stunPorts = s.udp[:before], s.stunPorts[:len(s.stunPorts)-1]
	}
	return fmt.Errorf("no two free UDP ports in a row after %d tries. Choose one with --stun :PORT", portTries)
}

// listenUDP opens a port for each family: a socket for both would tell the
// local address of IPv4 requests in the wrong form.
func (s *Server) listenUDP(host string, port uint16) error {
	networks := []string{"udp4", "udp6"}
	if host != "" {
		networks = []string{"udp"}
	}
	opened := 0
	for _, network := range networks {
		addr, err := net.ResolveUDPAddr(network, net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err != nil {
			return err
		}
		c, err := net.ListenUDP(network, addr)
		if err != nil && network == "udp6" && !errors.Is(err, syscall.EADDRINUSE) {
			continue // the machine has no IPv6
		}
		if err != nil {
			return err
		}
		s.udp = append(s.udp, c)
		opened++
		port = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	}
	if opened > 0 {
		s.stunPorts = append(s.stunPorts, port)
	}
	return nil
}

// explain says why a port cannot be had and what to use instead.
func explain(err error, flag, address, network string) error {
	port := 0
	if _, p, err := net.SplitHostPort(address); err == nil {
		port, _ = strconv.Atoi(p)
	}
	other := port + 1
	if port < unprivileged {
		other = port + 8000
	}
	shown := address
	if network == "udp" {
		shown += "/udp"
	}
	why := err.Error()
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		why = "used by " + portOwner(network, uint16(port))
	case errors.Is(err, fs.ErrPermission):
		why = "ports below 1024 need root or CAP_NET_BIND_SERVICE"
	}
	if port < 1 || other > 65535 {
		return &listenError{fmt.Sprintf("cannot listen on %s: %s. Use %s [HOST]:PORT", shown, why, flag), err}
	}
	return &listenError{fmt.Sprintf("cannot listen on %s: %s. Try %s :%d", shown, why, flag, other), err}
}

// portOwner names the process that has a port, as far as /proc tells.
func portOwner(network string, port uint16) string {
	const unknown = "another program"
	inode := socketInode(network, port)
	if inode == "" {
		return unknown
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && target == "socket:["+inode+"]" {
			pid := strings.Split(link, "/")[2]
			name, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("pid %s (%s)", pid, strings.TrimSpace(string(name)))
		}
	}
	return unknown
}

// socketInode finds a bound socket in /proc/net: see proc_pid_net(5).
func socketInode(network string, port uint16) string {
	want := ":" + strings.ToUpper(hex.EncodeToString([]byte{byte(port >> 8), byte(port)}))
	for _, suffix := range []string{"", "6"} {
		f, err := os.Open("/proc/net/" + network + suffix)
		if err != nil {
			continue
		}
		inode := scanSockets(f, want, network == "tcp")
		_ = f.Close()
		if inode != "" {
			return inode
		}
	}
	return ""
}

func scanSockets(f *os.File, port string, listening bool) string {
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxProcLine)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 9 && strings.HasSuffix(fields[1], port) && (!listening || fields[3] == listenerState) {
			return fields[9]
		}
	}
	return ""
}

// hostOf is the address of a listener, or the zero Addr for all addresses.
func hostOf(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok || tcp.IP.IsUnspecified() {
		return netip.Addr{}
	}
	return tcp.AddrPort().Addr().Unmap()
}
