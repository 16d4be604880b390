package overlay

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	privilegedPorts = 1024
	maxProcLine     = 1024 // in /proc/net
	maxComm         = 64   // of a process's name
)

// relaySockets are a relay's ports: TCP, and UDP of the same number.
type relaySockets struct {
	tcp net.Listener
	udp udpSockets
}

// listenRelay opens the ports at [HOST]:PORT.
func listenRelay(address string) (*relaySockets, error) {
	host, port, err := splitListen(address)
	if err != nil {
		return nil, err
	}
	s := &relaySockets{}
	if s.tcp, err = net.Listen("tcp", address); err != nil {
		return nil, listenError(err, address, "tcp", int(port))
	}
	if s.udp, err = listenUDP(host, s.port()); err != nil {
		s.close()
		return nil, listenError(err, address, "udp", int(s.port()))
	}
	return s, nil
}

func splitListen(address string) (host string, port uint16, err error) {
	host, service, err := net.SplitHostPort(address)
	n, portErr := strconv.ParseUint(service, 10, 16)
	if err != nil || portErr != nil {
		return "", 0, fail(Usage, "for example: --listen :8443", "--listen %q is not [HOST]:PORT", address)
	}
	return host, uint16(n), nil
}

func (s *relaySockets) port() uint16 { return s.tcp.Addr().(*net.TCPAddr).AddrPort().Port() }

func (s *relaySockets) close() {
	_ = s.tcp.Close()
	s.udp.close()
}

// udpSockets are one UDP port: a socket for each family, because one for both tells
// the local address of IPv4 packets in the wrong form.
type udpSockets []*net.UDPConn

// listenUDP opens a port at a host, or at all addresses.
func listenUDP(host string, port uint16) (udpSockets, error) {
	networks := []string{"udp4", "udp6"}
	if host != "" {
		networks = []string{"udp"}
	}
	var s udpSockets
	for _, network := range networks {
		c, err := listenFamily(network, host, port)
		if err != nil && network == "udp6" && !errors.Is(err, syscall.EADDRINUSE) {
			continue // the machine has no IPv6
		}
		if err != nil {
			s.close()
			return nil, err
		}
		s = append(s, c)
	}
	return s, nil
}

func listenFamily(network, host string, port uint16) (*net.UDPConn, error) {
	addr, err := net.ResolveUDPAddr(network, net.JoinHostPort(host, strconv.Itoa(int(port))))
	if err != nil {
		return nil, err
	}
	return net.ListenUDP(network, addr)
}

// send sends a datagram from the port; ok is false when the machine does not
// speak the family of to.
func (s udpSockets) send(b []byte, to *net.UDPAddr) (ok bool, err error) {
	for _, c := range s {
		if (c.LocalAddr().(*net.UDPAddr).IP.To4() != nil) == (to.IP.To4() != nil) {
			_, err := c.WriteToUDP(b, to)
			return true, err
		}
	}
	return false, nil
}

func (s udpSockets) close() {
	for _, c := range s {
		_ = c.Close()
	}
}

// listenError says why a port cannot be had and which one to use instead.
func listenError(err error, address, network string, port int) error {
	other := port + 1
	if port < privilegedPorts {
		other = port + 8000
	}
	shown, hint := address, fmt.Sprintf("use another port: --listen :%d", other)
	if other > 65535 {
		hint = "use another port: --listen :8443"
	}
	if network == "udp" {
		shown += "/udp"
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fail(Failure, hint, "cannot listen on %s: used by %s", shown, portOwner(network, port))
	case errors.Is(err, fs.ErrPermission):
		return fail(Permission, "run it with sudo, or "+hint, "cannot listen on %s: ports below %d need root or CAP_NET_BIND_SERVICE", shown, privilegedPorts)
	}
	return fail(Failure, hint, "cannot listen on %s: %v", shown, err)
}

// portOwner names the process that has a port, as far as /proc tells.
func portOwner(network string, port int) string {
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
			return fmt.Sprintf("pid %s (%s)", pid, strings.TrimSpace(string(name[:min(len(name), maxComm)])))
		}
	}
	return unknown
}

// socketInode finds a bound socket in /proc/net: see proc_pid_net(5).
func socketInode(network string, port int) string {
	for _, suffix := range []string{"", "6"} {
		f, err := os.Open("/proc/net/" + network + suffix)
		if err != nil {
			continue
		}
		inode := scanSockets(f, fmt.Sprintf(":%04X", port), network == "tcp")
		_ = f.Close()
		if inode != "" {
			return inode
		}
	}
	return ""
}

func scanSockets(f *os.File, port string, listening bool) string {
	const tcpListen = "0A"
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxProcLine)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 9 && strings.HasSuffix(fields[1], port) && (!listening || fields[3] == tcpListen) {
			return fields[9]
		}
	}
	return ""
}
