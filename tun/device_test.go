package tun

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func mesh() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("100.99.0.0/16"), netip.MustParsePrefix("fd99::/48")}
}

func newKey(t *testing.T) Key {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A node is a Device that runs in a namespace until the test ends.
type node struct {
	*Device
	self Peer
	ran  chan error // what Run returned
	stop context.CancelFunc
}

// newNode makes node number n of the mesh: 100.99.0.n and fd99::n.
func newNode(t *testing.T, s *space, n byte, more ...func(*Config)) *node {
	t.Helper()
	v4, v6 := netip.AddrFrom4([4]byte{100, 99, 0, n}), netip.AddrFrom16([16]byte{0xfd, 0x99, 15: n})
	c := Config{
		Name: linkName(), PrivateKey: newKey(t), MTU: 1400, Mesh: mesh(), Routes: mesh(),
		Addrs: []netip.Prefix{netip.PrefixFrom(v4, 16), netip.PrefixFrom(v6, 48)},
	}
	if testing.Verbose() {
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	for _, f := range more {
		f(&c)
	}
	d := &node{ran: make(chan error, 1)}
	d.self = Peer{
		Key: c.PrivateKey.PublicKey(), Handle: v6,
		AllowedIPs: []netip.Prefix{netip.PrefixFrom(v4, 32), netip.PrefixFrom(v6, 128)},
	}
	s.do(t, func() (err error) {
		d.Device, err = Open(c)
		return err
	})
	ctx, cancel := context.WithCancel(t.Context())
	d.stop = cancel
	go func() { d.ran <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *node) endpoint(t *testing.T, k Key) netip.AddrPort {
	t.Helper()
	all, err := d.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return all[k].Endpoint
}

// keepalive is how often wireguard-go keeps the way to a peer open.
func (d *node) keepalive(t *testing.T, k Key) time.Duration {
	t.Helper()
	dev, err := d.ctl.Device(d.Name())
	check(t, err)
	for _, p := range dev.Peers {
		if p.PublicKey == k {
			return p.PersistentKeepaliveInterval
		}
	}
	t.Fatal("no such peer")
	return 0
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPeersAndEndpoints(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	k, other := newKey(t).PublicKey(), newKey(t).PublicKey()
	v6 := netip.MustParseAddr("fd99::2")
	peer := Peer{
		Key: k, Handle: v6, Keepalive: 25 * time.Second,
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("100.99.0.2/32"), netip.MustParsePrefix("fd99::2/128")},
	}
	extra := Peer{Key: other, Handle: netip.MustParseAddr("fd99::3")}
	check(t, d.SetPeers([]Peer{peer, extra}))
	first := d.endpoint(t, k)
	if every := d.keepalive(t, k); every != 0 {
		t.Errorf("a peer without a path has a keepalive of %v", every)
	}
	if first.Addr() != v6 {
		t.Errorf("a new peer has the endpoint %v, want a handle at %v", first, v6)
	}

	to := netip.MustParseAddrPort("192.0.2.7:4242")
	check(t, d.SetEndpoint(k, to, netip.AddrPort{}))
	if every := d.keepalive(t, k); every != peer.Keepalive {
		t.Errorf("a peer with a path has a keepalive of %v, want %v", every, peer.Keepalive)
	}
	if got := d.endpoint(t, k); got != to {
		t.Errorf("endpoint %v, want %v", got, to)
	}
	peer.Keepalive, peer.AllowedIPs = 0, peer.AllowedIPs[:1]
	check(t, d.SetPeers([]Peer{peer})) // removes the other
	if got := d.endpoint(t, k); got != to {
		t.Errorf("a changed peer has the endpoint %v, want %v still", got, to)
	}
	requireWG(t, d.Name(), peer, to)

	check(t, d.ClearEndpoint(k))
	if every := d.keepalive(t, k); every != 0 {
		t.Errorf("a peer that lost its path has a keepalive of %v", every)
	}
	if got := d.endpoint(t, k); got.Addr() != v6 || got == first {
		t.Errorf("cleared endpoint %v, want a handle other than %v", got, first)
	}
	for what, err := range map[string]error{
		"removed peer": d.SetEndpoint(other, to, netip.AddrPort{}), "cleared removed peer": d.ClearEndpoint(other),
	} {
		if !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("%s: %v, want %v", what, err, ErrUnknownPeer)
		}
	}
	if err := d.SetEndpoint(k, netip.MustParseAddrPort("100.99.0.2:1"), netip.AddrPort{}); err == nil {
		t.Error("an endpoint inside the mesh was accepted")
	}
}

// requireWG looks from outside: with a wgctrl client of its own, and with wg.
func requireWG(t *testing.T, name string, p Peer, to netip.AddrPort) {
	t.Helper()
	c, err := wgctrl.New()
	check(t, err)
	defer c.Close()
	dev, err := c.Device(name)
	check(t, err)
	if len(dev.Peers) != 1 || dev.Peers[0].Endpoint.String() != to.String() ||
		len(dev.Peers[0].AllowedIPs) != len(p.AllowedIPs) || dev.Peers[0].PersistentKeepaliveInterval != p.Keepalive {
		t.Errorf("wgctrl sees %+v, want only %+v at %v", dev.Peers, p, to)
	}
	if _, err := exec.LookPath("wg"); err != nil {
		return
	}
	out, err := exec.Command("wg", "show", name, "endpoints").CombinedOutput()
	if want := p.Key.String() + "\t" + to.String(); err != nil || strings.TrimSpace(string(out)) != want {
		t.Errorf("wg show: %v, %q, want %q", err, out, want)
	}
}

// A set that fails in the middle leaves peers without endpoint in wireguard-go,
// which would follow any packet: the next one must make them anew.
func TestFailedSetIsMended(t *testing.T) {
	d := newNode(t, newSpace(t), 1)
	k := newKey(t).PublicKey()
	bad := Peer{Key: k, Handle: netip.MustParseAddr("fe80::1%eth0")}
	if err := d.SetPeers([]Peer{bad}); err == nil {
		t.Fatal("a handle with a zone was accepted; nothing is tested")
	}
	if err := d.SetEndpoint(k, netip.MustParseAddrPort("192.0.2.7:1"), netip.AddrPort{}); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("endpoint of a half-made peer: %v, want %v", err, ErrUnknownPeer)
	}
	good := Peer{Key: k, Handle: netip.MustParseAddr("fd99::2")}
	check(t, d.SetPeers([]Peer{good}))
	if got := d.endpoint(t, k); got.Addr() != good.Handle {
		t.Errorf("endpoint %v, want a handle at %v", got, good.Handle)
	}
	if len(d.failed) != 0 {
		t.Errorf("%d peers still marked as failed", len(d.failed))
	}
}

func TestSocketFileIsPutBack(t *testing.T) {
	d := newNode(t, newSpace(t), 1)
	k := newKey(t).PublicKey()
	check(t, d.SetPeers([]Peer{{Key: k, Handle: netip.MustParseAddr("fd99::2")}}))
	path := uapiFolder + "/" + d.Name() + ".sock"
	check(t, os.Remove(path))
	check(t, d.SetEndpoint(k, netip.MustParseAddrPort("192.0.2.7:1"), netip.AddrPort{}))
	info, err := os.Stat(path)
	check(t, err)
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("socket file has mode %o, want 600", got)
	}
	check(t, d.Close())
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close the socket file: %v, want none", err)
	}
}

// Close under way and ended Runs must not leave calls waiting for ever.
func TestNothingWaitsAfterTheEnd(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	k := newKey(t).PublicKey()
	list := []Peer{{Key: k, Handle: netip.MustParseAddr("fd99::2")}}
	check(t, d.SetPeers(list))
	d.stop()
	if err := <-d.ran; err != nil {
		t.Errorf("Run: %v, want nil", err)
	}
	if err := d.SetEndpoint(k, netip.MustParseAddrPort("192.0.2.7:1"), netip.AddrPort{}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Run: %v, want %v", err, ErrClosed)
	}
	check(t, d.Close())
	check(t, d.Close())
	if err := d.SetPeers(nil); err != nil && !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if hasLink(t, s, d.Name()) {
		t.Error("Close left the interface")
	}

	waiting := newNode(t, s, 2, func(c *Config) { c.Port = 40200 })
	waiting.stop()
	<-waiting.ran
	c, err := net.DialTimeout("unix", uapiFolder+"/"+waiting.Name()+".sock", time.Second)
	if err == nil {
		c.Close()
		t.Error("the uapi socket takes connections that nobody serves")
	}
}

func TestCheckConfig(t *testing.T) {
	good := Config{Name: "overlay0", PrivateKey: newKey(t), MTU: 1400}
	for name, change := range map[string]func(*Config){
		"empty name":    func(c *Config) { c.Name = "" },
		"long name":     func(c *Config) { c.Name = "overlay012345678" },
		"path":          func(c *Config) { c.Name = "../x" },
		"template":      func(c *Config) { c.Name = "overlay%d" },
		"small mtu":     func(c *Config) { c.MTU = 575 },
		"large mtu":     func(c *Config) { c.MTU = 65536 },
		"no key at all": func(c *Config) { c.PrivateKey = Key{} },
	} {
		c := good
		change(&c)
		if checkConfig(c) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	check(t, checkConfig(good))
}

func TestDiff(t *testing.T) {
	keys := []Key{{1}, {2}, {3}, {4}}
	d := &Device{
		known:  map[Key]Peer{keys[0]: {Key: keys[0]}, keys[1]: {Key: keys[1]}, keys[2]: {Key: keys[2]}},
		failed: map[Key]bool{keys[2]: true, keys[3]: true},
	}
	var got []Key
	for _, c := range d.diff([]Peer{{Key: keys[0]}, {Key: keys[1], Keepalive: time.Second}, {Key: keys[2]}}) {
		got = append(got, c.key)
		if (c.want == nil) != (c.key == keys[3]) {
			t.Errorf("peer %d: want %v", c.key[0], c.want)
		}
	}
	if !slices.Equal(got, keys[1:]) {
		t.Errorf("changes for %v, want 2 changed, 3 made anew, 4 removed", got)
	}
}
