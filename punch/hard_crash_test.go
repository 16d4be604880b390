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
