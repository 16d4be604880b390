package natlab

import (
	"context"
	"fmt"
	"net/netip"
)

// dropTooBig drops what would tell a sender that its packets are too large.
const dropTooBig = `nft -f - <<'RULES'
table inet hole {
	chain out {
		type filter hook output priority 0;
		icmp type destination-unreachable drop
		icmpv6 type packet-too-big drop
	}
	chain fw {
		type filter hook forward priority 0;
		icmp type destination-unreachable drop
		icmpv6 type packet-too-big drop
	}
}
RULES`

// BlackHole lets the line between the home and the Internet pass no packet larger
// than mtu, in either direction, without a word to who sent it: ICMP is dropped,
// as many firewalls do.
func (h *Home) BlackHole(ctx context.Context, mtu int) error {
	if err := h.setMTU(ctx, mtu, dropTooBig); err != nil {
		return fmt.Errorf("make a black hole before home %s: %w", h.name, err)
	}
	return nil
}

// Heal undoes BlackHole.
func (h *Home) Heal(ctx context.Context) error {
	const ethernet = 1500
	if err := h.setMTU(ctx, ethernet, "nft delete table inet hole"); err != nil {
		return fmt.Errorf("heal the line of home %s: %w", h.name, err)
	}
	return nil
}

// setMTU changes the MTU of both ends of the line and runs a command at both.
func (h *Home) setMTU(ctx context.Context, mtu int, command string) error {
	for _, end := range []struct {
		node *node
		port string
	}{{h.node, wanDevice}, {h.lab.core, h.port}} {
		var s script
		s.add("ip link set %s mtu %d", end.port, mtu)
		s.add("%s", command)
		if err := end.node.sh(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// Lose has a share of the packets between two public addresses vanish in the
// Internet, in percent and in each direction; 0 heals. Others reach both as before.
// One pair of a lab may be so.
func (l *Lab) Lose(ctx context.Context, a, b netip.Addr, percent int) error {
	var s script
	s.add("nft delete table ip lossy 2>/dev/null || true")
	if percent > 0 {
		// A packet crosses the core once more after the delay line.
		s.add("nft -f - <<'RULES'\ntable ip lossy {\nchain fw {\ntype filter hook forward priority 0;")
		for _, way := range [][2]netip.Addr{{a, b}, {b, a}} {
			s.add("iifname \"port*\" ip saddr %s ip daddr %s numgen random mod 100 < %d drop", way[0], way[1], percent)
		}
		s.add("}\n}\nRULES")
	}
	return l.core.sh(ctx, s)
}
