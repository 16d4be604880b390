package overlay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/tun"
)

// Node is the daemon: it serves the local socket and, once joined, runs a
// session. Its methods may be called from any goroutine.
type Node struct {
	cfg   Config
	store store
	stop  chan struct{} // closed by Down
	once  sync.Once

	up         sync.Mutex // held by Up and Leave: one at a time; taken before mu
	endSession func()     // stops the session and waits for it

	mu      sync.Mutex
	session *session // nil until up
	group   *errgroup.Group
	ctx     context.Context // of Run
}

// New prepares a node; nothing is opened before Run.
func New(c Config) *Node {
	c.setDefaults()
	return &Node{cfg: c, store: store{c.StateDir}, stop: make(chan struct{})}
}

// Run serves the local socket until ctx ends or Down is called, then takes
// everything down. ready is called when the socket is there.
func (n *Node) Run(ctx context.Context, ready func()) error {
	if err := n.store.open(); err != nil {
		return err
	}
	if c, err := net.Dial("unix", n.cfg.Socket); err == nil {
		_ = c.Close()
		return fail(Failure, "see: overlay status", "the daemon is already running (socket %s)", n.cfg.Socket)
	}
	unlock, err := n.store.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	l, err := listenLocal(n.cfg.Socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	n.mu.Lock()
	n.group, n.ctx = g, ctx
	n.mu.Unlock()
	g.Go(func() error { return n.serveLocal(ctx, l) })
	g.Go(func() error {
		select {
		case <-n.stop:
			cancel()
		case <-ctx.Done():
		}
		return nil
	})
	if ready != nil {
		ready()
	}
	return g.Wait()
}

// Down ends Run.
func (n *Node) Down() { n.once.Do(func() { close(n.stop) }) }

// current is the running session, nil when there is none.
func (n *Node) current() *session {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.session
}

// Up joins if it must, opens the interface if it is not open, and returns when
// the node is online, or works from its cache because the server is not
// reached.
func (n *Node) Up(ctx context.Context, r UpRequest, progress func(Progress)) (UpResult, error) {
	n.up.Lock()
	defer n.up.Unlock()
	c, err := n.merge(r)
	if err != nil {
		return UpResult{}, err
	}
	if n.current() == nil {
		if err := tun.CheckInterface(c.Interface); err != nil { // before an invite is spent
			return UpResult{}, deviceError(err, c)
		}
	}
	if err := n.join(ctx, r, c, progress); err != nil {
		return UpResult{}, err
	}
	s, err := n.start(c, progress)
	if err != nil {
		return UpResult{}, err
	}
	res, err := s.settle(ctx, progress)
	if err != nil {
		return UpResult{}, err
	}
	if s.signs() && !s.settings.Announced && res.Online {
		res.Invite = n.announce(ctx, s, progress)
	}
	return res, nil
}

// announce makes the founder's first invite, once.
func (n *Node) announce(ctx context.Context, s *session, progress func(Progress)) string {
	reply, err := s.invite(ctx, InviteRequest{})
	if err == nil {
		s.settings.Announced = true
		err = n.store.save(settingsFile, s.settings)
	}
	if err != nil {
		progress(Progress{Step: "invite", Text: "not made: " + err.Error(), Warn: true})
		return ""
	}
	return reply.Invite
}

// merge adds the flags of a request to what is saved.
func (n *Node) merge(r UpRequest) (*settings, error) {
	c, err := n.store.loadSettings(time.Now())
	if err != nil {
		return nil, err
	}
	if r.Name != "" {
		c.Name = r.Name
	}
	if r.Server != "" {
		c.Server = r.Server
	}
	if r.Interface != "" {
		c.Interface = r.Interface
	}
	if r.MTU != 0 {
		c.MTU = r.MTU
	}
	if r.ListenPort != 0 {
		c.ListenPort = r.ListenPort
	}
	if r.Offloads != nil {
		c.Offloads = *r.Offloads
	}
	if r.Proxy != nil {
		c.Proxy = *r.Proxy
	}
	if r.PortMapping != "" {
		c.PortMapping = r.PortMapping
	}
	if r.PeerRelay != "" {
		c.PeerRelay = r.PeerRelay
	}
	return c, c.check()
}

func (c *settings) check() error {
	if c.MTU < MinMTU || c.MTU > MaxMTU {
		return fail(Usage, fmt.Sprintf("use a number from %d to %d; %d suits nearly every network", MinMTU, MaxMTU, DefaultMTU),
			"--mtu %d is out of range", c.MTU)
	}
	if c.ListenPort < 1 || c.ListenPort > 65535 {
		return fail(Usage, "use a number from 1 to 65535", "--listen-port %d is out of range", c.ListenPort)
	}
	if c.Name != "" && trust.ValidName(c.Name) != nil {
		return fail(Usage, fmt.Sprintf("try --name %s", trust.NormalizeName(c.Name)),
			"name %q is not usable: letters a-z, digits and \"-\", at most 63", c.Name)
	}
	if len(c.Interface) > 15 || !plainName(c.Interface) {
		return fail(Usage, "use at most 15 letters, digits, \"-\", \"_\" or \".\"", "--interface %q is not a usable name", c.Interface)
	}
	if err := tun.CheckOffloads(c.Offloads); err != nil {
		return fail(Usage, "separate several by commas: --offloads -gso,-gro", "%v", err)
	}
	if c.PortMapping != "" && c.PortMapping != portMappingOn && c.PortMapping != portMappingOff {
		return fail(Usage, "on asks the router for a way in, off does not", "--port-mapping %q is neither on nor off", c.PortMapping)
	}
	if _, err := peerRelayRate(c.PeerRelay); err != nil {
		return err
	}
	_, err := parseProxy(c.Proxy)
	return err
}

func plainName(s string) bool {
	for _, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return s != "" && s != "." && s != ".."
}

// join makes this machine a member, unless it is one.
func (n *Node) join(ctx context.Context, r UpRequest, c *settings, progress func(Progress)) error {
	var m membership
	joined, err := n.store.load(meshFile, &m)
	if err != nil {
		return err
	}
	if joined {
		return n.store.sameMesh(&m, r)
	}
	if r.Invite == "" {
		return errNotJoined()
	}
	inv, err := parseInvite(r.Invite)
	if err != nil {
		return err
	}
	k, err := n.store.loadKeys()
	if err != nil {
		return err
	}
	cfg, err := n.joinConfig(inv, k, c)
	if err != nil {
		return err
	}
	got, err := coord.Join(ctx, cfg, func(step, detail string) { progress(Progress{Step: step, Text: detail}) })
	if err != nil {
		return errors.Join(serverError(err, inv.Server), n.store.unfound(k, err))
	}
	m = membership(got)
	if cert, err := ownCert(&m); err == nil && cert.Name != cfg.Name {
		progress(Progress{Step: "name", Warn: true, Text: fmt.Sprintf("%q is taken, or left the mesh less than a day ago; this machine is %q", cfg.Name, cert.Name)})
	}
	return n.store.save(meshFile, m)
}

// sameMesh refuses an invite of another mesh; one of the same mesh is not
// needed and not used.
func (s store) sameMesh(m *membership, r UpRequest) error {
	cert, err := ownCert(m)
	if err != nil {
		return err
	}
	if r.Name != "" && r.Name != cert.Name {
		return fail(Usage, "another name needs another invite: "+s.leaveCommand()+", then join again with --name",
			"this machine is %q in its mesh, not %q", cert.Name, r.Name)
	}
	if r.Invite == "" {
		return nil
	}
	inv, err := parseInvite(r.Invite)
	if err != nil {
		return err
	}
	genesis, err := trust.OpenGenesis(m.Genesis)
	if err != nil {
		return fmt.Errorf("read the saved membership: %w", err)
	}
	if inv.Kind == coord.InviteMember && inv.Hash == m.TrustHash || inv.Kind == coord.InviteOwner && inv.Hash == genesis.Pin {
		return nil
	}
	return fail(Refused, "leave it first: "+s.leaveCommand(), "this machine is already a member of another mesh, as %q (%s)", cert.Name, cert.IP4)
}

func ownCert(m *membership) (trust.NodeCert, error) {
	doc, _, _, err := trust.OpenCountersigned(m.Cert)
	if err != nil {
		return trust.NodeCert{}, fmt.Errorf("read the saved certificate: %w", err)
	}
	return trust.OpenNodeCert(doc)
}

func (n *Node) joinConfig(inv coord.Invite, k *keys, c *settings) (coord.JoinConfig, error) {
	proxy, err := parseProxy(c.Proxy)
	if err != nil {
		return coord.JoinConfig{}, err
	}
	cfg := coord.JoinConfig{
		Invite: inv, Device: k.Device, WireGuard: k.WireGuard,
		Name: c.Name, Exact: c.Name != "", Server: c.Server, Proxy: proxy, Log: n.cfg.Log,
	}
	if cfg.Name == "" {
		host, _ := os.Hostname()
		cfg.Name = trust.NormalizeName(host)
	}
	if inv.Kind != coord.InviteOwner {
		return cfg, nil
	}
	avoid, err := tun.HostAddrs()
	if err != nil {
		return cfg, fmt.Errorf("list local addresses: %w", err)
	}
	if err := n.store.found(k, avoid); err != nil {
		return cfg, err
	}
	f := k.Founding
	cfg.Root, cfg.Signer, cfg.MeshID, cfg.ULA, cfg.Prefix4 = k.Root, k.Signer, f.MeshID, f.ULA, f.Prefix4
	cfg.Date = f.At
	return cfg, nil
}

// start opens the session. A running one stays when the settings are the same,
// and makes room otherwise.
func (n *Node) start(c *settings, progress func(Progress)) (*session, error) {
	old := n.current()
	if old != nil {
		c.Nonces, c.NonceTime, c.Boot = old.settings.Nonces, old.settings.NonceTime, old.settings.Boot
		if *old.settings == *c {
			return old, nil
		}
		n.endSession()
	}
	s, err := n.openSession(c)
	if err != nil {
		if old != nil {
			n.goBack(old.settings)
		}
		return nil, deviceError(err, c)
	}
	overlaps := s.overlaps()
	if err := n.store.save(settingsFile, c); err != nil {
		return nil, errors.Join(err, s.dev.Load().Close())
	}
	if err := n.runSession(s); err != nil {
		return nil, errors.Join(err, s.dev.Load().Close())
	}
	progress(Progress{Step: "interface", Text: fmt.Sprintf("%s, %s, %s, MTU %d", c.Interface, s.self.IP4, s.self.IP6, c.MTU)})
	for _, o := range overlaps {
		progress(Progress{Step: "overlap", Warn: true, Text: o + " overlaps the mesh's IPv4 range; reach peers by their IPv6 addresses"})
	}
	return s, nil
}

// goBack opens the session again that made room for settings that failed.
func (n *Node) goBack(c *settings) {
	s, err := n.openSession(c)
	if err == nil {
		err = n.runSession(s)
	}
	if err != nil {
		n.cfg.Log.Error("the former session cannot be opened again", "err", err)
	}
}

func (n *Node) openSession(c *settings) (*session, error) {
	k, err := n.store.loadKeys()
	if err != nil {
		return nil, err
	}
	var m membership
	if _, err := n.store.load(meshFile, &m); err != nil {
		return nil, err
	}
	cert, err := ownCert(&m)
	if err != nil {
		return nil, err
	}
	if cert.Device != publicOf(k.Device) || cert.WireGuard != trust.Key(k.WireGuard.PublicKey()) {
		return nil, fail(Failure, "restore both from one backup, or give this identity up and join again: "+n.store.leaveCommand(),
			"the keys in %s are not those of the saved membership", n.store.dir)
	}
	c.begin(time.Now())
	return newSession(n.store, k, c, &m, n.cfg)
}

// runSession starts the session under Run's group; an error of it that nobody
// asked for ends the daemon.
func (n *Node) runSession(s *session) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ctx == nil {
		return errors.New("the node does not run")
	}
	ctx, cancel := context.WithCancel(n.ctx)
	done := make(chan struct{})
	n.session, n.endSession = s, func() { cancel(); <-done }
	n.group.Go(func() error {
		defer close(done)
		defer cancel()
		err := s.run(ctx)
		n.mu.Lock()
		n.session = nil
		n.mu.Unlock()
		return err
	})
	return nil
}

// How long up waits for things that are good to know but not needed.
const (
	serverWait  = 3 * time.Second
	networkWait = udpSilence // the links are as old as the session
	peersWait   = 400 * time.Millisecond
)

// settle waits for the server, then a moment for the network and the peers,
// and tells how things stand.
func (s *session) settle(ctx context.Context, progress func(Progress)) (UpResult, error) {
	within(ctx, serverWait, s, func() bool { return s.synced || s.trouble != nil })
	s.mu.Lock()
	online, trouble := s.online && s.synced, s.trouble
	s.mu.Unlock()
	res := UpResult{Name: s.self.Name, IPv4: s.self.IP4, IPv6: s.self.IP6, Online: online}
	if err := serverError(trouble, "the server"); !online && trouble != nil && KindOf(err) == Refused {
		return res, err
	}
	if !online {
		progress(Progress{Step: "server", Warn: true, Text: troubleText(trouble) + "; using the saved mesh, will keep trying"})
	}
	if c := s.control.connected(); online && s.settings.Server != "" && c != s.settings.Server {
		progress(Progress{Step: "server", Warn: true, Text: fmt.Sprintf("%s is not reached; connected to %s", s.settings.Server, c)})
	}
	if online {
		within(ctx, networkWait, s, func() bool { return s.outside.IsValid() || s.udp().state == udpBlocked })
		if text := s.networkText(); text != "" {
			progress(Progress{Step: "network", Text: text})
		}
	}
	within(ctx, peersWait, s, func() bool { return s.waiting() == 0 })
	progress(Progress{Step: "peers", Text: s.peersText()})
	return res, nil
}

func within(ctx context.Context, d time.Duration, s *session, done func() bool) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	s.wait(ctx, done)
}

// reflexive is the outside address of one family.
func reflexive(list []punch.Candidate, is4 bool) netip.AddrPort {
	for _, c := range list {
		if c.Type == punch.ServerReflexive && c.Addr.Addr().Is4() == is4 {
			return c.Addr
		}
	}
	return netip.AddrPort{}
}

// waiting counts the online peers without a path; mu is held.
func (s *session) waiting() int {
	count := 0
	for _, m := range s.roster.members {
		if _, ok := s.endpoints.path(punch.Key(m.cert.WireGuard)); m.node.Online && m.peer() && !ok {
			count++
		}
	}
	return count
}

// listenLocal opens the daemon's socket; one that is left of a daemon that died
// makes room.
func listenLocal(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fail(permissionOr(err), "run it with sudo", "cannot make %s: %v", filepath.Dir(path), errors.Unwrap(err))
	}
	_ = os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fail(permissionOr(err), "run it with sudo", "cannot listen on %s: %v", path, err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s to all users: %w", path, err), l.Close())
	}
	return l, nil
}

func permissionOr(err error) Kind {
	if errors.Is(err, os.ErrPermission) {
		return Permission
	}
	return Failure
}
