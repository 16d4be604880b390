package natlab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"overlay/punch/nattest"
)

const (
	lanDevice = "lan"
	wanDevice = "wan"

	// firstLaptop is the host number of the first laptop in a LAN; the
	// router has 1.
	firstLaptop     = 2
	maxPublicHomes  = 15
	maxLaptops      = 200
	maxPublicLaptop = 12
)

// Home is a LAN behind one router. Its methods may be used from several
// goroutines.
type Home struct {
	*node
	lab  *Lab
	site Site
	nat  NAT // that of site
	lan  netip.Prefix
	lan6 netip.Prefix
	port string
	// table is that of the program that translates, nil where the kernel does.
	table *nattest.Table
	// proxy runs where the home has one.
	proxy *Process
	// mapper maps ports where the home has one.
	mapper *Process
	// mapping is how a home with rules of its own maps ports; see HardHome.
	mapping PortMapping

	mu      sync.Mutex
	wan     netip.Addr
	laptops int
	leases  map[string]netip.Prefix // by laptop
}

// Home attaches a home to the Internet: a router of the given kind with one
// public address of its own and an empty LAN.
func (l *Lab) Home(ctx context.Context, name string, nat NAT) (*Home, error) {
	return l.HomeAt(ctx, name, Site{NAT: nat})
}

// HomeAt attaches a home where the site says, with an empty LAN.
func (l *Lab) HomeAt(ctx context.Context, name string, site Site) (*Home, error) {
	nat := site.NAT
	if _, err := nat.rules(); err != nil {
		return nil, fmt.Errorf("add home %s: %w", name, err)
	}
	l.mu.Lock()
	l.homes++
	index := l.homes
	l.mu.Unlock()
	if index > maxHomes || nat.routed() && index > maxPublicHomes {
		return nil, fmt.Errorf("add home %s: home %d is one too many for the address plan", name, index)
	}
	n, err := l.newNode(ctx, name)
	if err != nil {
		return nil, err
	}
	h := &Home{node: n, lab: l, site: site, nat: nat, port: l.nextPort(), leases: map[string]netip.Prefix{}}
	h.lan, h.lan6 = lanPrefix(nat, index), homePrefix6(index)
	if site.LAN.IsValid() {
		h.lan = site.LAN
	}
	if h.wan, err = h.address(index); err != nil {
		return nil, fmt.Errorf("add home %s: %w", name, err)
	}
	if err := h.setUp(ctx); err != nil {
		return nil, fmt.Errorf("add home %s: %w", name, err)
	}
	if nat.proxied() {
		if err := h.startProxy(ctx); err != nil {
			return nil, fmt.Errorf("add home %s: %w", name, err)
		}
	}
	return h, nil
}

func lanPrefix(nat NAT, index int) netip.Prefix {
	if nat.routed() {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(index * 16)}), 28)
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(index), 0}), 24)
}

func (h *Home) setUp(ctx context.Context) error {
	var s script
	s.sysctl("net/ipv4/ip_forward", 1)
	s.sysctl("net/ipv4/conf/all/send_redirects", 0)
	s.sysctl("net/ipv4/conf/default/send_redirects", 0)
	// On many machines bridged frames meet the IP hooks too, in every new
	// namespace: two laptops of one LAN would talk through the NAT.
	s.add("[ ! -e /proc/sys/net/bridge ] || echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables")
	s.add("ip link add %s type bridge forward_delay 0", lanDevice)
	s.add("ip addr add %s dev %s", netip.PrefixFrom(h.router(), h.lan.Bits()), lanDevice)
	s.add("ip link set %s up", lanDevice)
	if err := h.sh(ctx, s); err != nil {
		return err
	}
	if err := h.lab.attach(ctx, h.uplink(), h.node, wire{h.port, wanDevice, h.wan}); err != nil {
		return err
	}
	if err := h.setUp6(ctx); err != nil {
		return err
	}
	if err := errors.Join(h.sh(ctx, h.nat.setUp()), h.narrow(ctx), h.routeLAN(ctx), h.startUserNAT(ctx)); err != nil {
		return err
	}
	return h.load(ctx, h.wan)
}

// routeLAN tells the core where a public LAN is.
func (h *Home) routeLAN(ctx context.Context) error {
	if !h.nat.routed() {
		return nil
	}
	var s script
	s.add("ip route replace %s via %s dev %s onlink", h.lan, h.wan, h.port)
	return h.lab.core.sh(ctx, s)
}

// load makes the router translate and filter from now on, with what it knew
// forgotten but the flows.
func (h *Home) load(ctx context.Context, wan netip.Addr) error {
	rules, err := h.nat.rules()
	if err != nil {
		return err
	}
	rules = fill(rules, wan, h.host(firstLaptop)) + h.site.IPv6.rules()
	if h.carrier() {
		rules += carrierRules
	}
	return h.apply(ctx, rules)
}

// apply replaces all rules of the router.
func (h *Home) apply(ctx context.Context, rules string) error {
	var s script
	s.add("nft -f - <<'RULES'\nflush ruleset\n%s\nRULES", rules)
	return h.sh(ctx, s)
}

// Laptop puts a new host into the home's LAN.
func (h *Home) Laptop(ctx context.Context, name string) (*Host, error) {
	addr, err := h.lease(name, false)
	if err != nil {
		return nil, err
	}
	host, err := h.lab.newHost(ctx, name)
	if err != nil {
		return nil, err
	}
	host.home, host.port = h, h.lab.nextPort()
	host.addr, host.gateway = addr.Addr(), h.router()
	var cable, self script
	cable.add("ip link add %s type veth peer name eth0 netns %d", host.port, host.pid)
	cable.add("ip link set %s master %s up", host.port, lanDevice)
	if err := h.sh(ctx, cable); err != nil {
		return nil, fmt.Errorf("add laptop %s: %w", name, err)
	}
	self.add("ip addr add %s dev eth0", addr)
	self.add("ip link set eth0 up")
	self.add("ip route add default via %s dev eth0", host.gateway)
	if err := errors.Join(host.sh(ctx, self), h.laptop6(ctx, host)); err != nil {
		return nil, fmt.Errorf("add laptop %s: %w", name, err)
	}
	return host, nil
}

// lease gives a laptop its address in the LAN: the one it had when it was here
// before, as home routers do, unless it is to be another.
func (h *Home) lease(laptop string, another bool) (netip.Prefix, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if addr, ok := h.leases[laptop]; ok && !another {
		return addr, nil
	}
	most := maxLaptops
	if h.nat.routed() {
		most = maxPublicLaptop
	}
	if h.laptops >= most {
		return netip.Prefix{}, fmt.Errorf("home %s has no address left for another laptop", h.name)
	}
	host := h.host(firstLaptop + h.laptops)
	h.laptops++
	h.leases[laptop] = netip.PrefixFrom(host, h.lan.Bits())
	return h.leases[laptop], nil
}

// host is an address of the LAN by its number.
func (h *Home) host(number int) netip.Addr {
	b := h.lan.Addr().As4()
	b[3] += byte(number)
	return netip.AddrFrom4(b)
}

func (h *Home) router() netip.Addr { return h.lan.Addr().Next() }

// WAN is the home's public address, that of its router.
func (h *Home) WAN() netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wan
}

// SetWAN gives the router another public address, as a provider does at
// night. The address must not be in use elsewhere in the lab.
func (h *Home) SetWAN(ctx context.Context, addr netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var core, self script
	up := h.uplink()
	core.add("ip route del %s/32 dev %s", h.wan, h.port)
	core.add("ip route add %s/32 dev %s", addr, h.port)
	self.add("ip -4 addr flush dev %s scope global", wanDevice)
	self.add("ip addr add %s/32 dev %s", addr, wanDevice)
	self.add("ip route replace default via %s dev %s onlink", up.gateway, wanDevice)
	if err := up.node.sh(ctx, core); err != nil {
		return err
	}
	if err := h.sh(ctx, self); err != nil {
		return err
	}
	h.wan = addr
	if err := h.routeLAN(ctx); err != nil || !h.nat.bound() {
		return err
	}
	return h.load(ctx, addr)
}

// Reboot makes the router forget every mapping it holds.
func (h *Home) Reboot(ctx context.Context) error {
	if h.mapping != "" { // nothing is mapped any more when its nodes are down
		return h.Forget(ctx)
	}
	if err := h.load(ctx, h.WAN()); err != nil {
		return err
	}
	if h.table != nil {
		h.table.Flush()
	}
	var s script
	s.add("conntrack -F")
	return h.sh(ctx, s)
}
