package relay

import (
	"net/netip"
	"time"

	"overlay/punch"
)

const (
	refreshFlow   = 2 * time.Minute // of an open flow, which idle expires at the relay
	minAbsent     = 500 * time.Millisecond
	maxAbsent     = 30 * time.Second
	minOpenRetry  = 250 * time.Millisecond
	openWindow    = 4 // OPENs that await an answer
	openForgotten = time.Second
)

// peerFlow is what the client knows of the flow with a peer.
type peerFlow struct {
	known  bool // the relay has said
	here   bool // the peer is at the relay
	tries  int  // OPENs without answer
	absent int  // answers in a row that it is not here
	next   time.Time
}

// SetPeers replaces the peers to which flows are wanted. Those to new ones are
// opened at once.
func (c *Client) SetPeers(peers []punch.Key) {
	c.mu.Lock()
	old := c.flows
	c.flows = make(map[punch.Key]*peerFlow, len(peers))
	now := time.Now()
	for _, k := range peers {
		if c.flows[k] = old[k]; old[k] == nil {
			c.flows[k] = &peerFlow{next: now}
		}
	}
	c.mu.Unlock()
	c.poke()
}

// reopen opens all flows anew: the relay may have forgotten them.
func (c *Client) reopen() {
	for _, f := range c.flows {
		f.tries, f.absent, f.next = 0, 0, c.now
	}
}

// stepFlows opens what is due.
func (c *Client) stepFlows() {
	if c.active == None || c.active == TLS && c.tls.link == nil {
		return
	}
	waiting := 0
	for _, r := range c.sent {
		if r.kind == kindOpen && c.now.Sub(r.at) < openForgotten {
			waiting++
		}
	}
	var due []punch.Key
	for k, f := range c.flows {
		if !c.due(f.next) {
			continue
		}
		if waiting == openWindow {
			c.due(c.now.Add(openForgotten))
			break
		}
		if due = append(due, k); len(due) == maxOpen {
			c.sendOpen(due)
			due = nil
			waiting++
		}
	}
	if len(due) > 0 {
		c.sendOpen(due)
	}
}

func (c *Client) sendOpen(peers []punch.Key) {
	r := request{kind: kindOpen, peers: peers, to: c.udp.addr}
	rtt := c.udp.rtt
	if c.active == TLS {
		r.to, r.link = netip.AddrPort{}, c.tls.link
		rtt = c.tls.rtt
	}
	o := open{id: c.session.id, seq: c.record(&r), peers: peers}
	c.send(&r, o.build(&c.session))
	for _, k := range peers {
		f := c.flows[k]
		f.next = c.now.Add(jitter(min(max(2*rtt, minOpenRetry)<<min(f.tries, 10), maxAbsent)))
		f.tries++
		c.due(f.next)
	}
}

// opened takes an OPENED: which of the peers of an OPEN are here.
func (c *Client) opened(r *request, m opened) bool {
	if r == nil || m.count != len(r.peers) {
		return false
	}
	peers := r.peers
	c.forget(r)
	for i, k := range peers {
		f := c.flows[k]
		if f == nil {
			continue
		}
		f.tries = 0
		here := m.bitmap>>i&1 == 1
		if here {
			f.absent, f.next = 0, c.now.Add(jitter(refreshFlow))
		} else {
			f.next = c.now.Add(jitter(min(minAbsent<<min(f.absent, 16), maxAbsent)))
			f.absent++
		}
		if here != f.here || !f.known {
			f.here, f.known = here, true
			c.actions = append(c.actions, func() { c.cfg.OnPeer(k, here) })
		}
	}
	return true
}
