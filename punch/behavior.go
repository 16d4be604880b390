package punch

import (
	"net/netip"
	"slices"
	"time"
)

// Behavior says on what a NAT's decision depends (RFC 4787 sections 4.1 and 5).
// The zero Behavior is unknown.
type Behavior uint8

// The behaviours of mapping and filtering.
const (
	EndpointIndependent     Behavior = iota + 1 // on nothing of the remote side
	AddressDependent                            // on its address
	AddressAndPortDependent                     // on its address and port
)

// String returns the words of RFC 4787, as one.
func (b Behavior) String() string {
	switch b {
	case EndpointIndependent:
		return "endpoint-independent"
	case AddressDependent:
		return "address-dependent"
	case AddressAndPortDependent:
		return "address-and-port-dependent"
	}
	return "unknown"
}

// Allocation says how a NAT chooses the outer port of a new mapping. The zero
// Allocation is unknown.
type Allocation uint8

// The allocations of ports.
const (
	Preserving Allocation = iota + 1 // the inner port
	Sequential                       // a step after the last one
	Block                            // at random in a small range
	Random                           // at random
)

// String names the allocation.
func (a Allocation) String() string {
	switch a {
	case Preserving:
		return "preserving"
	case Sequential:
		return "sequential"
	case Block:
		return "block"
	case Random:
		return "random"
	}
	return "unknown"
}

// Sample is what a server said of one of our sockets.
type Sample struct {
	Local          uint16         // its port
	Server, Mapped netip.AddrPort // who said it, and which address it saw
	At             time.Time      // when the request left
}

// NAT is what samples tell of a translator.
type NAT struct {
	Mapping    Behavior
	Preserves  bool // the inner port, wherever it is free
	Allocation Allocation
	Step       int    // from one port to the next; of Sequential
	Low, High  uint16 // where the ports are estimated to be; of Block
}

const (
	// leastMappings is how many mappings tell a sequence from chance, leastBlock how
	// many tell the range of a block.
	leastMappings = 4
	leastBlock    = 12
	// maxBlock is the widest range that counts as a block.
	maxBlock = 8192
	// maxJump is the widest distance between neighbours that counts as a sequence:
	// in steps, the median, and in ports, any. Wider ones are wraps.
	maxJump     = 32
	maxDistance = 4096
)

// Classify tells the mapping of a NAT and how it allocates ports. Mapping needs
// samples of one socket at two servers, allocation some fresh sockets whose
// requests left one after the other; 16 mappings tell everything. Behind no NAT
// the mapping is endpoint-independent and the ports are preserved.
func Classify(samples []Sample) NAT {
	n := NAT{Mapping: mappingOf(samples)}
	ports := mappings(samples, n.Mapping)
	n.Allocation, n.Preserves = preserving(samples)
	if n.Preserves || len(ports) < leastMappings {
		return n
	}
	if n.Step = stepOf(ports); n.Step != 0 {
		n.Allocation = Sequential
		return n
	}
	if len(ports) < leastBlock {
		return n
	}
	if n.Low, n.High = rangeOf(ports); n.Low != 0 {
		n.Allocation = Block
		return n
	}
	n.Allocation = Random
	return n
}

// mappingOf compares what servers saw of the same socket.
func mappingOf(samples []Sample) Behavior {
	mapping := Behavior(0)
	for i, x := range samples {
		for _, y := range samples[:i] {
			if x.Local != y.Local || x.Server == y.Server {
				continue
			}
			switch {
			case x.Mapped == y.Mapped:
				mapping = max(mapping, EndpointIndependent)
			case x.Server.Addr() == y.Server.Addr():
				mapping = AddressAndPortDependent
			default:
				mapping = max(mapping, AddressDependent)
			}
		}
	}
	return mapping
}

// mappings returns the outer port of every mapping, in the order in which they
// were made.
func mappings(samples []Sample, mapping Behavior) []uint16 {
	type key struct {
		local  uint16
		server netip.AddrPort
	}
	samples = slices.Clone(samples)
	slices.SortStableFunc(samples, func(x, y Sample) int { return x.At.Compare(y.At) })
	seen := map[key]bool{}
	var ports []uint16
	for _, s := range samples {
		k := key{s.Local, s.Server}
		switch mapping {
		case AddressAndPortDependent:
		case AddressDependent:
			k.server = netip.AddrPortFrom(s.Server.Addr(), 0)
		default:
			k.server = netip.AddrPort{}
		}
		if !seen[k] {
			seen[k] = true
			ports = append(ports, s.Mapped.Port())
		}
	}
	return ports
}

// preserving tells whether most mappings have the inner port.
func preserving(samples []Sample) (Allocation, bool) {
	kept := 0
	for _, s := range samples {
		if s.Mapped.Port() == s.Local {
			kept++
		}
	}
	if 2*kept > len(samples) {
		return Preserving, true
	}
	return 0, false
}

// stepOf returns the step of a sequence of ports, in which others may have taken
// some: what nearly all distances have in common. 0: there is none.
func stepOf(ports []uint16) int {
	var up, down []int
	for i := range ports[1:] {
		switch d := int(int16(ports[i+1] - ports[i])); {
		case d > 0 && d <= maxDistance:
			up = append(up, d)
		case d < 0 && d >= -maxDistance:
			down = append(down, -d)
		}
	}
	sign, most := 1, up
	if len(down) > len(up) {
		sign, most = -1, down
	}
	if len(most)*5 < (len(ports)-1)*4 {
		return 0
	}
	step := 0
	for _, d := range most {
		step = gcd(step, d)
	}
	slices.Sort(most)
	if most[len(most)/2] > maxJump*step {
		return 0
	}
	return sign * step
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// rangeOf estimates the block from which ports were drawn: on either side it goes
// about as far beyond what was seen as two neighbours are apart. 0: it is too
// wide for one.
func rangeOf(ports []uint16) (low, high uint16) {
	first, last := int(slices.Min(ports)), int(slices.Max(ports))
	if last-first >= maxBlock {
		return 0, 0
	}
	beyond := (last - first) / (len(ports) - 1)
	return uint16(max(1, first-beyond)), uint16(min(last+beyond, 1<<16-1))
}

// churn returns how many mappings of others a sequential NAT makes in a second,
// as seen between the samples.
func churn(samples []Sample, n NAT) float64 {
	if n.Step == 0 || len(samples) < 2 {
		return 0
	}
	ports := mappings(samples, n.Mapping)
	others, step := 0, n.Step
	for i := range ports[1:] {
		steps := int(int16(ports[i+1]-ports[i])) / step
		if steps > 0 && steps <= maxDistance {
			others += steps - 1
		}
	}
	first, last := samples[0].At, samples[0].At
	for _, s := range samples {
		if s.At.Before(first) {
			first = s.At
		}
		last = later(last, s.At)
	}
	return float64(others) / max(last.Sub(first).Seconds(), tick.Seconds())
}
