package natlab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
)

// cuts makes the table of nftables in the core that Cut fills.
type cuts struct {
	once sync.Once
	err  error
}

// The sets hold addresses in pairs and addresses without UDP.
const cutRules = `nft -f - <<'RULES'
table ip cut {
	set pairs { type ipv4_addr . ipv4_addr; }
	set mute { type ipv4_addr; }
	chain fw {
		type filter hook forward priority 0;
		ip saddr . ip daddr @pairs drop
		meta l4proto udp ip saddr @mute drop
		meta l4proto udp ip daddr @mute drop
	}
}
RULES`

func (l *Lab) cutTable(ctx context.Context) error {
	l.cuts.once.Do(func() {
		var s script
		s.add(cutRules)
		l.cuts.err = l.core.sh(ctx, s)
	})
	return l.cuts.err
}

// Cut lets no packet pass between two public addresses, in either direction;
// both reach everybody else as before. Two homes are cut by their WAN
// addresses, laptops of a Public home by their own.
func (l *Lab) Cut(ctx context.Context, a, b netip.Addr) error {
	if err := l.cutTable(ctx); err != nil {
		return err
	}
	var s script
	s.add("nft add element ip cut pairs '{ %s . %s, %s . %s }'", a, b, b, a)
	return l.core.sh(ctx, s)
}

// Uncut undoes Cut.
func (l *Lab) Uncut(ctx context.Context, a, b netip.Addr) error {
	var s script
	s.add("nft delete element ip cut pairs '{ %s . %s, %s . %s }'", a, b, b, a)
	return l.core.sh(ctx, s)
}

// BlockUDP lets no UDP pass to or from a public address.
func (l *Lab) BlockUDP(ctx context.Context, addr netip.Addr) error {
	if err := l.cutTable(ctx); err != nil {
		return err
	}
	var s script
	s.add("nft add element ip cut mute '{ %s }'", addr)
	return l.core.sh(ctx, s)
}

// maxLegs bounds the tables of routes that legs take.
const maxLegs = 100

// StartLeg puts one more delay line between the Internet and a server, so that
// it lies farther away than the others, or behind a worse line. The lab must
// have been made with a delay. Close of what it returns ends the line, which
// cuts the server off, and must come before that of the lab.
func (l *Lab) StartLeg(ctx context.Context, server *Host, line Line) (*DelayLine, error) {
	if l.opts.Delay <= 0 || server.home != nil {
		return nil, errors.New("a leg needs a lab with a delay, and a server")
	}
	l.mu.Lock()
	l.legs++
	index := l.legs
	l.mu.Unlock()
	if index > maxLegs {
		return nil, fmt.Errorf("leg %d of a lab is one too many", index)
	}
	device, table := fmt.Sprintf("leg%d", index), delayTable+index
	d, err := l.startLine(ctx, device, line)
	if err != nil {
		return nil, err
	}
	s := lineSetup(device, table)
	// What comes from the server crosses the leg and then the Internet, what
	// goes to it the other way round.
	s.add("ip rule add iif %s lookup %d", server.port, table)
	s.add("ip rule add iif %s from %s lookup %d", device, server.Addr(), delayTable)
	s.add("ip rule add iif %s to %s lookup %d", delayDevice, server.Addr(), table)
	if err := l.core.sh(ctx, s); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}
