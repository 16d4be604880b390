package overlay

import (
	"fmt"
	"net/netip"
	"slices"

	"overlay/punch"
)

// The mappings of a NAT (RFC 4787 section 4.1). noNAT is the machine's own address;
// endpointDependent is one of the last two, where nobody knows which.
const (
	noNAT                = "none"
	endpointIndependent  = "endpoint-independent"
	addressDependent     = "address-dependent"
	addressPortDependent = "address-and-port-dependent"
	endpointDependent    = "endpoint-dependent"

	// atMostAddressDependent is a filtering that does not depend on the port.
	atMostAddressDependent = "at-most-address-dependent"
)

// NATStatus describes a NAT in the words of RFC 4787. Empty strings and null mean
// that it is not known.
type NATStatus struct {
	// Mapping is none (there is no NAT), endpoint-independent, address-dependent,
	// address-and-port-dependent, or endpoint-dependent when only that is known.
	Mapping string `json:"mapping"`
	// Filtering is one of the same words.
	Filtering string `json:"filtering,omitempty"`
	// Allocation is preserving, sequential (by Step), block (from Low to High) or
	// random: how the NAT chooses ports.
	Allocation string `json:"allocation,omitempty"`
	Step       int    `json:"step,omitempty"`
	Low        uint16 `json:"low,omitempty"`
	High       uint16 `json:"high,omitempty"`
	Preserves  *bool  `json:"preservesPort,omitempty"` // the port is the machine's own
	Hairpin    *bool  `json:"hairpin,omitempty"`       // two behind it reach each other by its address
}

// hard reports whether the peer cannot know the port that this NAT will use.
func (n NATStatus) hard() bool {
	return n.Mapping == addressDependent || n.Mapping == addressPortDependent || n.Mapping == endpointDependent
}

// Text says the mapping and the ports in plain words; empty when nothing is known.
func (n NATStatus) Text() string {
	switch n.Mapping {
	case "":
		return ""
	case noNAT:
		return "none: the address is the machine's own"
	case endpointIndependent:
		return "one port for all destinations (" + n.Mapping + ")" + n.portsText()
	}
	return "another port for every destination (" + n.Mapping + ")" + n.portsText()
}

func (n NATStatus) portsText() string {
	switch n.Allocation {
	case punch.Preserving.String():
		return ", the machine's own"
	case punch.Sequential.String():
		return fmt.Sprintf(", in steps of %d", n.Step)
	case punch.Block.String():
		return fmt.Sprintf(", within %d-%d", n.Low, n.High)
	case punch.Random.String():
		return ", chosen at random"
	}
	return ""
}

// natStatus tells what NAT stands before the sockets of some samples, all of one
// family; own are the machine's addresses.
func natStatus(list []punch.Sample, own []netip.Addr) NATStatus {
	if len(list) == 0 {
		return NATStatus{}
	}
	if !slices.ContainsFunc(list, func(s punch.Sample) bool { return !slices.Contains(own, s.Mapped.Addr()) || s.Mapped.Port() != s.Local }) {
		return NATStatus{Mapping: noNAT}
	}
	return describeNAT(punch.Classify(list))
}

// describeNAT puts what is known of a NAT into words.
func describeNAT(n punch.NAT) NATStatus {
	st := NATStatus{Step: n.Step, Low: n.Low, High: n.High}
	if n.Mapping != 0 {
		st.Mapping = n.Mapping.String()
	}
	if n.Allocation != 0 {
		st.Allocation = n.Allocation.String()
		st.Preserves = &n.Preserves
	}
	return st
}
