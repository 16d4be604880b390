package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

const (
	publicEvery     = 5 * time.Minute // a name's address is looked up
	publicTimeout   = 5 * time.Second
	maxPublic       = 2 // addresses of a name; one of each family
	relayStatsEvery = time.Minute
)

// relayHost is a standalone relay: a member of the mesh that forwards for nodes.
// It knows them by the netmap of its own connection to the server, which it
// keeps on disk, and by the credentials they show.
type relayHost struct {
	cfg     RelayConfig
	name    string
	store   store
	keys    *keys
	sockets *relaySockets
	server  *relay.Server
	agent   *punch.Agent // only asks the server where the UDP port is seen
	control *control
	doorkeeper
	log *slog.Logger

	mu      sync.Mutex
	roster  *roster
	public  []netip.AddrPort // of --public
	dirty   bool             // the cache on disk is behind
	saved   uint64           // serial of the record in the cache on disk
	online  bool
	trouble string // why not; told already
}

func newRelayHost(c RelayConfig, m *membership, s *relaySockets) (*relayHost, error) {
	h := &relayHost{cfg: c, store: store{c.StateDir}, sockets: s, log: c.Log}
	var err error
	if h.roster, err = newRoster(m, c.Log); err != nil {
		return nil, fail(Failure, "restore it, or: overlay leave", "the saved membership in %s does not verify: %v", c.StateDir, err)
	}
	h.doorkeeper = doorkeeper{&h.mu, h.roster.mesh}
	cert, _ := h.roster.mesh.Device(h.roster.self)
	h.name = cert.Name
	if h.keys, err = h.store.loadKeys(); err != nil {
		return nil, err
	}
	if cert.Device != publicOf(h.keys.Device) || cert.WireGuard != trust.Key(h.keys.WireGuard.PublicKey()) {
		return nil, fail(Failure, "restore them, or: overlay leave", "the keys in %s are not those of the saved membership", c.StateDir)
	}
	h.server, err = relay.NewServer(relay.ServerConfig{
		PrivateKey: h.keys.WireGuard,
		Verify:     h.verify,
		Answer:     h.answer,
		FlowRate:   uint64(c.Rate) * 1_000_000 / 8,
		Log:        c.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("make the relay: %w", err)
	}
	h.agent, err = punch.New(punch.Config{
		PrivateKey:   h.keys.WireGuard,
		Mesh:         m.TrustHash,
		Send:         h.send,
		OnCandidates: func([]punch.Candidate) { h.control.publish() },
		Log:          c.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("start looking for the own address: %w", err)
	}
	if err := h.newControl(m); err != nil {
		return nil, err
	}
	h.loadCache() // before anybody is let in or kept out
	return h, nil
}

func (h *relayHost) newControl(m *membership) error {
	proxy, err := parseProxy(h.cfg.Proxy)
	if err != nil {
		return err
	}
	h.control = &control{
		device: h.keys.Device,
		proxy:  proxy,
		servers: func() []string {
			h.mu.Lock()
			defer h.mu.Unlock()
			return serverList(h.cfg.Server, m.Servers, h.roster.mesh.State().Servers)
		},
		verify: func(pin trust.Hash) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			return pinned(h.roster.mesh)(pin)
		},
		candidates: h.candidates,
		takes:      func() tun.Capabilities { return 0 },
		onWelcome:  h.welcome,
		onEvent:    h.event,
		onState:    h.connection,
		log:        h.log,
		kick:       make(chan struct{}, 1),
		stale:      make(chan struct{}, 1),
		outbox:     make(chan coord.Report, outboxSize),
	}
	return nil
}

// run serves until ctx ends.
func (h *relayHost) run(ctx context.Context) error {
	cert, err := relayCertificate(h.keys.Device)
	if err != nil {
		return err
	}
	web := &relayWeb{known: h.known, serve: h.server.ServeConn, log: h.log}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return h.server.Run(ctx) })
	for _, c := range h.sockets.udp {
		g.Go(func() error { return h.server.ServeUDP(ctx, c) })
	}
	g.Go(func() error { return web.run(ctx, h.sockets.tcp, cert) })
	g.Go(func() error { return h.agent.Run(ctx) })
	g.Go(func() error { return h.control.run(ctx) })
	g.Go(func() error { return h.tend(ctx) })
	g.Go(func() error { return h.followPublic(ctx) })
	g.Go(func() error {
		return tun.Watch(ctx, func(bool) {
			h.agent.NetworkChanged()
			h.control.networkChanged()
		})
	})
	h.log.Info("serving", "relay", h.name, "listen", h.sockets.tcp.Addr(), "version", h.cfg.Version)
	err = g.Wait()
	h.saveCache()
	return err
}

// answer takes what is neither flow nor control: the server's answers about our
// own address, and the Binding requests of nodes, which authenticate themselves
// by their session here. Everybody else gets no answer.
func (h *relayHost) answer(b []byte, from, _ netip.AddrPort) []byte {
	const response = 0x01 // first byte of a STUN response, RFC 8489 section 5
	if len(b) > 0 && b[0] == response {
		h.agent.Receive(b, from, netip.AddrPort{})
		return nil
	}
	var name []byte
	out := punch.AnswerBinding(b, from, func(user []byte) (key, token []byte, ok bool) {
		if len(user) == 0 {
			return nil, nil, false
		}
		name = user
		key, _, ok = h.server.Session(user)
		return key, nil, ok
	})
	if out != nil && !h.server.Spend(name) { // after the proof that it is the node
		return nil
	}
	return out
}

var errNoFamily = errors.New("no socket of this address family")

func (h *relayHost) send(b []byte, to, _ netip.AddrPort, _ int) error {
	ok, err := h.sockets.udp.send(b, net.UDPAddrFromAddrPort(to))
	if !ok {
		return errNoFamily
	}
	return err
}

// welcome asks the server that was just reached where it sees the UDP port.
func (h *relayHost) welcome(w *coord.Welcome, conn *coord.Conn, key []byte) {
	var list []punch.Server
	for _, host := range conn.Hosts() {
		for _, port := range w.STUN {
			list = append(list, punch.Server{Addr: netip.AddrPortFrom(host, port), Username: w.Session, Key: key})
		}
	}
	h.agent.SetServers(list)
	h.connection(nil)
}

func (h *relayHost) event(e coord.Event) {
	switch {
	case e.Netmap != nil:
		h.netmap(e.Netmap, true)
	case e.Delta != nil:
		h.netmap(e.Delta, false)
	case e.Refusal != nil:
		h.log.Warn("the server refused a report", "code", e.Refusal.Code, "err", e.Refusal)
	}
}

// netmap takes in what the server says; whom that withdraws is dropped at once.
func (h *relayHost) netmap(m *coord.Netmap, whole bool) {
	h.mu.Lock()
	h.roster.apply(m, whole)
	h.dirty = true
	h.mu.Unlock()
	if len(m.Revocations) > 0 || len(m.State) > 0 {
		h.server.Retain(func(device [32]byte) bool { return h.known(device) })
	}
}

// connection tells at every change whether the server is reached.
func (h *relayHost) connection(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	trouble := ""
	if err != nil {
		trouble = troubleText(err)
	}
	if h.online == (err == nil) && h.trouble == trouble {
		return
	}
	h.online, h.trouble = err == nil, trouble
	if h.online {
		h.log.Info("connected to the server", "server", h.control.connected())
		return
	}
	h.log.Warn("the server is not reached; nodes are served all the same", "err", trouble)
}

// candidates are the addresses to publish: that of --public first, and those
// that the server saw, which prove it.
func (h *relayHost) candidates() []punch.Candidate {
	seen := h.agent.Candidates()
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []punch.Candidate
	for _, a := range h.public {
		if !slices.ContainsFunc(seen, func(c punch.Candidate) bool { return c.Addr == a }) {
			list = append(list, publicCandidate(a))
		}
	}
	return append(list, seen...)
}

func publicCandidate(a netip.AddrPort) punch.Candidate {
	if globalIPv6(a.Addr()) {
		return punch.Candidate{Addr: a, Type: punch.Host}
	}
	return punch.Candidate{Addr: a, Type: punch.PortMapped}
}

// followPublic keeps the addresses of --public, which may be a name.
func (h *relayHost) followPublic(ctx context.Context) error {
	if h.cfg.Public == "" {
		return nil
	}
	t := time.NewTicker(publicEvery)
	defer t.Stop()
	for {
		h.lookupPublic(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (h *relayHost) lookupPublic(ctx context.Context) {
	list, err := publicAddrs(ctx, h.cfg.Public, h.sockets.port())
	if err != nil {
		if ctx.Err() == nil {
			h.log.Warn("the public address is not found", "public", h.cfg.Public, "err", err)
		}
		return
	}
	h.mu.Lock()
	changed := !slices.Equal(list, h.public)
	h.public = list
	h.mu.Unlock()
	if changed {
		h.control.publish()
	}
}

// publicAddrs looks HOST[:PORT] up: one address of each family.
func publicAddrs(ctx context.Context, public string, port uint16) ([]netip.AddrPort, error) {
	address, err := publicOfRelay(public, port)
	if err != nil {
		return nil, err
	}
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%q is not a port", service)
	}
	ctx, cancel := context.WithTimeout(ctx, publicTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host) // an address is its own
	if err != nil {
		return nil, err
	}
	var list []netip.AddrPort
	for _, ip := range ips {
		a := netip.AddrPortFrom(ip.Unmap(), uint16(n))
		family := func(o netip.AddrPort) bool { return o.Addr().Is4() == a.Addr().Is4() }
		if len(list) < maxPublic && !slices.ContainsFunc(list, family) {
			list = append(list, a)
		}
	}
	return list, nil
}
