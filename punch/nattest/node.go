package nattest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"overlay/punch"
)

// Node is a host with an agent and a data plane.
type Node struct {
	world   *World
	host    *Host
	private [32]byte
	key     punch.Key
	port    uint16
	audit   *audit

	// The rest is guarded by the world's mutex.
	agent     *punch.Agent // nil: not running
	access    Link
	nonce     punch.Nonce
	stop      func() // ends the agent and waits for it
	published []punch.Candidate
	session   []byte
	planted   []punch.Candidate
	peers     map[punch.Key]*traffic
	carried   time.Time // when the last message of the server arrives
	spare     []uint16  // open sockets beside the main one
}

// Start runs the node: it listens, gathers, and goes online at the server.
func (n *Node) Start() error {
	w := n.world
	var nonce, previous punch.Nonce
	w.random(nonce[:])
	w.random(previous[:])
	a, err := punch.New(punch.Config{
		PrivateKey:   n.private,
		Mesh:         w.mesh,
		Nonces:       [2]punch.Nonce{nonce, previous},
		Send:         n.sendPacket,
		Signal:       n.sendSignal,
		OnPath:       n.onPath,
		OnCandidates: n.publish,
		Activity:     n.activity,
		Forbidden:    w.forbidden,
		OpenSockets:  n.openSockets,
		CloseSockets: n.closeSockets,
	})
	if err != nil {
		return fmt.Errorf("make agent: %w", err)
	}
	w.mu.Lock()
	n.agent, n.nonce, n.published = a, nonce, nil
	n.stop = n.run(a)
	w.mu.Unlock()
	n.audit.attach(n.host.Addrs())
	n.host.Listen(n.port, n.receive)
	a.SetLocal(n.host.Addrs(), n.port)
	a.SetServers(n.openSession())
	n.announce()
	for _, peer := range w.peersOf(n) {
		if peer.running() {
			w.carry(peer, n, func() { n.learn(peer) })
		}
	}
	return nil
}

// run runs an agent until the function that it returns is called.
func (n *Node) run(a *punch.Agent) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := a.Run(ctx); err != nil {
			n.audit.report("run ended with " + err.Error())
		}
	})
	return func() {
		cancel()
		running.Wait()
	}
}

// Crash ends the node without a word; the server notices at once and tells the
// others that it is offline. Start starts it again.
func (n *Node) Crash() {
	w := n.world
	w.mu.Lock()
	stop := n.stop
	n.agent, n.stop = nil, nil
	w.mu.Unlock()
	if stop == nil {
		return
	}
	n.host.Listen(n.port, nil)
	stop()
	n.closeSockets(n.spareSockets())
	w.mu.Lock()
	for _, t := range n.peers {
		t.path = punch.Path{}
	}
	w.mu.Unlock()
	n.announce()
}

// Roam moves the node to another network, which it learns from the system a
// moment later.
func (n *Node) Roam(to *Network, access Link, addrs ...netip.Prefix) {
	n.host.Move(to, addrs...)
	n.world.mu.Lock()
	n.access = access
	n.world.mu.Unlock()
	n.audit.attach(addrs)
	const netlink = 5 * time.Millisecond
	n.world.After(netlink, func() {
		if a := n.current(); a != nil {
			a.SetLocal(addrs, n.port)
			a.NetworkChanged()
		}
	})
}

// Plant makes the node publish candidates that are not its own, as a hostile
// one may.
func (n *Node) Plant(c ...punch.Candidate) {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	n.planted = c
	for _, c := range c {
		n.world.planted[c.Addr] = true
	}
}

// Agent returns the node's agent, nil when it does not run.
func (n *Node) Agent() *punch.Agent { return n.current() }

// Checks returns how many packets the agent sent, those to servers excepted.
func (n *Node) Checks() uint64 {
	n.audit.mu.Lock()
	defer n.audit.mu.Unlock()
	return n.audit.checks
}

// Port returns the main UDP port.
func (n *Node) Port() uint16 { return n.port }

// Key returns the node's public key.
func (n *Node) Key() punch.Key { return n.key }

func (n *Node) current() *punch.Agent {
	n.world.mu.Lock()
	defer n.world.mu.Unlock()
	return n.agent
}

func (n *Node) running() bool { return n.current() != nil }

func (n *Node) openSession() []punch.Server {
	name, key := make([]byte, sessionNameLen), make([]byte, 32)
	n.world.random(name)
	n.world.random(key)
	n.world.STUN.Admit(name, key)
	n.world.mu.Lock()
	n.session = name
	n.world.mu.Unlock()
	var servers []punch.Server
	for _, addr := range n.world.servers {
		servers = append(servers, punch.Server{Addr: addr, Username: name, Key: key})
	}
	return servers
}

// publish tells the server the candidates that may be published: addresses that
// it saw itself, and global IPv6.
func (n *Node) publish(all []punch.Candidate) {
	n.name(all)
	n.world.mu.Lock()
	session := n.session
	n.published = slices.DeleteFunc(slices.Clone(all), func(c punch.Candidate) bool {
		if c.Type == punch.ServerReflexive {
			return !slices.Equal(c.Token, Token(session, c.Addr))
		}
		return !global(c.Addr.Addr()) || c.Addr.Addr().Is4()
	})
	for i := range n.published {
		n.published[i].Token = nil
	}
	n.world.mu.Unlock()
	n.announce()
}

// announce tells the other nodes of this one.
func (n *Node) announce() {
	for _, peer := range n.world.peersOf(n) {
		if peer.running() {
			n.world.carry(n, peer, func() { peer.learn(n) })
		}
	}
}

// learn takes what the netmap says of a peer.
func (n *Node) learn(peer *Node) {
	n.world.mu.Lock()
	a := n.agent
	p := punch.Peer{Key: peer.key, Nonce: peer.nonce, Online: peer.agent != nil}
	p.Candidates = slices.Concat(peer.published, peer.planted)
	n.world.mu.Unlock()
	if a != nil {
		a.SetPeer(p)
		n.useRelays(peer)
	}
}

func (n *Node) sendPacket(b []byte, to, from netip.AddrPort, ttl int) error {
	if relay, peer, ok := n.world.relayTo(to); ok {
		n.audit.relayed(b, to, ttl)
		return relay.forward(n, peer, b)
	}
	if !n.has(from) {
		n.audit.report("a packet leaves from a socket that is closed")
		return ErrUnreachable
	}
	named, observed := n.world.knows(to)
	n.audit.sent(b, to, sending{ttl: ttl, port: from.Port(), named: named, observed: observed})
	return n.host.Send(b, n.portOf(from), to, ttl)
}

func (n *Node) sendSignal(to punch.Key, sealed []byte) error {
	sealed = slices.Clone(sealed)
	if a := n.current(); a != nil {
		n.name(a.Candidates())
	}
	for _, peer := range n.world.peersOf(n) {
		if peer.key != to {
			continue
		}
		if n.world.signalsCut() {
			return ErrUnreachable
		}
		n.world.carry(n, peer, func() {
			a := peer.current()
			if a == nil {
				return
			}
			// A signal of before a restart is refused, and that is right.
			_ = a.HandleSignal(n.key, sealed)
		})
	}
	return nil
}
