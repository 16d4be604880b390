package punch

import (
	"net/netip"
	"testing"
	"time"
)

// crashAgent is an agent with one peer, driven by hand.
func crashAgent(t *testing.T) (*Agent, *peer) {
	t.Helper()
	var priv [32]byte
	priv[0], priv[5] = 8, 7
	a, err := New(Config{
		PrivateKey: priv, Send: func([]byte, netip.AddrPort, netip.AddrPort, int) error { return nil },
		Signal:      func(Key, []byte) error { return nil },
		OpenSockets: func(n int) ([]uint16, error) { return make([]uint16, n), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	var other [32]byte
	other[0], other[9] = 16, 3
	k, _ := PublicKey(other)
	a.SetPeer(Peer{Key: k, Online: true})
	return a, a.peers[k]
}

// The peer leaves the address that a round is about while the round is prepared.
func TestRoundOutlivesItsAddress(t *testing.T) {
	a, p := crashAgent(t)
	now := time.Now()
	at := netip.MustParseAddrPort("203.0.113.9:4000")
	mine := side{nat: NAT{Mapping: AddressAndPortDependent, Allocation: Random}, addr: netip.MustParseAddrPort("198.51.100.7:999")}
	p.meeting.mine = mine
	p.meeting.theirs = side{nat: NAT{Mapping: EndpointIndependent}, addr: at}
	plan, ok := planFor(mine, p.meeting.theirs, 0)
	if !ok {
		t.Fatal("no plan")
	}
	a.begin(p, plan, now)
	a.hard.open = nil
	a.runRound(now) // wants sockets
	a.handleSignal(p, &signal{kind: signalCall, candidates: []Candidate{{Addr: netip.MustParseAddrPort("192.0.2.1:5"), Type: ServerReflexive}}}, now)
	for i := range 257 {
		a.hard.open = append(a.hard.open, uint16(20000+i))
	}
	a.hard.round.next = now
	a.runRound(now)
	if a.hard.round != nil {
		t.Error("the round goes on")
	}
}

// A server says that an IPv4 socket was seen at an IPv6 address.
func TestBaseOfAnotherFamily(t *testing.T) {
	a, p := crashAgent(t)
	now := time.Now()
	mine := side{nat: NAT{Mapping: AddressAndPortDependent, Allocation: Sequential, Step: 1}, addr: netip.MustParseAddrPort("198.51.100.7:999")}
	p.meeting.mine = mine
	p.meeting.theirs = side{nat: NAT{Mapping: EndpointIndependent}, addr: netip.MustParseAddrPort("203.0.113.9:4000")}
	plan, _ := planFor(mine, p.meeting.theirs, 0)
	a.begin(p, plan, now)
	r := a.hard.round
	r.ports = []uint16{1, 2, 3, 4, 5, 6, 7, 8, 9}
	a.based([]Sample{{Local: 9, Mapped: netip.MustParseAddrPort("[2001:db8::1]:7"), At: now}}, now)
	if a.hard.round != nil {
		t.Error("the round goes on")
	}
}

// All spare sockets are paths already.
func TestNoSocketsLeft(t *testing.T) {
	a, p := crashAgent(t)
	now := time.Now()
	for i := range 256 {
		a.hard.open = append(a.hard.open, uint16(20000+i))
		if len(p.pairs) <= i {
			p.pairs = append(p.pairs, &pair{addr: netip.MustParseAddrPort("203.0.113.9:1"), local: socket(uint16(20000 + i)), valid: true})
		}
	}
	mine := side{nat: NAT{Mapping: AddressAndPortDependent, Allocation: Sequential, Step: 1}, addr: netip.MustParseAddrPort("198.51.100.7:999")}
	p.meeting.mine = mine
	p.meeting.theirs = side{nat: NAT{Mapping: EndpointIndependent}, addr: netip.MustParseAddrPort("203.0.113.9:4000")}
	plan, _ := planFor(mine, p.meeting.theirs, 0)
	a.begin(p, plan, now)
	a.runRound(now)
	if a.hard.round != nil {
		t.Error("the round goes on")
	}
}

// TestRoundWaitsForTheSignal has a round begin only when the peer was told, which
// may have to wait: so many signals a second are sent.
func TestRoundWaitsForTheSignal(t *testing.T) {
	a, p := crashAgent(t)
	now := time.Now()
	for p.talk.take(now, signalRate) {
	}
	mine := side{nat: NAT{Mapping: AddressAndPortDependent, Allocation: Random}, addr: netip.MustParseAddrPort("198.51.100.7:999")}
	theirs := side{nat: NAT{Mapping: EndpointIndependent}, addr: netip.MustParseAddrPort("203.0.113.9:4000")}
	p.meeting.mine, p.meeting.theirs = mine, theirs
	plan, ok := planFor(mine, theirs, 0)
	if !ok {
		t.Fatal("no plan")
	}
	plan.starts = true
	a.begin(p, plan, now)
	for i := range plan.sockets + 1 {
		a.hard.open = append(a.hard.open, uint16(20000+i))
	}
	a.runRound(now)
	r := a.hard.round
	if r == nil || r.stage != preparing || len(a.effects) > 0 || len(a.sends) > 0 {
		t.Fatalf("began without a word: %d sent", len(a.sends))
	}
	if wait := r.next.Sub(now); wait <= 0 || wait > time.Second {
		t.Fatalf("looked at again in %v", wait)
	}
	a.runRound(r.next)
	if a.hard.round != r || r.stage != running || len(a.effects) == 0 {
		t.Error("not begun when there was room")
	}
}

// TestFreshWaitsForTheSignal has nothing opened for a fresh socket of the peer
// before there is room to tell it so.
func TestFreshWaitsForTheSignal(t *testing.T) {
	a, p := crashAgent(t)
	now := time.Now()
	theirs := netip.MustParseAddrPort("203.0.113.9:4000")
	a.hard.fresh = fresh{port: 20001, since: now, mapped: netip.MustParseAddrPort("198.51.100.7:999")}
	a.servers = []*server{{fresh: true, mapped: netip.MustParseAddrPort("198.51.100.7:998")}}
	a.SetPeer(Peer{Key: p.key, Online: true, Candidates: []Candidate{{Addr: theirs, Type: ServerReflexive}}})
	a.sends, a.effects = nil, nil
	for p.talk.take(now, signalRate) {
	}
	p.fresh.asked, p.fresh.theirs = now, theirs
	a.agreeFresh(p, now)
	if p.fresh.asked.IsZero() || len(a.sends) > 0 {
		t.Fatalf("answered without a word: %d sent", len(a.sends))
	}
	next := a.freshNext(p, now)
	if wait := next.Sub(now); wait <= 0 || wait > time.Second {
		t.Fatalf("looked at again in %v", wait)
	}
	a.agreeFresh(p, next)
	if !p.fresh.asked.IsZero() || len(a.sends) == 0 || len(a.effects) == 0 {
		t.Errorf("not answered when there was room: %d sent, %d effects", len(a.sends), len(a.effects))
	}
}
