package nattest

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/pion/stun/v2"
)

// The limits that hold for every agent until an address answers.
const (
	maxPerEndpoint = 20  // packets per second to one address and port of a peer
	maxPerAddress  = 100 // packets per second to one address
	maxFaults      = 10
	// consentExpiry is after how much silence an address that answered counts as
	// one that did not (RFC 7675 section 5.1).
	consentExpiry = 30 * time.Second
)

// audit holds what one agent sends against the law: where it must never send,
// how fast, and openers before full TTL. It does not know the exception that
// peers behind one public address try each other's private addresses.
type audit struct {
	servers   []netip.AddrPort
	forbidden func(netip.AddrPort) bool

	mu        sync.Mutex
	local     []netip.Prefix
	answered  map[netip.AddrPort]time.Time // when what answered once was last heard
	heard     map[netip.AddrPort]bool      // sent anything
	opened    map[netip.AddrPort]bool      // got an opener from us
	endpoints map[check][]time.Time
	addresses map[netip.Addr][]time.Time
	checks    uint64                  // packets to elsewhere than the servers
	spoken    map[spareKey]bool       // where something arrived from there
	met       map[netip.AddrPort]bool // sent anything, in any network
	hard      hardRounds
	faults    []string
}

// check is what a packet is counted under: the user name stands for the peer.
type check struct {
	to   netip.AddrPort
	user string
}

func checkOf(b []byte, to netip.AddrPort) check {
	m := &stun.Message{Raw: slices.Clone(b)}
	if m.Decode() != nil {
		return check{to: to}
	}
	user, err := m.Get(stun.AttrUsername)
	if err != nil {
		return check{to: to}
	}
	return check{to, string(user)}
}

func newAudit(servers []netip.AddrPort, forbidden func(netip.AddrPort) bool) *audit {
	return &audit{servers: servers, forbidden: forbidden, answered: map[netip.AddrPort]time.Time{}, spoken: map[spareKey]bool{}, met: map[netip.AddrPort]bool{}, hard: hardRounds{lonesome: map[spareKey][]time.Time{}}}
}

// attach begins anew in a network where the own addresses are local: its NAT
// has to be opened.
func (a *audit) attach(local []netip.Prefix) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.local = local
	a.heard = map[netip.AddrPort]bool{}
	a.opened = map[netip.AddrPort]bool{}
	a.endpoints = map[check][]time.Time{}
	a.addresses = map[netip.Addr][]time.Time{}
}

func (a *audit) received(b []byte, from netip.AddrPort, port uint16) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.spoken[spareKey{port, from}] = true
	a.heard[from], a.met[from] = true, true
	if _, once := a.answered[from]; once || messageType(b) == stun.BindingSuccess {
		a.answered[from] = time.Now()
	}
}

// sending is what is known of a packet beside its bytes.
type sending struct {
	ttl             int
	port            uint16 // spare socket; 0: the main one
	named, observed bool   // the address is published, its IP address seen by the server
}

// sent judges one packet of the agent.
func (a *audit) sent(b []byte, to netip.AddrPort, how sending) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.Contains(a.servers, to) {
		a.sentToServer(b, to)
		return
	}
	a.checks++
	if unprobable(to) || a.broadcast(to.Addr()) || a.forbidden(to) {
		a.fault("packet to forbidden address %s", to)
	}
	if !global(to.Addr()) && !a.onLink(to.Addr()) {
		a.fault("packet to private address %s, which is not on-link", to)
	}
	if a.ofRound(to, how) {
		a.sentInRound(to, how, time.Now())
		return
	}
	if how.ttl != 0 {
		a.opened[to] = true
	} else if global(to.Addr()) && !a.onLink(to.Addr()) && !a.opened[to] && !a.heard[to] && messageType(b) == stun.BindingRequest {
		a.fault("full TTL to %s before an opener", to)
	}
	now := time.Now()
	if now.Sub(a.answered[to]) < consentExpiry {
		return
	}
	if n := count(a.endpoints, checkOf(b, to), now); n > maxPerEndpoint {
		a.fault("%d packets within a second to %s, which is silent", n, to)
	}
	if n := count(a.addresses, to.Addr(), now); n > maxPerAddress {
		a.fault("%d packets within a second to %s", n, to.Addr())
	}
}

// sentToServer judges a packet to a STUN server: only Binding requests with
// the server's session go there, never checks of a candidate.
func (a *audit) sentToServer(b []byte, to netip.AddrPort) {
	m := &stun.Message{Raw: slices.Clone(b)}
	if m.Decode() != nil || m.Type != stun.BindingRequest {
		a.fault("packet to server %s is no Binding request", to)
		return
	}
	if name, err := m.Get(stun.AttrUsername); err != nil || len(name) != sessionNameLen {
		a.fault("check sent to server %s", to)
	}
	if n := count(a.endpoints, checkOf(b, to), time.Now()); n > maxPerEndpoint && a.answered[to].IsZero() {
		a.fault("%d packets within a second to server %s, which is silent", n, to)
	}
}

// relayed judges a packet for a relay. It opens no NAT.
func (a *audit) relayed(b []byte, to netip.AddrPort, ttl int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ttl != 0 {
		a.fault("opener to relay %s", to)
	}
	if time.Since(a.answered[to]) < consentExpiry {
		return
	}
	if n := count(a.endpoints, checkOf(b, to), time.Now()); n > maxPerEndpoint {
		a.fault("%d packets within a second over relay %s, which is silent", n, to)
	}
}

// report adds a fault that is not about a packet.
func (a *audit) report(text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fault("%s", text)
}

func (a *audit) broken() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.faults)
}

func (a *audit) fault(format string, args ...any) {
	if len(a.faults) < maxFaults {
		a.faults = append(a.faults, fmt.Sprintf(format, args...))
	}
}

// count adds a packet at now and returns how many were sent in the last second.
func count[K comparable](sent map[K][]time.Time, to K, now time.Time) int {
	kept := slices.DeleteFunc(sent[to], func(at time.Time) bool { return now.Sub(at) >= time.Second })
	sent[to] = append(kept, now)
	return len(sent[to])
}

func messageType(b []byte) stun.MessageType {
	m := &stun.Message{Raw: slices.Clone(b)}
	if m.Decode() != nil {
		return stun.MessageType{}
	}
	return m.Type
}

// unprobable says that nothing may ever be sent there.
func unprobable(ap netip.AddrPort) bool {
	a := ap.Addr()
	reserved := a.Is4() && a.As4()[0] >= 240 || a.IsLinkLocalUnicast() && a.Zone() == ""
	return ap.Port() == 0 || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || reserved
}

func (a *audit) onLink(addr netip.Addr) bool {
	return slices.ContainsFunc(a.local, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// broadcast says that addr is the last one of an own IPv4 subnet.
func (a *audit) broadcast(addr netip.Addr) bool {
	return slices.ContainsFunc(a.local, func(p netip.Prefix) bool {
		return addr.Is4() && p.Bits() < 31 && p.Contains(addr) && !p.Contains(addr.Next())
	})
}

// global says that an address is reached across the Internet, if at all.
func global(a netip.Addr) bool {
	carrier := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64}), 10)
	return !a.IsPrivate() && !a.IsLinkLocalUnicast() && !carrier.Contains(a)
}
