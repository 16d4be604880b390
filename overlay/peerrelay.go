package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/portmap"
	"overlay/punch/relay"
)

// The most that a node relays for others: the line is its owner's.
const (
	peerRelayNodes = 64
	peerRelayFlows = 32
	// DefaultPeerRelayRate is in Mbit/s, of all pairs together.
	DefaultPeerRelayRate = 50
)

const (
	// peerRelayOthers is how many other nodes there have to be: fewer are no pair.
	peerRelayOthers = 2
	// peerRelayGrace is how long the relay goes on when it seems that nobody
	// reaches it any more.
	peerRelayGrace = 30 * time.Second
	// peerRelayAgain is how long after a failure it is started again.
	peerRelayAgain = time.Minute
	// peerRelayPorts is how many ports are tried at a start.
	peerRelayPorts = 8
)

// The values of the setting that says whether this node relays for others, besides
// a rate in Mbit/s.
const (
	peerRelayOn  = "on"
	peerRelayOff = "off"
)

// peerRelayRate gives the rate that a setting means, in bytes a second; 0: none.
func peerRelayRate(setting string) (uint64, error) {
	const perMegabit = 1_000_000 / 8
	switch setting {
	case "", peerRelayOn:
		return DefaultPeerRelayRate * perMegabit, nil
	case peerRelayOff:
		return 0, nil
	}
	n, err := strconv.ParseUint(setting, 10, 32)
	if err != nil || n < 1 || n > MaxRelayRate {
		return 0, fail(Usage, "on relays for other members, off does not, a number is the most Mbit/s", "--peer-relay %q is neither on, off, nor a number from 1 to %d", setting, MaxRelayRate)
	}
	return n * perMegabit, nil
}

// peerRelay is the relay inside a node, for pairs of other nodes. It runs while
// others reach this node without being asked: at a public address, or at a port that
// a router maps. It has a port of its own, so that what it forwards does not pass
// through the node's.
type peerRelay struct {
	doorkeeper
	config relay.ServerConfig
	// useful says whether there may be a pair to relay for; place at which port of
	// the published addresses others reach the relay, 0: nowhere; mapPorts has
	// routers map what toMap says.
	useful   func() bool
	place    func([]portmap.Mapping) uint16
	mapPorts func()
	publish  func()
	log      *slog.Logger
	wake     chan struct{}

	mu     sync.Mutex
	port   uint16 // that of the settings, or, where somebody else has it, another one
	maps   bool   // a router maps the port of WireGuard; others are not asked
	wanted bool   // and is to map that of the relay
	mapped []portmap.Mapping
	server *relay.Server // nil: it does not run
	open   uint16        // as published
}

// newPeerRelay makes the relay inside this node; nil: its owner wants none.
func (s *session) newPeerRelay() error {
	rate, err := peerRelayRate(s.settings.PeerRelay)
	if err != nil || rate == 0 {
		return err
	}
	r := &peerRelay{
		doorkeeper: doorkeeper{&s.mu, s.roster.mesh}, port: uint16(s.settings.RelayPort),
		useful: s.hasPairs, mapPorts: s.mapPorts, publish: s.control.publish, log: s.log, wake: make(chan struct{}, 1),
	}
	r.place = func(mapped []portmap.Mapping) uint16 {
		s.mu.Lock()
		local := s.local
		s.mu.Unlock()
		return relayPlace(s.control.candidates(), local, r.own(), mapped)
	}
	r.config = relay.ServerConfig{
		PrivateKey: s.keys.WireGuard, Verify: r.verify, Log: s.log,
		FlowRate: rate, NodeRate: rate, TotalRate: rate, MaxNodes: peerRelayNodes, MaxFlows: peerRelayFlows,
		// From within, two relays could be made to send to each other through each other.
		Refuse: s.inMesh,
	}
	s.peerRelay = r
	return nil
}

// hasPairs says whether the mesh has two nodes besides this one.
func (s *session) hasPairs() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	others := 0
	for _, m := range s.roster.members {
		if m.peer() {
			others++
		}
	}
	return others >= peerRelayOthers
}

// relayPlace tells at which port others reach a relay on ours, at the addresses
// that this node publishes: our own where one of them is ours, or else one that a
// router maps; 0: nowhere. That an address of IPv6 is ours says nothing of the
// firewall before it, unless that was asked.
func relayPlace(published []punch.Candidate, local []netip.Prefix, port uint16, mapped []portmap.Mapping) uint16 {
	for _, c := range published {
		own := func(p netip.Prefix) bool { return p.Addr() == c.Addr.Addr() }
		if c.Type == punch.ServerReflexive && c.Addr.Addr().Is4() && punch.Routed(c.Addr.Addr()) && slices.ContainsFunc(local, own) {
			return port
		}
	}
	for _, m := range mapped {
		named := func(c punch.Candidate) bool { return c.Addr.Addr() == m.External.Addr() }
		if m.Port == port && !m.DoubleNAT && punch.Routed(m.External.Addr()) && slices.ContainsFunc(published, named) {
			return m.External.Port()
		}
	}
	return 0
}

// look has the relay see whether it is reached and of use.
func (r *peerRelay) look() {
	if r == nil {
		return
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// setMapped tells where routers let others in to the port of the relay, and whether
// one of them does to that of WireGuard.
func (r *peerRelay) setMapped(list []portmap.Mapping, maps bool) {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.mapped, r.maps = list, maps
	r.mu.Unlock()
	r.look()
}

// own is the port that the relay listens at.
func (r *peerRelay) own() uint16 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.port
}

// toMap is the port that routers are to map; 0: none.
func (r *peerRelay) toMap() uint16 {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.wanted {
		return 0
	}
	return r.port
}

// run relays, whenever it can, until ctx ends.
func (r *peerRelay) run(ctx context.Context) error {
	again := time.NewTimer(peerRelayAgain)
	defer again.Stop()
	for ctx.Err() == nil {
		wake := r.wake
		if r.reached() != 0 {
			if err := r.serve(ctx); err != nil {
				r.log.Warn("relaying for others failed", "err", err)
				wake = nil // it would fail again
			}
			again.Reset(peerRelayAgain)
		}
		select {
		case <-ctx.Done():
		case <-again.C:
		case <-wake:
		}
	}
	return nil
}

// listen opens the port of the relay, or another one where somebody else has it.
func (r *peerRelay) listen() (udpSockets, error) {
	for try := 1; ; try++ {
		sockets, err := listenUDP("", r.own())
		if !errors.Is(err, syscall.EADDRINUSE) || try == peerRelayPorts {
			return sockets, err
		}
		port, drawn := drawPort()
		if drawn != nil {
			return nil, drawn
		}
		r.log.Info("the port of the relay for others is taken", "port", r.own(), "now", port)
		r.mu.Lock()
		r.port = port
		r.mu.Unlock()
	}
}

// reached tells at which port others reach the relay, and has routers asked for
// one if that may help.
func (r *peerRelay) reached() uint16 {
	useful := r.useful()
	r.mu.Lock()
	r.wanted = useful && r.maps
	mapped := r.mapped
	r.mu.Unlock()
	r.mapPorts() // also when it seems to be known: somebody may just have said otherwise
	if !useful {
		return 0
	}
	return r.place(mapped)
}

// serve relays as long as others reach it.
func (r *peerRelay) serve(ctx context.Context) error {
	sockets, err := r.listen()
	if err != nil {
		return fmt.Errorf("open the port of the relay: %w", err)
	}
	defer sockets.close()
	port := r.reached()
	if port == 0 { // it is another one, which routers have yet to map
		return nil
	}
	server, err := relay.NewServer(r.config)
	if err != nil {
		return fmt.Errorf("make the relay: %w", err)
	}
	r.mu.Lock()
	r.server = server // before it admits: nobody is to miss a withdrawal
	r.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Run(ctx) })
	for _, c := range sockets {
		g.Go(func() error { return server.ServeUDP(ctx, c) })
	}
	r.offer(server, port)
	r.log.Info("relaying for others", "port", port, "flows", peerRelayFlows, "mbit/s", r.config.TotalRate*8/1_000_000)
	g.Go(func() error {
		defer cancel()
		r.watch(ctx, server)
		return nil
	})
	err = g.Wait()
	r.offer(nil, 0)
	r.log.Info("no longer relaying for others", "bytes", server.Stats().Bytes)
	return err
}

// watch returns when nobody reaches the relay any more.
func (r *peerRelay) watch(ctx context.Context, server *relay.Server) {
	grace := time.NewTimer(peerRelayGrace)
	defer grace.Stop()
	for lost := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-grace.C:
			if lost {
				return
			}
		case <-r.wake:
		}
		switch port := r.reached(); {
		case port != 0:
			lost = false
			r.offer(server, port)
		case !lost:
			lost = true
			grace.Reset(peerRelayGrace)
		}
	}
}

// offer notes where the relay is, and has it published when that is new.
func (r *peerRelay) offer(server *relay.Server, port uint16) {
	r.mu.Lock()
	changed := port != r.open
	r.server, r.open = server, port
	r.mu.Unlock()
	if changed {
		r.publish()
	}
}

// published is the port for the record.
func (r *peerRelay) published() uint16 {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.open
}

// running is the relay while it runs.
func (r *peerRelay) running() *relay.Server {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.server
}

// retain drops whom the mesh no longer holds.
func (r *peerRelay) retain() {
	if server := r.running(); server != nil {
		server.Retain(func(device [32]byte) bool { return r.known(trust.Key(device)) })
	}
}

// status is what the relay does for others; nil: nothing.
func (r *peerRelay) status() *PeerRelayStatus {
	server := r.running()
	if server == nil {
		return nil
	}
	st := server.Stats()
	return &PeerRelayStatus{
		Port: r.published(), Nodes: st.Nodes, Flows: st.Flows, Bytes: st.Bytes,
		MaxFlows: peerRelayFlows, MaxMbits: r.config.TotalRate * 8 / 1_000_000,
	}
}
