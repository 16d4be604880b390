package punch

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"net/netip"
	"time"
)

// The limits of a hard round, which are law.
const (
	maxSockets     = 256
	maxHardRate    = 200  // packets per second
	maxHardPackets = 1200 // per round
	// roundRate leaves room for what fresh sockets send meanwhile.
	roundRate = maxHardRate - 10
)

const (
	// hardGap is the time between two packets of a round; those of a sequence of
	// ports leave at once, before somebody else takes one.
	hardGap = time.Second/roundRate + 50*time.Microsecond
	// settle is from the last opener to full TTL, passGap between later passes.
	settle  = 150 * time.Millisecond
	passGap = 300 * time.Millisecond
	// openBefore is how many mappings a sequential NAT makes for a peer that can be
	// reached at one port.
	openBefore = 8
	// predictWithin is how old a sampled port is at most when it is used.
	predictWithin = 250 * time.Millisecond
	// leastOffset is how far ahead of the sampled port one is predicted where nobody
	// else was seen to use the NAT; spare is how many sockets there are beyond.
	leastOffset = 20
	spareWindow = 5
	// leastWidth is how many ports a block has at least.
	leastWidth = 16
	// The ports of a whole NAT are walked in steps that visit each once; the stride
	// and the number of ports have no divisor in common.
	firstPort  = 1024
	allPorts   = 1<<16 - firstPort
	walkStride = 25171
	// walkLength is how many of them a round tries.
	walkLength = maxHardPackets - 20
)

// side is what a node says of its NAT in a signal. The address is that of its
// mapping when that is endpoint-independent; else the port is the one that the
// NAT gave out last.
//
//	+---------+---------+-------------------+-------------------+
//	| mapping | alloc.  | step, signed (2)  | low (2)           |
//	+---------+---------+-------------------+-------------------+
//	| high (2)          | churn (2)         | IPv4 address (4)… |
//	+-------------------+-------------------+-------------------+
//	| …                 | port (2)          |
//	+-------------------+-------------------+
type side struct {
	nat   NAT
	churn uint16 // mappings of others per second
	addr  netip.AddrPort
}

const sideSize = 16

func (s side) append(b []byte) []byte {
	b = append(b, byte(s.nat.Mapping), byte(s.nat.Allocation))
	for _, v := range []uint16{uint16(int16(s.nat.Step)), s.nat.Low, s.nat.High, s.churn} {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	ip := s.addr.Addr().As4()
	b = append(b, ip[:]...)
	return binary.BigEndian.AppendUint16(b, s.addr.Port())
}

// parseSide reads the description of a NAT and wants it to make sense.
func parseSide(b []byte) (side, error) {
	if len(b) < sideSize {
		return side{}, errSignalFormat
	}
	u16 := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	s := side{
		nat:   NAT{Mapping: Behavior(b[0]), Allocation: Allocation(b[1]), Step: int(int16(u16(2))), Low: u16(4), High: u16(6)},
		churn: u16(8),
		addr:  netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[10:14])), u16(14)),
	}
	n := s.nat
	known := n.Mapping >= EndpointIndependent && n.Mapping <= AddressAndPortDependent && n.Allocation <= Random
	sequence := (n.Allocation == Sequential) == (n.Step != 0) && n.Step >= -maxDistance && n.Step <= maxDistance
	block := n.Low == 0 && n.High == 0
	if n.Allocation == Block {
		block = n.Low > 0 && n.High > n.Low && n.High-n.Low < 2*maxBlock
	}
	if !known || !sequence || !block || s.addr.Port() == 0 {
		return side{}, errSignalFormat
	}
	return s, nil
}

// plan is what one side does in a round: from every socket a packet to every
// target, openers first where the mappings are ours to make, then full TTL.
type plan struct {
	kind    CandidateType
	sockets int // spare ones; 0: the main one
	targets []netip.AddrPort
	passes  int           // the openers are the first
	wait    time.Duration // from the first packet to the first full TTL after openers
	gap     time.Duration
	starts  bool // begins before the other side does
}

// planFor returns what mine does when the other side is theirs; false: nothing
// would help, or nothing is needed. Both sides come to fitting plans. walked is how
// many ports of a whole NAT earlier rounds tried.
func planFor(mine, theirs side, walked int) (plan, bool) {
	if mine.addr.Addr() == theirs.addr.Addr() {
		return plan{}, false
	}
	easy, other := mine.nat.easy(), theirs.nat.easy()
	switch {
	case easy && other, !mine.nat.usable() || !theirs.nat.usable():
		return plan{}, false
	case easy:
		return probePlan(theirs, walked), true
	case other:
		return openPlan(mine, theirs.addr), true
	case mine.nat.Allocation == Random || theirs.nat.Allocation == Random:
		return plan{}, false
	}
	return meetPlan(mine, theirs), true
}

// easy reports whether all peers see a node at one address.
func (n NAT) easy() bool { return n.Mapping == EndpointIndependent }

// usable reports whether the ports of a NAT can be guessed at.
func (n NAT) usable() bool {
	switch n.Allocation {
	case Sequential, Random:
		return true
	case Block:
		return n.width() >= leastWidth
	}
	return n.easy()
}

func (n NAT) kind() CandidateType {
	if n.Allocation == Sequential {
		return Predicted
	}
	return Birthday
}

// width is how many ports a block has, half how many of them a round may use.
func (n NAT) width() int { return int(n.High) - int(n.Low) + 1 }
func (n NAT) half() int  { return n.width() / 2 }

// core is the part of a block that was surely seen, without the estimated ends:
// from its first port on, how many.
func (n NAT) core() (first uint16, ports int) {
	end := n.width() / (leastBlock + 1)
	return n.Low + uint16(end), n.width() - 2*end
}

// share is of how many ports both sides have to choose so many that they miss
// each other once in e^9 times.
func (n NAT) share() int {
	return min(int(3*math.Sqrt(float64(n.width())))+1, n.half(), maxSockets)
}

// offset is how far ahead of the sampled port a sequential NAT surely is when the
// mappings have been made, with the churn that was measured.
func (s side) offset() int {
	expected := float64(s.churn) * predictWithin.Seconds()
	return min(leastOffset+int(3*expected), maxSockets-spareWindow)
}

// ahead is the port so many steps after the sampled one.
func (s side) ahead(steps int) netip.AddrPort {
	return netip.AddrPortFrom(s.addr.Addr(), s.addr.Port()+uint16(s.nat.Step*steps))
}

// probePlan is that of the side which all see at one address.
func probePlan(theirs side, walked int) plan {
	p := plan{kind: theirs.nat.kind(), gap: hardGap}
	port := func(n int) netip.AddrPort { return netip.AddrPortFrom(theirs.addr.Addr(), uint16(n)) }
	switch n := theirs.nat; n.Allocation {
	case Sequential:
		for i := range theirs.offset() + openBefore + spareWindow {
			p.targets = append(p.targets, theirs.ahead(i+1))
		}
	case Block:
		for _, i := range rand.Perm(n.width())[:n.share()] {
			p.targets = append(p.targets, port(int(n.Low)+i))
		}
	default:
		for i := range walkLength {
			p.targets = append(p.targets, port(firstPort+(walked+i)*walkStride%allPorts))
		}
	}
	p.passes = min(3, maxHardPackets/len(p.targets))
	return p
}

// openPlan is that of the side whose ports are not known, towards one that all see
// at one address. When the other side has tried all its targets, it is let in
// where it tried; that also helps where openers die before the outermost NAT.
func openPlan(mine side, to netip.AddrPort) plan {
	p := plan{kind: mine.nat.kind(), targets: []netip.AddrPort{to}, passes: 2, gap: hardGap, starts: true}
	other := probePlan(mine, 0)
	p.wait = time.Duration(len(other.targets))*hardGap + 2*settle
	switch mine.nat.Allocation {
	case Sequential:
		p.sockets, p.gap, p.passes = openBefore, 0, 4
	case Block:
		p.sockets = mine.nat.share()
	default:
		p.sockets = maxSockets
	}
	return p
}

// meetPlan is that of two sides whose ports are not known.
func meetPlan(mine, theirs side) plan {
	p := plan{kind: Birthday, passes: 2, gap: hardGap}
	switch theirs.nat.Allocation {
	case Sequential:
		p.targets = []netip.AddrPort{theirs.ahead(theirs.offset())}
	default:
		first, ports := theirs.nat.core()
		for _, i := range rand.Perm(ports)[:2] {
			p.targets = append(p.targets, netip.AddrPortFrom(theirs.addr.Addr(), first+uint16(i)))
		}
	}
	switch mine.nat.Allocation {
	case Sequential:
		p.targets = p.targets[:1]
		p.sockets, p.gap = mine.offset()+spareWindow, 0
	default:
		p.sockets = min(mine.nat.half()/len(p.targets), maxSockets)
	}
	if mine.nat.Allocation == Sequential && theirs.nat.Allocation == Sequential {
		p.kind = Predicted
		p.passes = min(4, maxHardPackets/p.sockets)
	}
	p.wait = time.Duration(p.sockets*len(p.targets))*p.gap + settle
	return p
}
