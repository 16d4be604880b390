package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/portmap"
	"overlay/tun"
)

// membership is what joining gave: the signed documents of the mesh and of
// this device.
type membership struct {
	TrustHash trust.Hash     `json:"trustHash"`
	Genesis   trust.Document `json:"genesis"`
	State     trust.Document `json:"state"`
	Cap       trust.Document `json:"cap"`
	Cert      trust.Document `json:"cert"`
	Servers   []string       `json:"servers"`
}

// session is a joined node from up to down: the interface, the agent, the
// connection to the server, and the roster between them.
type session struct {
	store    store
	keys     *keys
	settings *settings
	self     trust.NodeCert
	own      punch.Key
	hash     trust.Hash // of the mesh
	log      *slog.Logger

	agent   *punch.Agent
	control *control
	links   *links
	lan     *lan
	mapper  *portmap.Mapper // nil: switched off
	tcp     *tcpLinks
	// peerRelay is for pairs of other nodes; nil: switched off.
	peerRelay *peerRelay
	// credentials admit this device to relays.
	credentials []byte
	dev         atomic.Pointer[tun.Device]
	// servers are never probed as peers. Not under mu: the agent asks while it
	// holds its own lock, and is itself asked with mu held.
	servers   atomic.Pointer[map[netip.AddrPort]bool]
	mesh      []netip.Prefix // neither are its own prefixes
	endpoints *endpoints
	checking  atomic.Bool // a netcheck runs
	moves     movement

	mu     sync.Mutex
	roster *roster
	// serverSTUN and relaySTUN are the STUN servers of the coordination server
	// and among the relays.
	serverSTUN, relaySTUN []punch.Server

	over4   bool           // the server is reached over IPv4
	outside netip.AddrPort // own address of that family as the server last saw it
	local   []netip.Prefix // own addresses
	dirty   bool           // the cache on disk is behind
	relay   *cachedRelay   // in the own server; nil: not known
	saved   uint64         // serial of the record in the cache on disk
	online  bool
	synced  bool          // a whole netmap came since the start
	trouble error         // why not online; nil before the first attempt
	change  chan struct{} // closed and replaced at every change
}

// newSession verifies what is on disk and opens the interface.
func newSession(st store, k *keys, c *settings, m *membership, cfg Config) (*session, error) {
	r, err := newRoster(m, cfg.Log)
	if err != nil {
		return nil, fail(Failure, "restore it from a backup, or give this identity up and join again: "+st.leaveCommand(),
			"the saved membership in %s does not verify: %v", st.dir, err)
	}
	cert, _ := r.mesh.Device(r.self)
	s := &session{
		store: st, keys: k, settings: c, self: cert, own: punch.Key(k.WireGuard.PublicKey()), hash: m.TrustHash,
		log: cfg.Log, roster: r, change: make(chan struct{}), credentials: trust.Credentials(m.Cap, m.Cert),
	}
	s.mesh = []netip.Prefix{r.mesh.Genesis().ULA, r.mesh.State().Prefix4}
	if err := s.newAgent(m); err != nil {
		return nil, err
	}
	if err := s.newControl(m); err != nil {
		return nil, err
	}
	s.lan = s.newLAN()
	s.links = s.newLinks() // before the device, which may receive at once
	s.tcp = s.newTCPLinks()
	if err := s.openDevice(cfg); err != nil {
		return nil, err
	}
	s.endpoints = newEndpoints(s.dev.Load(), s.links.describe, s.hasPeer, cfg.Log)
	if err := errors.Join(s.newPeerRelay(), s.newMapper(), s.linkChanged(false)); err != nil {
		return nil, errors.Join(err, s.dev.Load().Close())
	}
	return s, nil
}

func (s *session) newAgent(m *membership) error {
	var err error
	s.agent, err = punch.New(punch.Config{
		PrivateKey:   s.keys.WireGuard,
		Mesh:         m.TrustHash,
		Nonces:       s.settings.Nonces,
		Boot:         s.settings.Boot,
		Send:         s.sendUDP,
		OpenSockets:  s.openSockets,
		CloseSockets: func(ports []uint16) { s.dev.Load().CloseSockets(ports) },
		Signal:       s.sendSignal,
		OnPath:       func(p punch.Path) { s.endpoints.set(p); s.ring() },
		OnMTU:        func(p punch.Path) { s.endpoints.set(p); s.ring() },
		Datagram:     s.settings.MTU + tun.MessageOverhead,
		OnCandidates: s.candidates,
		OnDoubt:      func(handle netip.AddrPort) { s.links.doubt(handle) },
		OnRemapped:   s.remapped,
		OnSessionLost: func(k punch.Key) {
			s.log.Info("peer has no session with us", "peer", tun.Key(k))
			s.dev.Load().RestartSession(tun.Key(k))
		},
		OnMessage: func(k punch.Key, b []byte) { s.tcp.receive(k, b) },
		Activity:  s.activity,
		Forbidden: s.forbidden,
		Log:       s.log,
	})
	if err != nil {
		return fmt.Errorf("start the punching agent: %w", err)
	}
	return nil
}

func (s *session) newControl(m *membership) error {
	proxy, err := parseProxy(s.settings.Proxy)
	if err != nil {
		return err
	}
	s.control = &control{
		device: s.keys.Device,
		proxy:  proxy,
		nonce:  s.settings.Nonces[0],
		servers: func() []string {
			s.mu.Lock()
			defer s.mu.Unlock()
			return serverList(s.settings.Server, m.Servers, s.roster.mesh.State().Servers)
		},
		verify: func(pin trust.Hash) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			return pinned(s.roster.mesh)(pin)
		},
		candidates: func() []punch.Candidate { return publishable(s.agent.Candidates()) },
		takes:      func() tun.Capabilities { return s.dev.Load().Capabilities() },
		relays:     func() []trust.RelayTrip { return s.links.record() },
		relayPort:  func() uint16 { return s.peerRelay.published() },
		onWelcome:  s.welcome,
		onEvent:    s.event,
		onState:    s.connection,
		log:        s.log,
		kick:       make(chan struct{}, 1),
		stale:      make(chan struct{}, 1),
		outbox:     make(chan coord.Report, outboxSize),
	}
	return nil
}

// pinned accepts the keys that the mesh's State names.
func pinned(mesh *trust.Mesh) func(trust.Hash) error {
	return func(pin trust.Hash) error {
		if !mesh.PinOK(pin) {
			return errors.New("this key is not one of the mesh's servers")
		}
		return nil
	}
}

// serverList is the servers to try: the one that was asked for first.
func serverList(first string, lists ...[]string) []string {
	var all []string
	seen := map[string]bool{"": true}
	for _, l := range append([][]string{{first}}, lists...) {
		for _, a := range l {
			if !seen[a] {
				seen[a] = true
				all = append(all, a)
			}
		}
	}
	return all
}

// openDevice makes the interface. A mesh prefix that overlaps a local network
// is not routed: the overlay's IPv6 addresses work all the same.
func (s *session) openDevice(cfg Config) error {
	routes := s.mesh
	if len(s.overlaps()) > 0 {
		routes = s.mesh[:1]
	}
	dev, err := tun.Open(tun.Config{
		Name:       s.settings.Interface,
		PrivateKey: s.keys.WireGuard,
		Port:       uint16(s.settings.ListenPort),
		MTU:        s.settings.MTU,
		Addrs:      []netip.Prefix{host(s.self.IP4), host(s.self.IP6)},
		Routes:     routes,
		Mesh:       s.mesh,
		Offloads:   s.settings.Offloads,
		Processors: cfg.Processors,
		Receive:    s.receive,
		Demand: func(k tun.Key) {
			s.links.demand(punch.Key(k), time.Now())
			s.agent.Demand(punch.Key(k))
			s.tcp.demand(punch.Key(k), time.Now())
		},
		SessionUnknown: func(k tun.Key) { s.agent.SessionLost(punch.Key(k)) },
		Log:            cfg.Log,
	})
	if err != nil {
		return err
	}
	s.dev.Store(dev)
	return nil
}

// overlaps names the local networks that the mesh's IPv4 prefix covers.
func (s *session) overlaps() []string {
	list, err := tun.Overlaps(s.roster.mesh.State().Prefix4, s.settings.Interface)
	if err != nil {
		s.log.Warn("local networks not checked", "err", err)
	}
	return list
}

func (s *session) sendUDP(b []byte, to, from netip.AddrPort, ttl int) error {
	dev := s.dev.Load()
	if dev == nil {
		return errNoDevice
	}
	return dev.Send(b, to, from, ttl)
}

func (s *session) openSockets(count int) ([]uint16, error) {
	dev := s.dev.Load()
	if dev == nil {
		return nil, errNoDevice
	}
	return dev.OpenSockets(count)
}

var errNoDevice = errors.New("the interface is not open yet")

func (s *session) activity(k punch.Key) punch.Activity {
	dev := s.dev.Load()
	sent, received := dev.Activity(tun.Key(k))
	return punch.Activity{Sent: sent, Received: received, Lost: dev.Lost(tun.Key(k))}
}

// forbidden keeps checks away from the mesh's own prefixes, the server and the
// relays.
func (s *session) forbidden(a netip.AddrPort) bool {
	if servers := s.servers.Load(); servers != nil && (*servers)[a] {
		return true
	}
	if s.links.isRelay(a) {
		return true
	}
	return s.inMesh(a.Addr())
}

// inMesh reports whether an address is inside the mesh.
func (s *session) inMesh(a netip.Addr) bool {
	return inside(a, s.mesh)
}

// run holds the session together until ctx ends, then takes it down.
func (s *session) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	dev := s.dev.Load()
	g.Go(func() error { return dev.Run(ctx) })
	g.Go(func() error { return s.agent.Run(ctx) })
	g.Go(func() error { return s.links.run(ctx) })
	g.Go(func() error { return s.lan.run(ctx) })
	if s.mapper != nil {
		g.Go(func() error { return s.mapper.Run(ctx) })
	}
	g.Go(func() error { return s.tcp.run(ctx) })
	if s.peerRelay != nil {
		g.Go(func() error { return s.peerRelay.run(ctx) })
	}
	g.Go(func() error {
		s.loadCache() // waits for dev.Run; before the server says anything newer
		return s.control.run(ctx)
	})
	g.Go(func() error { return s.endpoints.run(ctx) })
	g.Go(func() error { return s.tend(ctx) })
	g.Go(func() error { return s.follow(ctx) })
	g.Go(func() error { return sleepWatch{tun.SinceBoot, s.woke, s.reopened}.run(ctx) })
	err := g.Wait()
	s.saveCache()
	return errors.Join(err, dev.Close())
}

// welcome starts gathering on the server that was just reached.
func (s *session) welcome(w *coord.Welcome, conn *coord.Conn, key []byte) {
	var list []punch.Server
	servers := map[netip.AddrPort]bool{conn.RemoteAddr(): true}
	for _, host := range conn.Hosts() {
		for _, port := range w.STUN {
			a := netip.AddrPortFrom(host, port)
			servers[a] = true
			list = append(list, punch.Server{Addr: a, Username: w.Session, Key: key})
		}
	}
	s.servers.Store(&servers)
	s.mu.Lock()
	s.over4 = conn.RemoteAddr().Addr().Is4()
	s.outside = netip.AddrPort{} // the first answer to this session is no reason to leave it
	s.serverSTUN = list
	s.agent.SetServers(stunServers(list, s.relaySTUN))
	s.mu.Unlock()
	s.serverRelay(w, conn)
	s.connection(nil)
	if skew := time.Since(w.Time); skew.Abs() > 5*time.Minute {
		s.log.Warn("this clock and the server's differ", "by", skew.Round(time.Second))
	}
}

// event takes in what the server says.
func (s *session) event(e coord.Event) {
	switch {
	case e.Netmap != nil:
		s.netmap(e.Netmap, true)
	case e.Delta != nil:
		s.netmap(e.Delta, false)
	case e.Signal != nil:
		s.signal(e.Signal)
	case e.Refusal != nil:
		s.log.Warn("the server refused a report", "code", e.Refusal.Code, "err", e.Refusal)
	}
}

// netmap makes what the server says of the members real, as far as it verifies.
func (s *session) netmap(m *coord.Netmap, whole bool) {
	s.mu.Lock()
	gone, changed := s.roster.apply(m, whole)
	s.dirty = true
	s.synced = s.synced || whole
	s.mu.Unlock()
	s.configure(gone, changed)
	if len(m.Revocations) > 0 || len(m.State) > 0 {
		s.peerRelay.retain()
	}
	s.ring()
}

// configure hands the peers to wireguard-go first, so that every path finds
// its peer there.
func (s *session) configure(gone []punch.Key, changed []punch.Peer) {
	s.mu.Lock()
	list, relays, peers := s.roster.peers(s.own), s.roster.relays(), s.roster.linkPeers()
	s.mu.Unlock()
	for _, k := range gone {
		s.agent.RemovePeer(k)
	}
	if err := s.dev.Load().SetPeers(list); err != nil {
		s.log.Warn("peers not configured", "err", err)
	}
	for _, k := range gone {
		s.endpoints.forget(k)
	}
	for _, p := range changed {
		s.agent.SetPeer(p)
	}
	s.links.setMembers(relays, peers)
	s.tcp.keep(s.hasPeer)
	s.peerRelay.look()
}

// hasPeer says whether a peer is a member.
func (s *session) hasPeer(k punch.Key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.roster.device(k)
	return ok
}

func (s *session) signal(g *coord.Signal) {
	s.mu.Lock()
	m := s.roster.members[g.Peer]
	s.mu.Unlock()
	if m == nil {
		return
	}
	if err := s.agent.HandleSignal(punch.Key(m.cert.WireGuard), g.Data); err != nil {
		s.log.Debug("signal dropped", "peer", m.cert.Name, "err", err)
	}
}

// candidates publishes the own candidates. Another outside address means that
// the router is another one or forgot everything: the connection to the server
// went the same way.
func (s *session) candidates(list []punch.Candidate) {
	s.mu.Lock()
	now := reflexive(list, s.over4)
	moved := now.IsValid() && s.outside.IsValid() && now.Addr() != s.outside.Addr()
	if now.IsValid() {
		s.outside = now
	}
	s.mu.Unlock()
	if moved {
		s.checkMapping()
		s.control.reconnect()
	} else {
		s.control.publish()
	}
	s.peerRelay.look()
	s.ring()
}

// connection notes whether the server is reached; nil means that it is.
func (s *session) connection(err error) {
	s.mu.Lock()
	s.online, s.trouble = err == nil, err
	s.mu.Unlock()
	s.ring()
}

// ring wakes whoever waits for the session to change.
func (s *session) ring() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.change)
	s.change = make(chan struct{})
}

// wait returns when done does or ctx ends; done is called with mu held.
func (s *session) wait(ctx context.Context, done func() bool) bool {
	for {
		s.mu.Lock()
		ok, change := done(), s.change
		s.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-change:
		}
	}
}
