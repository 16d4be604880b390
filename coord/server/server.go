// Package server is the coordination server: it admits devices with invites,
// keeps names and addresses unique, tells every node who is in the mesh, carries
// sealed signals between nodes, answers STUN, and is a relay for nodes that reach
// each other in no other way.
//
// It holds none of the keys that make a mesh: it can refuse service, but peers
// believe nothing of it that is not signed by the mesh's owner or the devices
// themselves.
package server

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/store"
	"overlay/coord/trust"
)

const (
	defaultListen = ":443"
	defaultSTUN   = ":3478"
	defaultMesh   = "home"
	defaultState  = "/var/lib/overlay-coord"

	storeFile = "store.db"
	keyFile   = "server.key"

	headerTimeout  = 5 * time.Second
	requestTimeout = 15 * time.Second // to read a request, and to answer it
	idleTimeout    = 120 * time.Second
	maxHeader      = 8 << 10
	drainTime      = 2 * time.Second // for requests under way when the server ends
	sweepEvery     = time.Minute
)

// Config says how to run a server. The zero Config is the default.
type Config struct {
	Listen   string       // TCP, and UDP for STUN and the relay; default ":443"
	STUN     string       // UDP; the next port serves too; default ":3478"
	Public   string       // HOST[:PORT] nodes reach the server at; empty: found out
	Prefix   netip.Prefix // the mesh's IPv4 prefix; invalid: its owner chooses
	Mesh     string       // name of the mesh to be founded; default "home"
	StateDir string       // default "/var/lib/overlay-coord"
	// RelayRate bounds what one node may send to another by the relay, in Mbit/s;
	// 0: as fast as it goes.
	RelayRate int
	Log       *slog.Logger // nil: silent
}

// Server is one running coordination server. It is made by Open.
type Server struct {
	log      *slog.Logger
	mesh     string
	public   string
	key      ed25519.PrivateKey
	store    store.Store
	registry *registry
	hub      *hub
	relay    *relayHost

	failures    *buckets[netip.Prefix]
	allFailures *buckets[netip.Prefix]

	listener  net.Listener
	udp       []*net.UDPConn
	stunPorts []uint16

	invite    coord.Invite
	ownerless bool
}

// Open reads the state and opens the sockets; nothing is served before Run. Its
// errors are for the operator: they say what to do.
func Open(c Config) (*Server, error) {
	c.Listen, c.STUN = cmp.Or(c.Listen, defaultListen), cmp.Or(c.STUN, defaultSTUN)
	c.Mesh, c.StateDir = cmp.Or(c.Mesh, defaultMesh), cmp.Or(c.StateDir, defaultState)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	s := &Server{log: c.Log, mesh: c.Mesh}
	if err := s.open(c); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// check refuses what cannot work before anything is made or opened.
func (c Config) check() error {
	if err := trust.ValidName(c.Mesh); err != nil {
		return fmt.Errorf("--mesh: %w", err)
	}
	if err := checkPrefix(c.Prefix); err != nil {
		return err
	}
	if c.RelayRate < 0 || c.RelayRate > maxRelayRate {
		return fmt.Errorf("--relay-rate %d is not from 0 to %d", c.RelayRate, maxRelayRate)
	}
	if _, _, err := splitPort(c.Listen, false); err != nil {
		return fmt.Errorf("--listen %q: %w", c.Listen, err)
	}
	if _, _, err := splitPort(c.STUN, true); err != nil {
		return fmt.Errorf("--stun %q: %w", c.STUN, err)
	}
	return checkPublic(c.Public)
}

// checkPrefix refuses early what no State could hold.
func checkPrefix(p netip.Prefix) error {
	if p == (netip.Prefix{}) {
		return nil
	}
	if err := trust.ValidPrefix4(p); err != nil {
		return fmt.Errorf("--prefix %v is not usable, take one like 100.80.0.0/16: %w", p, err)
	}
	return nil
}

func (s *Server) open(c Config) error {
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	var err error
	// The store first: its lock keeps a second server off the key.
	s.store, err = store.OpenBolt(filepath.Join(c.StateDir, storeFile))
	if errors.Is(err, store.ErrLocked) {
		return fmt.Errorf("another overlay coord runs on %s. Stop it, or use --state DIR: %w", c.StateDir, err)
	}
	if err != nil {
		return err
	}
	if err := s.loadKey(filepath.Join(c.StateDir, keyFile)); err != nil {
		return err
	}
	if err := s.listen(c); err != nil {
		return err
	}
	if s.public, err = publicAddress(c.Public, s.listener.Addr(), s.log); err != nil {
		return err
	}
	return s.assemble(c)
}

// loadKey makes the key only where no node knows one yet.
func (s *Server) loadKey(path string) error {
	t := &txn{ctx: context.Background(), store: s.store}
	if _, founded := get[meshRecord](t, keyMesh); founded {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is missing, but nodes know the server by this key. Restore it from a backup, or begin a new mesh with another --state DIR", path)
		}
	}
	var err error
	s.key, err = loadKey(path)
	return errors.Join(t.err, err)
}

func (s *Server) assemble(c Config) error {
	pin, err := keyPin(s.key)
	if err != nil {
		return err
	}
	s.hub = newHub(s.store, s.log, time.Now)
	s.registry = &registry{
		store: s.store, key: s.key, pin: pin, prefix: c.Prefix,
		now: time.Now, online: s.hub.online,
	}
	s.failures = newBuckets[netip.Prefix](failuresPerSource/60.0, failuresPerSource, time.Now)
	s.allFailures = newBuckets[netip.Prefix](failuresTotal/60.0, failuresTotal, time.Now)
	stun := &stunServer{
		open: s.hub.open, tokens: s.hub.tokens, sockets: s.udp,
		limit: newBuckets[netip.Prefix](stunPerSource, stunBurst, time.Now), members: newBuckets[trust.Key](stunPerMember, stunBurst, time.Now),
	}
	s.relay, err = newRelayHost(s.hub, s.log, relaySettings{key: s.key, answer: stun.answer, rate: c.RelayRate})
	if err != nil {
		return err
	}
	stun.relayed = s.relay.Session
	if err := s.hub.load(context.Background()); err != nil {
		return err
	}
	return s.makeOwnerInvite(c, pin)
}

// makeOwnerInvite voids the last owner invite and makes a new one, as long as
// nobody owns the mesh.
func (s *Server) makeOwnerInvite(c Config, pin trust.Hash) error {
	return update(context.Background(), s.store, func(t *txn) error {
		if mesh, founded := get[meshRecord](t, keyMesh); founded || t.err != nil {
			s.warnOwnerGone(t, mesh)
			return s.warnFixed(c, mesh)
		}
		get[ownerRecord](t, keyOwner)
		var err error
		if s.invite, err = coord.NewInvite(coord.InviteOwner, pin, s.public); err != nil {
			return err
		}
		public := s.invite.Key().Public().(ed25519.PublicKey)
		t.put(keyOwner, ownerRecord{Invite: trust.Key(public)})
		s.ownerless = true
		return nil
	})
}

// warnOwnerGone says that nobody can invite any more, and what is left to do.
func (s *Server) warnOwnerGone(t *txn, mesh meshRecord) {
	owner, e := peek[nodeRecord](t, keyNode+text(mesh.Owner))
	if t.err != nil || e.Revision == 0 || owner.Left.IsZero() {
		return
	}
	s.log.Warn(fmt.Sprintf("the owner of this mesh, %q, left it on %s: its members go on, but no more can be invited",
		owner.Name, owner.Left.UTC().Format(timeLayout)), "mend", "for a new mesh: --state with an empty DIR")
}

// warnFixed says which flags come too late: the owner signed the mesh's name,
// prefix and servers.
func (s *Server) warnFixed(c Config, mesh meshRecord) error {
	genesis, err := trust.OpenGenesis(mesh.Genesis)
	if err != nil {
		return err
	}
	state, err := trust.OpenState(mesh.State, genesis.Root)
	if err != nil {
		return err
	}
	if c.Mesh != defaultMesh && c.Mesh != state.Name {
		s.log.Warn("--mesh has no effect: the mesh is founded already", "name", state.Name)
	}
	if c.Prefix.IsValid() && c.Prefix != state.Prefix4 {
		s.log.Warn("--prefix has no effect: the mesh is founded already", "prefix", state.Prefix4)
	}
	if c.Public != "" && !slices.Contains(state.Servers, s.public) {
		s.log.Warn("--public has no effect on the mesh, which is founded already; nodes need: overlay up --server "+s.public, "servers", state.Servers)
	}
	return nil
}

// OwnerInvite is the invite that makes its user the owner of the mesh, and
// whether there is one: only when the mesh had no owner at Open.
func (s *Server) OwnerInvite() (coord.Invite, bool) { return s.invite, s.ownerless }

// Addr is the TCP address the server listens on.
func (s *Server) Addr() netip.AddrPort {
	return s.listener.Addr().(*net.TCPAddr).AddrPort()
}

// Run serves until ctx ends or something breaks, then closes the server.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	cert, err := tlsCertificate(s.key)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	web := s.httpServer()
	s.hub.run(ctx, group)
	group.Go(func() error {
		l := tls.NewListener(gatedListener{s.listener, newGate()}, tlsConfig(cert))
		if err := web.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %v: %w", s.Addr(), err)
		}
		return nil
	})
	s.relay.run(ctx, group, s.udp)
	group.Go(func() error { return s.sweep(ctx) })
	group.Go(func() error {
		<-ctx.Done()
		s.closeUDP()
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		if err := web.Shutdown(drain); err != nil {
			_ = web.Close() // who is still there after drainTime is cut off
		}
		return nil
	})
	s.log.Info("serving", "listen", s.Addr(), "public", s.public, "stun", s.stunPorts)
	return errors.Join(group.Wait(), s.Close())
}

func (s *Server) httpServer() *http.Server {
	only1 := new(http.Protocols)
	only1.SetHTTP1(true)
	return &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		Protocols:         only1,
		ConnContext:       newPeer,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// sweep frees what expired, so that it is free also when nobody joins.
func (s *Server) sweep(ctx context.Context) error {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := s.registry.sweep(ctx); err != nil && ctx.Err() == nil {
				s.log.Error("cannot free expired names and addresses", "err", err)
			}
		}
	}
}

func (s *Server) closeUDP() {
	for _, c := range s.udp {
		_ = c.Close()
	}
}

// Close frees the sockets and the state of a server that does not run. Run
// closes by itself.
func (s *Server) Close() error {
	if s.listener != nil {
		_ = s.listener.Close()
	}
	s.closeUDP()
	if s.store == nil {
		return nil
	}
	return s.store.Close()
}
