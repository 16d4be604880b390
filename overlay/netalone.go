package overlay

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
	"overlay/punch/portmap"
	"overlay/tun"
)

const (
	// aloneDial is how long the server may take to be reached over TCP, and
	// aloneLookup its name to be looked up.
	aloneDial   = 3 * time.Second
	aloneLookup = 5 * time.Second
	// The usual ports of a server for STUN, beside that of TCP.
	usualSTUN, usualSTUN2 = 3478, 3479

	notRunning = "the daemon is not running"
)

// NetcheckAlone is a netcheck where no daemon runs. What is saved in the state
// directory, where it may be read, tells which server to ask; without it, what this
// machine and its router say remains. The router has a port mapped for a moment.
func NetcheckAlone(ctx context.Context, dir string) (Netcheck, error) {
	local, err := tun.HostAddrs()
	if err != nil {
		return Netcheck{}, fmt.Errorf("list local addresses: %w", err)
	}
	n := Netcheck{
		Schema: 1, Trouble: notRunning, alone: true,
		Observed: []Observed{}, PortMapping: []string{}, Routers: []RouterLook{}, Help: []string{}, Relays: []RelayStatus{},
	}
	n.takeLocal(local, true)
	saved := readSaved(store{dir})
	n.Name, n.Server, n.MappingOff = saved.name, saved.server, saved.mappingOff
	var list []portmap.Report
	var asking error
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		n.tcp = answersTCP(gctx, saved.server)
		return n.examine(gctx, local, saved.servers(gctx))
	})
	if saved.unread {
		n.MappingTrouble = "the settings, which may forbid it, cannot be read"
	}
	if !n.MappingOff && !saved.unread {
		g.Go(func() error {
			list, asking = askRouters(gctx)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return n, err
	}
	if asking != nil { // the rest is of use without it
		n.MappingTrouble = asking.Error()
	}
	n.takeRouters(list, true)
	n.judgeNATs(list)
	n.conclude(false)
	return n, nil
}

// askRouters has the routers map a port of a spare socket for a moment.
func askRouters(ctx context.Context) ([]portmap.Report, error) {
	list, err := routes()
	if err != nil {
		return nil, fmt.Errorf("find the router: %w", err)
	}
	s, err := openSpare("udp4")
	if err != nil {
		return nil, fmt.Errorf("open a socket: %w", err)
	}
	defer closeAll([]*spare{s})
	got, err := portmap.Probe(ctx, portmap.Config{Port: s.port, Name: "overlay netcheck"}, list)
	if err != nil {
		return nil, fmt.Errorf("ask the router: %w", err)
	}
	return got, nil
}

// saved is what a netcheck needs of the state directory. All of it may be missing.
type saved struct {
	name, server string           // host:port
	addrs        []netip.AddrPort // of the relay in the server, where STUN is, too
	mappingOff   bool
	unread       bool // the settings cannot be read
}

// readSaved takes what can be read.
func readSaved(st store) saved {
	var c settings
	var m membership
	var k cache
	_, err := st.load(settingsFile, &c)
	for name, v := range map[string]any{meshFile: &m, netmapFile: &k} {
		_, _ = st.load(name, v) // none, not for us, or damaged: all the same here
	}
	s := saved{name: savedName(&m, c.Name), server: c.Server, mappingOff: c.PortMapping == portMappingOff, unread: err != nil}
	if s.server == "" && len(m.Servers) > 0 {
		s.server = m.Servers[0]
	}
	if k.Relay.usable() && (s.server == "" || s.server == k.Relay.Server) {
		s.server, s.addrs = k.Relay.Server, k.Relay.Addrs
	}
	return s
}

// savedName is that of the membership; what was asked for where there is none.
func savedName(m *membership, wish string) string {
	r, err := newRoster(m, slog.New(slog.DiscardHandler))
	if err != nil {
		return wish
	}
	cert, _ := r.mesh.Device(r.self)
	return cmp.Or(cert.Name, wish)
}

// servers are where to ask.
func (s saved) servers(ctx context.Context) []punch.Server {
	addrs := s.addrs
	if len(addrs) == 0 {
		addrs = lookUp(ctx, s.server)
	}
	var list []punch.Server
	for _, a := range addrs[:min(len(addrs), 2*maxAsked)] {
		list = append(list, punch.Server{Addr: a})
	}
	return list
}

// lookUp guesses where a server answers STUN: at the port of its TCP, and at the
// usual ones.
func lookUp(ctx context.Context, server string) []netip.AddrPort {
	host, service, err := net.SplitHostPort(server)
	if err != nil {
		return nil
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, aloneLookup)
	defer cancel()
	found, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", host) // none: nobody to ask
	var list []netip.AddrPort
	for _, ip := range found {
		for _, p := range []uint16{uint16(port), usualSTUN, usualSTUN2} {
			if a := netip.AddrPortFrom(ip.Unmap(), p); !slices.Contains(list, a) {
				list = append(list, a)
			}
		}
	}
	return list
}

// answersTCP reports whether the server is reached at all, which tells blocked UDP
// from no network.
func answersTCP(ctx context.Context, server string) bool {
	d := net.Dialer{Timeout: aloneDial}
	c, err := d.DialContext(ctx, "tcp", server)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}
