package punch

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// sides are of all kinds, at different addresses.
func sides(ip string) map[string]side {
	addr := netip.AddrPortFrom(netip.MustParseAddr(ip), 40000)
	hard := AddressAndPortDependent
	return map[string]side{
		"easy":       {nat: NAT{Mapping: EndpointIndependent}, addr: addr},
		"sequential": {nat: NAT{Mapping: hard, Allocation: Sequential, Step: -2}, addr: addr, churn: 60},
		"busy":       {nat: NAT{Mapping: hard, Allocation: Sequential, Step: 1}, addr: addr, churn: 65535},
		"block":      {nat: NAT{Mapping: hard, Allocation: Block, Low: 2048, High: 3071}, addr: addr},
		"tiny":       {nat: NAT{Mapping: hard, Allocation: Block, Low: 2048, High: 2060}, addr: addr},
		"random":     {nat: NAT{Mapping: hard, Allocation: Random}, addr: addr},
		"unknown":    {nat: NAT{Mapping: hard}, addr: addr},
		"preserving": {nat: NAT{Mapping: hard, Allocation: Preserving}, addr: addr},
	}
}

// TestPlanLimits holds every plan against the limits of hard rounds.
func TestPlanLimits(t *testing.T) {
	for x, mine := range sides("203.0.113.1") {
		for y, theirs := range sides("203.0.113.2") {
			p, ok := planFor(mine, theirs, 0)
			_, back := planFor(theirs, mine, 0)
			if ok != back {
				t.Errorf("%s × %s: %v one way, %v the other", x, y, ok, back)
			}
			if !ok {
				continue
			}
			r := round{plan: p}
			ports := map[uint16]bool{}
			for _, to := range p.targets {
				ports[to.Port()] = true
				if to.Addr() != theirs.addr.Addr() {
					t.Errorf("%s × %s: a target at %v", x, y, to)
				}
			}
			if len(ports) != len(p.targets) || p.passes < 1 || r.total() > maxHardPackets || p.sockets > maxSockets {
				t.Errorf("%s × %s: %d ports, %d targets, %d sockets, %d passes", x, y, len(ports), len(p.targets), p.sockets, p.passes)
			}
			if theirs.nat.Allocation == Block && len(ports) > theirs.nat.half() {
				t.Errorf("%s × %s: %d ports of a block of %d", x, y, len(ports), theirs.nat.width())
			}
			if mine.nat.Allocation == Block && r.flows() > mine.nat.half() {
				t.Errorf("%s × %s: %d flows in a block of %d", x, y, r.flows(), mine.nat.width())
			}
		}
	}
}

func TestPlanPairs(t *testing.T) {
	for _, test := range []struct {
		mine, theirs string
		want         bool
	}{
		{"easy", "easy", false},
		{"easy", "random", true},
		{"easy", "unknown", false},
		{"easy", "preserving", false},
		{"random", "random", false},
		{"random", "block", false},
		{"random", "sequential", false},
		{"block", "block", true},
		{"sequential", "block", true},
		{"sequential", "busy", true},
	} {
		if _, ok := planFor(sides("203.0.113.1")[test.mine], sides("203.0.113.2")[test.theirs], 0); ok != test.want {
			t.Errorf("%s × %s: %v", test.mine, test.theirs, ok)
		}
	}
	if _, ok := planFor(sides("203.0.113.1")["easy"], sides("203.0.113.1")["random"], 0); ok {
		t.Error("a round with a peer behind our own NAT")
	}
}

// TestPlanFit wants both sides of sequential NATs to aim at each other.
func TestPlanFit(t *testing.T) {
	mine, theirs := sides("203.0.113.1")["sequential"], sides("203.0.113.2")["sequential"]
	p, _ := planFor(mine, theirs, 0)
	back, _ := planFor(theirs, mine, 0)
	aimed := int(int16(back.targets[0].Port()-mine.addr.Port())) / mine.nat.Step
	if aimed < 1 || aimed > p.sockets {
		t.Errorf("aimed at mapping %d of %d", aimed, p.sockets)
	}
}

// TestWalk wants no port twice before all were tried.
func TestWalk(t *testing.T) {
	mine, theirs := sides("203.0.113.1")["easy"], sides("203.0.113.2")["random"]
	seen := map[uint16]bool{}
	for walked := 0; walked+walkLength <= allPorts; walked += walkLength {
		p, _ := planFor(mine, theirs, walked)
		for _, to := range p.targets {
			if seen[to.Port()] || to.Port() < firstPort {
				t.Fatalf("port %d after %d", to.Port(), len(seen))
			}
			seen[to.Port()] = true
		}
	}
	if len(seen) < allPorts-walkLength {
		t.Errorf("%d ports", len(seen))
	}
}

func TestSideRoundTrip(t *testing.T) {
	for name, want := range sides("203.0.113.1") {
		b := want.append(nil)
		if len(b) != sideSize {
			t.Errorf("%s: %d bytes", name, len(b))
		}
		if got, err := parseSide(append(b, 1)); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if _, err := parseSide(b[:sideSize-1]); err == nil {
			t.Errorf("%s: accepted when cut", name)
		}
	}
	for name, change := range map[string]func(*side){
		"mapping":        func(s *side) { s.nat.Mapping = 4 },
		"no mapping":     func(s *side) { s.nat.Mapping = 0 },
		"allocation":     func(s *side) { s.nat.Allocation = Random + 1 },
		"no step":        func(s *side) { s.nat.Step = 0 },
		"long step":      func(s *side) { s.nat.Step = maxDistance + 1 },
		"block":          func(s *side) { s.nat.Low = 5 },
		"no block":       func(s *side) { s.nat.Allocation, s.nat.Step = Block, 0 },
		"reversed block": func(s *side) { s.nat = NAT{Mapping: s.nat.Mapping, Allocation: Block, Low: 9, High: 8} },
		"huge block":     func(s *side) { s.nat = NAT{Mapping: s.nat.Mapping, Allocation: Block, Low: 9, High: 60000} },
		"port":           func(s *side) { s.addr = netip.AddrPortFrom(s.addr.Addr(), 0) },
	} {
		s := sides("203.0.113.1")["sequential"]
		change(&s)
		if _, err := parseSide(s.append(nil)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestMeetInside wants two sides with blocks to aim at ports that are surely in the
// other's block, although its ends are only estimated.
func TestMeetInside(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	outside, targets := 0, 0
	for range 500 {
		const low, size = 30000, 1024
		var samples []Sample
		for i := range samplesWanted {
			mapped := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.2"), uint16(low+rng.IntN(size)))
			samples = append(samples, Sample{Local: uint16(i), Server: stunAddr(), Mapped: mapped, At: time.Unix(int64(i), 0)})
		}
		theirs := side{nat: Classify(samples), addr: samples[0].Mapped}
		theirs.nat.Mapping = AddressAndPortDependent
		if theirs.nat.Allocation != Block {
			continue
		}
		p, ok := planFor(sides("203.0.113.1")["block"], theirs, 0)
		if !ok {
			t.Fatalf("no plan for %+v", theirs)
		}
		for _, to := range p.targets {
			targets++
			if to.Port() < low || to.Port() >= low+size {
				outside++
			}
		}
	}
	if targets < 900 {
		t.Errorf("%d targets: this proves nothing", targets)
	}
	if outside > 0 {
		t.Errorf("%d of %d targets are outside of the block", outside, targets)
	}
}
