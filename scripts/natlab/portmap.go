package natlab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// PortMapping is how a router lets the hosts of its LAN map ports.
type PortMapping string

// What miniupnpd offers, and what the router lets through to it.
const (
	MapPCP    PortMapping = "pcp"     // and NAT-PMP, as it comes
	MapNATPMP PortMapping = "nat-pmp" // PCP is dropped without a word
	MapUPnP1  PortMapping = "upnp-igd1"
	MapUPnP2  PortMapping = "upnp-igd2"
	// MapShared is PCP of the lab's own on an outer address that is not public:
	// miniupnpd maps nothing there.
	MapShared PortMapping = "pcp-shared"
	// MapRefused is miniupnpd on such an address.
	MapRefused PortMapping = "pcp-refused"
	// MapNone is the same router without the daemon.
	MapNone PortMapping = "none"
)

const (
	mapperProgram = "miniupnpd"
	mapperStart   = 10 * time.Second
	mapperPoll    = 20 * time.Millisecond
)

// hardRules is a router with endpoint-dependent mapping to random ports, behind
// which nothing from outside is let in but by a mapped port, with the chains that
// miniupnpd wants to find. It needs a rule for the input from the LAN, or none.
const hardRules = `table inet filter {
	chain input { type filter hook input priority 0; iifname "wan" ct state established,related accept; iifname "wan" meta l4proto icmpv6 accept; iifname "wan" drop; %s }
	chain forward { type filter hook forward priority 0; policy drop; ct state established,related accept; iifname "lan" accept; jump miniupnpd; }
	chain prerouting { type nat hook prerouting priority dstnat; jump prerouting_miniupnpd; }
	chain postrouting { type nat hook postrouting priority srcnat; jump postrouting_miniupnpd; oifname "wan" meta nfproto ipv4 masquerade random,fully-random; }
	chain miniupnpd { }
	chain prerouting_miniupnpd { }
	chain postrouting_miniupnpd { }
}`

// dropPCP knows PCP by its version, the first byte behind the UDP header.
const dropPCP = `iifname "lan" udp dport 5351 @th,64,8 2 drop;`

// mapperConfig needs, in order, what is on, the folder and the LAN.
const mapperConfig = `ext_ifname=wan
ext_ifname6=wan
listening_ip=lan
port=5000
secure_mode=yes
%s
uuid=dd4ab38d-11e7-48a9-9091-1a0c1e4196ca
upnp_table_name=filter
upnp_nat_table_name=filter
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
allow 1024-65535 %v 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
`

// switches are the lines of the configuration that differ.
func (m PortMapping) switches() string {
	switch m {
	case MapPCP, MapNATPMP, MapRefused:
		return "enable_natpmp=yes\nenable_upnp=no"
	case MapUPnP1:
		return "enable_natpmp=no\nenable_upnp=yes\nforce_igd_desc_v1=yes"
	}
	return "enable_natpmp=no\nenable_upnp=yes"
}

// HardHome adds a home, behind a carrier or behind none, whose router gives every
// flow another port, and maps ports for who asks in the given way. The router's
// address looks public, for miniupnpd maps nothing on one that does not, but for
// MapShared and MapRefused.
func (l *Lab) HardHome(ctx context.Context, name string, m PortMapping, carrier *Home) (*Home, error) {
	site := Site{NAT: Masquerade, Carrier: carrier}
	if l.opts.IPv6 {
		site.IPv6 = IPv6Firewall // in the rules of its own, too
	}
	h, err := l.HomeAt(ctx, name, site)
	if err != nil {
		return nil, err
	}
	h.mapping = m
	wan := h.WAN().As4()
	if m != MapShared && m != MapRefused {
		if err := h.SetWAN(ctx, netip.AddrFrom4([4]byte{44, 7, 7, wan[3]})); err != nil {
			return nil, fmt.Errorf("add home %s: %w", name, err)
		}
	}
	rule := ""
	if m == MapNATPMP {
		rule = dropPCP
	}
	var s script
	s.add("nft -f - <<'RULES'\nflush ruleset\n"+hardRules+"\nRULES", rule)
	if err := h.sh(ctx, s); err != nil {
		return nil, fmt.Errorf("add home %s: %w", name, err)
	}
	switch m {
	case MapNone:
	case MapShared:
		err = h.startPCP()
	default:
		err = h.StartMapper(ctx, m)
	}
	if err != nil {
		return nil, fmt.Errorf("add home %s: %w", name, err)
	}
	return h, nil
}

// StartMapper starts the daemon that maps ports, at first or after StopMapper.
func (h *Home) StartMapper(ctx context.Context, m PortMapping) error {
	config := filepath.Join(h.dir, "miniupnpd.conf")
	text := fmt.Sprintf(mapperConfig, m.switches(), h.lan)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the configuration of %s: %w", mapperProgram, err)
	}
	log, err := os.OpenFile(filepath.Join(h.dir, "miniupnpd.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("make the log of %s: %w", mapperProgram, err)
	}
	defer log.Close()
	p := &Process{
		cmd: h.command(context.WithoutCancel(ctx), mapperProgram, "-d", "-f", config, "-P", "/run/miniupnpd.pid"),
		log: log.Name(), done: make(chan struct{}),
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := h.lab.watch(p); err != nil {
		return fmt.Errorf("start %s: %w", mapperProgram, err)
	}
	h.mapper = p
	return h.awaitMapper(ctx)
}

// awaitMapper waits until the daemon says that it listens.
func (h *Home) awaitMapper(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, mapperStart)
	defer cancel()
	tick := time.NewTicker(mapperPoll)
	defer tick.Stop()
	for !strings.Contains(h.mapper.tail(), "istening") {
		select {
		case <-h.mapper.done:
			return fmt.Errorf("%s ended: %s", mapperProgram, h.mapper.tail())
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %s", mapperProgram, ctx.Err(), h.mapper.tail())
		case <-tick.C:
		}
	}
	return nil
}

// StopMapper ends the daemon as a power cut does: no mapping is left, and nobody
// is told.
func (h *Home) StopMapper(ctx context.Context) error {
	var s script
	for _, chain := range []string{"miniupnpd", "prerouting_miniupnpd", "postrouting_miniupnpd"} {
		s.add("nft flush chain inet filter %s", chain)
	}
	return errors.Join(h.mapper.Kill(), h.sh(ctx, s), h.Forget(ctx))
}

// Forget ends all flows through the router, but keeps mapped ports.
func (h *Home) Forget(ctx context.Context) error {
	var s script
	s.add("conntrack -F")
	return h.sh(ctx, s)
}

// MappedPorts gives the rules by which the router lets packets in.
func (h *Home) MappedPorts(ctx context.Context) ([]string, error) {
	return h.rulesOf(ctx, "prerouting_miniupnpd", "dnat")
}

// destination6 is how nft prints that miniupnpd compares the destination of an
// IPv6 packet: as so many bits of it.
const destination6 = "@nh,192,128"

// Pinholes gives the rules by which the firewall of IPv6 lets packets in.
func (h *Home) Pinholes(ctx context.Context) ([]string, error) {
	return h.rulesOf(ctx, "miniupnpd", destination6)
}

// rulesOf gives the rules of a chain of the daemon that have a word.
func (h *Home) rulesOf(ctx context.Context, chain, word string) ([]string, error) {
	out, err := h.command(ctx, "nft", "list", "chain", "inet", "filter", chain).Output()
	if err != nil {
		return nil, fmt.Errorf("list mapped ports: %w", err)
	}
	var list []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, word) {
			list = append(list, strings.TrimSpace(line))
		}
	}
	return list, nil
}
