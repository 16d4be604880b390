package tun

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of what is remembered for one peer.
const (
	maxEndpoints = 8  // paths and handles, newest last
	maxIndices   = 64 // session indices: a session lives 180 s, initiations are 5 s apart
	lastPort     = relayedPort - 1
)

// silence is how long a peer was not sent to when sending again is news.
const silence = time.Second

// peer is what the TUN and the Bind share about one peer. It stays the same
// object as long as the peer is in the netmap.
type peer struct {
	key      Key
	initiate atomic.Bool // this side starts handshakes
	pathed   atomic.Bool // the endpoint in use is a path, not a handle that drops
	direct   atomic.Bool // and one without a relay
	met      atomic.Bool // there was a session
	large    atomic.Bool // takes large messages, and this side may send them

	also atomic.Pointer[endpoint] // where everything is sent, too; nil: nowhere

	trip atomic.Int64 // round trip of the path, ns; 0: not known

	inner4 atomic.Pointer[netip.Addr] // its overlay IPv4, for containers; nil: none
	level  leveler                    // size of messages to it
	meter  meter                      // losses of messages from it

	sent     atomic.Uint64 // packets with content given to a socket
	received atomic.Uint64 // packets written to the TUN
	lost     atomic.Uint64 // messages to it that it misses
	lastSent atomic.Int64  // since the Bind was made, ns; 0: never
	demanded atomic.Int64  // since the Bind was made, ns; 0: never
	unknown  atomic.Int64  // when Config.SessionUnknown was told, as lastSent
	answered atomic.Int64  // when a handshake was, as lastSent
	tries    atomic.Int32  // initiations to it without an answer
	asked    atomic.Int64  // when it was asked to begin instead, as lastSent

	out, in account // messages inside wireguard-go

	// Guarded by writer.mu.
	told  uint32 // how many messages it ever missed
	heard bool   // told is set

	// Guarded by peers.mu.
	endpoints []*endpoint
	ways      []*endpoint // through relays
	current   *endpoint   // in use
	indices   []uint32
	home      netip.Addr // of handles: its overlay IPv6
	port      uint16     // of the handle last made
}

// peers finds a peer by its key, its inner address, the address of a path or
// handle, the header of a flow, and by the session indices this side handed out.
// Safe for concurrent use.
type peers struct {
	large bool // this side sends large messages

	mu      sync.RWMutex
	keys    map[Key]*peer
	inner   map[netip.Addr]*peer
	paths   map[netip.AddrPort]*endpoint // and handles; of spare sockets they are in those
	named   *endpoint                    // the path registered last
	spares  map[uint16]*spare            // by port
	pool    *pool                        // receives from those; nil: closed
	indices map[uint32]*peer
	flows   map[uint64][]*endpoint       // by header; one for each relay
	relays  map[uint16]*relay            // by number
	ports   map[netip.AddrPort]*endpoint // of relays
}

func newPeers() *peers {
	return &peers{
		keys:    make(map[Key]*peer),
		inner:   make(map[netip.Addr]*peer),
		paths:   make(map[netip.AddrPort]*endpoint),
		spares:  make(map[uint16]*spare),
		indices: make(map[uint32]*peer),
		flows:   make(map[uint64][]*endpoint),
		relays:  make(map[uint16]*relay),
		ports:   make(map[netip.AddrPort]*endpoint),
	}
}

// set makes the table hold exactly list. Peers that stay keep their object,
// counters and endpoints.
func (t *peers) set(list []Peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	keep := make(map[Key]*peer, len(list))
	clear(t.inner)
	for _, want := range list {
		p := t.keys[want.Key]
		if p == nil {
			p = &peer{key: want.Key}
		}
		p.initiate.Store(want.Initiate)
		p.home = want.Handle
		keep[want.Key] = p
		p.large.Store(t.large && want.Capabilities&Large != 0)
		p.inner4.Store(nil)
		for _, a := range want.AllowedIPs {
			if a.IsSingleIP() {
				t.inner[a.Addr()] = p
				if one := a.Addr(); one.Is4() {
					p.inner4.Store(&one)
				}
			}
		}
	}
	for k, p := range t.keys {
		if keep[k] == nil {
			t.forget(p)
		}
	}
	t.keys = keep
}

// forget drops what points to p. Call with mu held.
func (t *peers) forget(p *peer) {
	for _, e := range p.endpoints {
		t.unlist(e)
	}
	for _, i := range p.indices {
		t.release(i, p)
	}
	for _, e := range p.ways {
		t.block(e)
	}
	p.endpoints, p.ways, p.indices, p.current = nil, nil, nil, nil
	p.also.Store(nil)
}

func (t *peers) unlist(e *endpoint) {
	if t.named == e {
		t.named = nil
	}
	if paths := t.table(e.spare); paths[e.to] == e {
		delete(paths, e.to)
		t.leave(e.spare)
	}
}

func (t *peers) release(index uint32, p *peer) {
	if t.indices[index] == p {
		delete(t.indices, index)
	}
}

// byKey returns nil for a stranger.
func (t *peers) byKey(k Key) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.keys[k]
}

// byAddr returns nil when no peer has that inner address.
func (t *peers) byAddr(a netip.Addr) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.inner[a]
}

// byIndex returns nil when this side handed out no such session index.
func (t *peers) byIndex(index uint32) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.indices[index]
}

// at returns the endpoint of a path or handle, nil when there is none. Of paths
// over several local ports it is the one registered last.
func (t *peers) at(a netip.AddrPort) *endpoint {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.named != nil && t.named.to == a {
		return t.named
	}
	return t.paths[a]
}

// learn remembers a session index this side gave to p.
func (t *peers) learn(index uint32, p *peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.indices[index] == p || t.keys[p.key] != p {
		return
	}
	if len(p.indices) == maxIndices {
		t.release(p.indices[0], p)
		p.indices = slices.Delete(p.indices, 0, 1)
	}
	p.indices = append(p.indices, index)
	t.indices[index] = p
}

// path registers an address as a path of k over a local port, 0 for the main one,
// and returns its endpoint: the one there is, when it already was the peer's. A
// stranger gets nil, and so does who names a port that is closed.
func (t *peers) path(k Key, to netip.AddrPort, port uint16) *endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, s := t.keys[k], t.spares[port]
	if p == nil || s == nil && port != 0 {
		return nil
	}
	e := t.table(s)[to]
	if e == nil || e.peer != p {
		e = newEndpoint(to, p)
		e.spare = s
	}
	if p.use(e) {
		t.list(p, e)
	}
	t.named = e
	return e
}

// use makes e the path of p, and reports whether it was not. Call with peers.mu
// held.
func (p *peer) use(e *endpoint) bool {
	p.direct.Store(e.relay == nil)
	p.pathed.Store(true)
	if p.current == e {
		return false
	}
	p.current = e
	p.level.reset()
	return true
}

// handle makes a dropping endpoint for k at a, with the peer's next port. A
// stranger gets nil.
func (t *peers) handle(k Key, a netip.Addr) *endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.keys[k]
	if p == nil {
		return nil
	}
	p.pathed.Store(false)
	p.direct.Store(false)
	if p.port == lastPort {
		p.port = 0
	}
	p.port++
	e := newEndpoint(netip.AddrPortFrom(a, p.port), p)
	e.drop = true
	p.current = e
	t.list(p, e)
	return e
}

// list interns e as the newest endpoint of p. Call with mu held.
func (t *peers) list(p *peer, e *endpoint) {
	t.table(e.spare)[e.to] = e // first, or its socket might be left
	p.endpoints = slices.DeleteFunc(p.endpoints, func(old *endpoint) bool { return old.to == e.to && old.spare == e.spare })
	if len(p.endpoints) == maxEndpoints {
		t.unlist(p.endpoints[0])
		p.endpoints = slices.Delete(p.endpoints, 0, 1)
	}
	p.endpoints = append(p.endpoints, e)
}

// clearSources forgets from which local addresses paths are used.
func (t *peers) clearSources() {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range t.keys {
		for _, e := range p.endpoints {
			e.pin(netip.Addr{})
		}
	}
}

// innerAddrs returns source and destination of an IP packet, invalid ones when
// it is not one.
func innerAddrs(p []byte) (src, dst netip.Addr) {
	switch {
	case len(p) >= ipv4HeaderSize && p[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	case len(p) >= ipv6HeaderSize && p[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	}
	return netip.Addr{}, netip.Addr{}
}

// ipHeader sizes without options.
const (
	ipv4HeaderSize = 20
	ipv6HeaderSize = 40
)

func be16(b []byte) int { return int(binary.BigEndian.Uint16(b)) }
