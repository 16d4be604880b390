// Package natlab builds real networks on one Linux machine: an Internet with
// delay and loss, public servers, and homes whose laptops sit behind NATs, all
// from network namespaces, veth pairs and nftables.
//
// Every machine of a lab is a set of anonymous namespaces (network, mounts,
// host name) held open by one process. Nothing has a name outside of them, so
// several labs coexist, and nothing is left when that process ends: it ends
// when the lab is closed and also when the program that made the lab dies.
package natlab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	defaultDelay = 20 * time.Millisecond
	dirPrefix    = "natlab-"
	lockName     = "lock"

	maxHomes   = 200
	maxServers = 200
)

// ErrNotRoot says that a lab was asked for by a user who may not build one.
var ErrNotRoot = errors.New("a lab needs root: it creates network namespaces")

// Options says what the Internet of a lab is like. The zero value is an
// Internet of 20 ms one way without loss.
type Options struct {
	// Delay is the time one packet spends in the Internet, one way. Zero is
	// 20 ms. Negative takes the delay line out: packets stay in the kernel,
	// as throughput measurements need it.
	Delay time.Duration
	// Loss is the share of packets, 0 to 1, the Internet loses.
	Loss float64
	// IPv6 gives the Internet, its servers, and the homes that want it, IPv6
	// besides IPv4.
	IPv6 bool
	// Dir is where the lab makes its own folder; empty is the folder for
	// temporary files. It must not lie below /run, /var/lib or /root, which
	// are private to every machine of the lab.
	Dir string
	// Binary is a ready overlay program; empty lets Build compile it.
	Binary string
	// Log gets what the lab does; nil is slog's default.
	Log *slog.Logger
}

// Lab is one Internet with everything attached to it. Make it with New; its
// methods may be used from several goroutines.
type Lab struct {
	opts  Options
	dir   string
	lock  *os.File
	core  *node
	line  *delayLine // of the core; nil: none
	group errgroup.Group
	stop  context.CancelFunc
	spawn func(func(context.Context) error) // until Close
	keys  clientKey
	cuts  cuts

	build     sync.Once
	buildErr  error
	closeOnce sync.Once
	closeErr  error

	mu       sync.Mutex
	nodes    []*node
	ports    int
	homes    int
	carriers int
	servers  int
	legs     int
	accesses int
}

// New builds an empty Internet: a core router with its delay line. It first
// removes what labs left whose process is dead. The context bounds the
// building only; the lab lives until Close.
func New(ctx context.Context, opts Options) (*Lab, error) {
	if err := opts.complete(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, ErrNotRoot
	}
	if err := sweep(opts.Dir, opts.Log); err != nil {
		return nil, err
	}
	dir, lock, err := claimDir(opts.Dir)
	if err != nil {
		return nil, err
	}
	l := &Lab{opts: opts, dir: dir, lock: lock}
	if err := l.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("build lab: %w", err), l.Close())
	}
	opts.Log.Info("lab is up", "dir", dir, "delay", opts.Delay, "loss", opts.Loss)
	return l, nil
}

func (o *Options) complete() error {
	if o.Delay == 0 {
		o.Delay = defaultDelay
	}
	if o.Loss < 0 || o.Loss > 1 {
		return fmt.Errorf("loss %v is not between 0 and 1", o.Loss)
	}
	if o.Delay < 0 && o.Loss > 0 {
		return errors.New("loss needs the delay line, which a negative delay takes out")
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Dir == "" {
		o.Dir = os.TempDir()
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return fmt.Errorf("find lab folder: %w", err)
	}
	for _, private := range []string{"/run", "/var/run", "/var/lib", "/root"} {
		if rel, err := filepath.Rel(private, dir); err == nil && filepath.IsLocal(rel) {
			return fmt.Errorf("lab folder %s lies below %s, which is private to each machine of a lab", dir, private)
		}
	}
	o.Dir = dir
	return nil
}

func (l *Lab) start(ctx context.Context) error {
	running, stop := context.WithCancel(context.Background())
	l.stop = stop
	l.spawn = func(f func(context.Context) error) {
		l.group.Go(func() error { return f(running) })
	}
	if err := os.Mkdir(l.binDir(), 0o755); err != nil {
		return fmt.Errorf("make folder for programs: %w", err)
	}
	keys, err := newClientKey()
	if err != nil {
		return err
	}
	l.keys = keys
	if l.core, err = l.newNode(ctx, "core"); err != nil {
		return err
	}
	if err := l.core.sh(ctx, coreSetup()); err != nil {
		return err
	}
	if l.opts.Delay > 0 {
		if err := l.startDelay(ctx); err != nil {
			return err
		}
	}
	if !l.opts.IPv6 {
		return nil
	}
	return l.core.sh(ctx, coreSetup6(l.opts.Delay > 0))
}

func (l *Lab) startDelay(ctx context.Context) error {
	l.line = newDelayLine(l.opts.Delay, l.opts.Loss)
	if err := l.runLine(l.core, l.line); err != nil {
		return err
	}
	return l.core.sh(ctx, lineSetup(delayDevice, delayTable))
}

// runLine has a delay line run on a device of its own in a machine, until the
// lab is closed.
func (l *Lab) runLine(n *node, line *delayLine) error {
	var tun *os.File
	err := n.inside(func() (err error) {
		tun, err = openTUN(delayDevice)
		return err
	})
	if err != nil {
		return err
	}
	l.spawn(func(running context.Context) error { return line.run(running, tun) })
	return nil
}

// Close ends every process of the lab, removes its namespaces with all
// interfaces and mounts in them, and its folder. It may be called twice.
func (l *Lab) Close() error {
	l.closeOnce.Do(func() { l.closeErr = l.close() })
	return l.closeErr
}

func (l *Lab) close() error {
	l.mu.Lock()
	nodes := l.nodes
	l.nodes = nil
	l.mu.Unlock()
	var errs []error
	var released errgroup.Group
	for _, n := range nodes {
		released.Go(n.close)
	}
	errs = append(errs, released.Wait())
	if l.stop != nil {
		l.stop()
	}
	errs = append(errs, l.group.Wait(), os.RemoveAll(l.dir), l.lock.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close lab: %w", err)
	}
	l.opts.Log.Info("lab is gone", "dir", l.dir)
	return nil
}

// Server attaches a host with a public address and no NAT straight to the
// Internet.
func (l *Lab) Server(ctx context.Context, name string) (*Host, error) {
	l.mu.Lock()
	l.servers++
	index := l.servers
	l.mu.Unlock()
	if index > maxServers {
		return nil, fmt.Errorf("add server %s: a lab has room for %d servers", name, maxServers)
	}
	h, err := l.newHost(ctx, name)
	if err != nil {
		return nil, err
	}
	h.addr = netip.AddrFrom4([4]byte{198, 51, 100, byte(index)})
	h.gateway = gateway()
	h.port = l.nextPort()
	cable := wire{h.port, "eth0", h.addr}
	if err := l.attach(ctx, l.internet(), h.node, cable); err != nil {
		return nil, fmt.Errorf("add server %s: %w", name, err)
	}
	if l.opts.IPv6 {
		err = l.serve6(ctx, h, cable, serverPrefix6(index))
	}
	return h, err
}

// wire is a cable into the core: its end there, its end in the machine, and
// the public address routed over it.
type wire struct {
	port, inner string
	addr        netip.Addr
}

func (l *Lab) attach(ctx context.Context, up uplink, n *node, w wire) error {
	var s script
	s.add("ip link add %s type veth peer name %s netns %d", w.port, w.inner, n.pid)
	s.add("ip link set %s up", w.port)
	s.add("ip route add %s/32 dev %s", w.addr, w.port)
	if up.delayed {
		s.add("ip rule add %s iif %s lookup %d", up.pref, w.port, delayTable)
	}
	if err := up.node.sh(ctx, s); err != nil {
		return err
	}
	var inner script
	inner.add("ip addr add %s/32 dev %s", w.addr, w.inner)
	inner.add("ip link set %s up", w.inner)
	inner.add("ip route replace default via %s dev %s onlink", up.gateway, w.inner)
	return n.sh(ctx, inner)
}

func (l *Lab) nextPort() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ports++
	return fmt.Sprintf("port%d", l.ports)
}

func (l *Lab) binDir() string { return filepath.Join(l.dir, "bin") }

// gateway is the core's own address. It is the next hop of every home and
// server, whatever their addresses are.
func gateway() netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, 254}) }

// echoAddrs are two more addresses of the core, for Probe.
func echoAddrs() [2]netip.Addr {
	return [2]netip.Addr{
		netip.AddrFrom4([4]byte{198, 51, 100, 252}),
		netip.AddrFrom4([4]byte{198, 51, 100, 253}),
	}
}

func coreSetup() script {
	var s script
	s.sysctl("net/ipv4/ip_forward", 1)
	// A packet comes back from the delay line on another interface than the
	// one its source lives behind.
	s.sysctl("net/ipv4/conf/all/rp_filter", 0)
	s.sysctl("net/ipv4/conf/default/rp_filter", 0)
	s.sysctl("net/ipv4/conf/all/send_redirects", 0)
	s.sysctl("net/ipv4/conf/default/send_redirects", 0)
	s.add("ip addr add %s/32 dev lo", gateway())
	for _, a := range echoAddrs() {
		s.add("ip addr add %s/32 dev lo", a)
	}
	return s
}

// claimDir makes the folder of a lab and locks it. The kernel drops the lock
// with the process, which is how sweep knows the dead from the living.
func claimDir(parent string) (string, *os.File, error) {
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", nil, fmt.Errorf("make %s: %w", parent, err)
	}
	dir, err := os.MkdirTemp(parent, fmt.Sprintf("%s%d-", dirPrefix, os.Getpid()))
	if err != nil {
		return "", nil, fmt.Errorf("make lab folder: %w", err)
	}
	// sshd refuses keys below folders others may not enter.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", nil, fmt.Errorf("open lab folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", nil, fmt.Errorf("make lab lock: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return "", nil, errors.Join(fmt.Errorf("lock lab folder: %w", err), lock.Close())
	}
	return dir, lock, nil
}

// sweep removes the folders of labs that nobody holds any more. Their
// processes and interfaces went when their owner died.
func sweep(parent string, log *slog.Logger) error {
	dirs, err := filepath.Glob(filepath.Join(parent, dirPrefix+"*-*"))
	if err != nil {
		return fmt.Errorf("look for old labs: %w", err)
	}
	for _, dir := range dirs {
		lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR, 0)
		if err != nil {
			continue // being made or being removed
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			log.Warn("removing a lab whose process is gone", "dir", dir)
			err = os.RemoveAll(dir)
		}
		if err = errors.Join(err, lock.Close()); err != nil {
			return fmt.Errorf("remove old lab %s: %w", dir, err)
		}
	}
	return nil
}
