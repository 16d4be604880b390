package nattest

import (
	"crypto/ecdh"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"overlay/punch"
)

const (
	sessionNameLen = 16
	// rto is how long TCP, which carries signals and the netmap, takes at least to
	// send a lost segment again.
	rto = 200 * time.Millisecond
)

// World is an Internet with a coordination server and nodes that run a
// punch.Agent each. It carries what the real server carries, the netmap and the
// sealed signals, and a tiny data plane that follows the agents' paths.
type World struct {
	*Net
	STUN    *STUNServer
	servers []netip.AddrPort
	link    Link // of the server
	mesh    [32]byte

	mu      sync.Mutex
	chance  *rand.Rand
	nodes   []*Node
	relays  []*Relay
	named   map[netip.AddrPort]bool // ever published by whom the server saw there
	planted map[netip.AddrPort]bool // published by a liar
	cut     bool                    // signals and netmap are not carried
}

// NewWorld returns a world whose server is attached by l and has an IPv4 and an
// IPv6 address with two STUN ports each.
func NewWorld(seed uint64, l Link) *World {
	w := &World{Net: New(seed), link: l, chance: rand.New(rand.NewPCG(seed, 0x776f726c64))}
	w.named, w.planted = map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{}
	addrs := []netip.Prefix{netip.MustParsePrefix("198.51.100.1/32"), netip.MustParsePrefix("2001:db8:ffff::1/128")}
	const stunPort, nextPort = 3478, 3479
	host := w.Internet().NewHost(l, addrs...)
	w.STUN = ServeSTUN(host, stunPort, nextPort)
	for _, a := range addrs {
		w.servers = append(w.servers, netip.AddrPortFrom(a.Addr(), stunPort), netip.AddrPortFrom(a.Addr(), nextPort))
	}
	w.random(w.mesh[:])
	return w
}

// NewNode adds a node with one UDP port on h. Its signals take the delay and
// suffer from the loss of access, the link that joins it to the Internet.
func (w *World) NewNode(h *Host, access Link) *Node {
	n := &Node{world: w, host: h, access: access}
	w.random(n.private[:])
	private, err := ecdh.X25519().NewPrivateKey(n.private[:])
	if err != nil {
		panic(fmt.Sprintf("make key: %v", err)) // 32 bytes are always a key
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	copy(n.key[:], private.PublicKey().Bytes())
	n.port = uint16(firstPort + w.chance.IntN(1<<16-firstPort))
	n.peers = map[punch.Key]*traffic{}
	n.audit = newAudit(w.servers, inMesh)
	w.nodes = append(w.nodes, n)
	return n
}

// CutSignals stops the server's carriage of netmap and signals; with false it
// comes back and every node publishes again.
func (w *World) CutSignals(cut bool) {
	w.mu.Lock()
	w.cut = cut
	nodes := slices.Clone(w.nodes)
	w.mu.Unlock()
	if cut {
		return
	}
	for _, n := range nodes {
		if n.running() {
			n.announce()
		}
	}
}

// RestartServer ends all STUN sessions; after d every node has a new one.
func (w *World) RestartServer(d time.Duration) {
	w.STUN.Restart()
	w.After(d, func() {
		w.mu.Lock()
		nodes := slices.Clone(w.nodes)
		w.mu.Unlock()
		for _, n := range nodes {
			if a := n.current(); a != nil {
				a.SetServers(n.openSession())
			}
		}
	})
}

// Stop ends all agents and waits for them. A synctest bubble needs it.
func (w *World) Stop() {
	w.mu.Lock()
	nodes := slices.Clone(w.nodes)
	w.mu.Unlock()
	for _, n := range nodes {
		n.Crash()
	}
}

// Faults returns the laws that agents broke, in words.
func (w *World) Faults() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var faults []string
	for i, n := range w.nodes {
		for _, f := range n.audit.broken() {
			faults = append(faults, fmt.Sprintf("node %d: %s", i, f))
		}
	}
	return faults
}

// forbidden is what the nodes tell their agents never to probe.
func (w *World) forbidden(ap netip.AddrPort) bool {
	return inMesh(ap) || slices.Contains(w.servers, ap)
}

func inMesh(ap netip.AddrPort) bool {
	mesh := []netip.Prefix{netip.MustParsePrefix("100.100.0.0/16"), inMeshPrefix()}
	return slices.ContainsFunc(mesh, func(p netip.Prefix) bool { return p.Contains(ap.Addr()) })
}

func inMeshPrefix() netip.Prefix { return netip.MustParsePrefix("fd00:aa::/48") }

func (w *World) signalsCut() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut
}

func (w *World) random(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range b {
		b[i] = byte(w.chance.Uint32())
	}
}

// carry brings something from one node to another through the server, in order
// and without loss, as a TCP connection does: loss only delays.
func (w *World) carry(from, to *Node, f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut {
		return
	}
	var d time.Duration
	for _, l := range []Link{from.access, w.link, w.link, to.access} {
		d += l.Delay
		if w.chance.Float64() < l.Loss {
			d += rto + 2*(l.Delay+w.link.Delay)
		}
	}
	at := time.Now().Add(d)
	if at.Before(to.carried) {
		at = to.carried
	}
	to.carried = at
	w.After(time.Until(at), f)
}

// peersOf returns the other nodes.
func (w *World) peersOf(n *Node) []*Node {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(w.nodes), func(o *Node) bool { return o == n })
}
