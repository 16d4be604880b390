package natlab

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Place is the network of one laptop of a cell.
type Place struct {
	NAT     NAT
	Carrier NAT // between the home and the Internet; empty is none
	// Mapping is how the router maps ports for who asks; it is a Random one then,
	// and the LAN one of its own. Empty: it maps none.
	Mapping PortMapping
	LAN     string // prefix; empty is one of its own
	IPv6    IPv6
}

// Together says what the two laptops of a cell have in common.
type Together string

const (
	// SameLAN is one home, that of the first place.
	SameLAN Together = "same LAN"
	// SameNAT is one home that keeps its laptops apart.
	SameNAT Together = "same NAT"
	// SameCarrier is one carrier, that of the first place.
	SameCarrier Together = "same carrier"
)

// Bar is what a cell has to reach. Times count from the first packet between the
// two laptops.
type Bar struct {
	Share         float64 // of the runs that become direct, 0 to 1
	Median, Worst time.Duration
	// Relay says that nothing but a relay connects the pair, which has to work
	// at once.
	Relay bool
}

// Cell is a pair of networks, and what is to become of nodes in them.
type Cell struct {
	// Group is the row of the matrix, Note what the places do not say.
	Group    string
	Note     string
	One, Two Place
	Together Together
	// Delay is one way through the Internet, zero that of the lab; Loss the share
	// of packets it loses.
	Delay time.Duration
	Loss  float64
	// Skew is by how much the second node starts later at most, Churn how many
	// unrelated flows every home makes at most in every fifth of a second.
	Skew  time.Duration
	Churn int
	Bar   Bar
	// Chance says that so few runs say little about the share: it is measured here,
	// and TestBlockRounds judges it.
	Chance bool
	// Short says that the short form of the test has it.
	Short bool
}

// Name tells cells apart.
func (c Cell) Name() string {
	parts := []string{c.One.String() + " × " + c.Two.String()}
	for _, p := range []struct {
		say  bool
		text string
	}{
		{c.Together != "", string(c.Together)},
		{c.Loss > 0, fmt.Sprintf("%.0f %% loss", 100*c.Loss)},
		{c.Churn > 0, fmt.Sprintf("churn %d", c.Churn)},
		{c.Note != "", c.Note},
	} {
		if p.say {
			parts = append(parts, p.text)
		}
	}
	return strings.Join(parts, ", ")
}

func (p Place) String() string {
	text := string(p.NAT)
	if p.Mapping != "" {
		text += "+" + string(p.Mapping)
	}
	if p.Carrier != "" {
		text += "+" + string(p.Carrier)
	}
	if p.IPv6 != "" {
		text += "+ipv6 " + string(p.IPv6)
	}
	return text
}

func (p Place) prefix() (netip.Prefix, error) {
	if p.LAN == "" {
		return netip.Prefix{}, nil
	}
	return netip.ParsePrefix(p.LAN)
}

// The bars of the matrix.
func easyBar() Bar {
	return Bar{Share: 1, Median: 500 * time.Millisecond, Worst: 1500 * time.Millisecond}
}

func within(limit time.Duration, share float64) Bar { return Bar{Share: share, Worst: limit} }

const (
	cellSkew  = 500 * time.Millisecond
	cellChurn = 15
	cellLAN   = "192.168.1.0/24" // of both homes
	cellHalf  = defaultDelay / 2 // for two carriers in a row
)

// Cells are the rows of the matrix: every pair of networks with its bar.
func Cells() []Cell {
	return slices.Concat(easyCells(), hardCells(), mappedCells(), carrierCells(), homeCells(), lineCells())
}

func at(n NAT) Place { return Place{NAT: n} }

func relayBar() Bar { return Bar{Relay: true} }

func easyCells() []Cell {
	easy := func(a, b NAT, short bool) Cell {
		return Cell{Group: "easy", One: at(a), Two: at(b), Skew: cellSkew, Bar: easyBar(), Short: short}
	}
	return []Cell{
		easy(Masquerade, Masquerade, true),
		easy(Masquerade, OpenInput, false),
		easy(OpenInput, OpenInput, true),
		easy(FullCone, Masquerade, false),
		easy(Restricted, PortRestricted, false),
		easy(OtherPort, OtherPort, true),
		easy(OtherPort, OpenInput, false),
		easy(Public, Masquerade, false),
		easy(Firewall, Masquerade, false),
		easy(Firewall, Firewall, true),
		easy(DMZ, OneToOne, false),
		easy(Reset, ShortTimeouts, false),
		easy(Random, FullCone, true),
		easy(Sequential, Public, false),
	}
}

func hardCells() []Cell {
	return []Cell{
		{Group: "sequential", One: at(Sequential), Two: at(Masquerade), Churn: cellChurn, Bar: within(5*time.Second, 0.95), Short: true},
		{Group: "sequential", One: at(SequentialDown), Two: at(OtherPort), Churn: cellChurn, Bar: within(5*time.Second, 0.95)},
		{Group: "sequential", One: at(Sequential), Two: at(Sequential), Churn: cellChurn, Bar: within(5*time.Second, 0.95)},
		{Group: "random", One: at(Random), Two: at(Masquerade), Bar: within(12*time.Second, 0.95), Short: true},
		{Group: "block", One: at(Block512), Two: at(Masquerade), Bar: within(4*time.Second, 0.99)},
		{Group: "block", One: at(Block), Two: at(Masquerade), Bar: within(4*time.Second, 0.99), Short: true},
		{Group: "block", One: at(Block2048), Two: at(OtherPort), Bar: within(4*time.Second, 0.99)},
		{Group: "block-block", One: at(Block), Two: at(Block), Bar: within(30*time.Second, 0.2), Chance: true},
		{Group: "random-random", One: at(Random), Two: at(Random), Bar: relayBar(), Short: true},
	}
}

// mappedCells have a router that maps ports on one side, and one on the other side
// with which nobody meets directly otherwise.
func mappedCells() []Cell {
	var list []Cell
	for _, m := range []PortMapping{MapPCP, MapNATPMP, MapUPnP1, MapUPnP2} {
		list = append(list, Cell{
			Group: "mapped", One: Place{NAT: Random, Mapping: m}, Two: at(Random),
			Bar: within(mappedWorst, 1), Short: m == MapPCP,
		})
	}
	return list
}

// mappedWorst is how long two may take of which one is let in by its router.
const mappedWorst = 1500 * time.Millisecond

func carrierCells() []Cell {
	return []Cell{
		{
			Group: "carrier", Together: SameCarrier, Bar: within(mappedWorst, 1), Note: "PCP on the homes",
			One: Place{NAT: Random, Carrier: Masquerade, Mapping: MapPCP}, Two: Place{NAT: Random, Mapping: MapPCP},
		},
		{
			Group: "carrier", Together: SameCarrier, Bar: within(mappedWorst, 1), Note: "PCP on 100.64.0.0/10",
			One: Place{NAT: Random, Carrier: Masquerade, Mapping: MapShared}, Two: Place{NAT: Random, Mapping: MapShared},
		},
		{
			Group: "carrier", Together: SameCarrier, Bar: easyBar(), Short: true,
			One: Place{NAT: Masquerade, Carrier: Hairpin, LAN: cellLAN}, Two: Place{NAT: Masquerade, LAN: cellLAN},
		},
		{
			Group: "carrier", Together: SameCarrier, Bar: relayBar(),
			One: Place{NAT: Masquerade, Carrier: Masquerade, LAN: cellLAN}, Two: Place{NAT: Masquerade, LAN: cellLAN},
		},
		{
			Group: "carrier", Delay: cellHalf, Skew: cellSkew, Bar: easyBar(), Short: true, Note: "overlapping LANs",
			One: Place{NAT: Masquerade, Carrier: OtherPort, LAN: cellLAN}, Two: Place{NAT: Masquerade, Carrier: Masquerade, LAN: cellLAN},
		},
		{
			Group: "carrier", Delay: cellHalf, Bar: within(4*time.Second, 0.99),
			One: Place{NAT: Masquerade, Carrier: Block, LAN: cellLAN}, Two: Place{NAT: Masquerade, LAN: cellLAN},
		},
	}
}

func homeCells() []Cell {
	return []Cell{
		{Group: "home", Together: SameLAN, One: at(Masquerade), Two: at(Masquerade), Bar: easyBar(), Short: true},
		{Group: "home", Together: SameNAT, One: at(Hairpin), Two: at(Hairpin), Bar: easyBar(), Short: true},
		{Group: "home", Together: SameNAT, One: at(Masquerade), Two: at(Masquerade), Bar: relayBar()},

		{
			Group: "ipv6", Bar: within(500*time.Millisecond, 1), Short: true,
			One: Place{NAT: Random, IPv6: IPv6Firewall}, Two: Place{NAT: Random, IPv6: IPv6Firewall},
		},
		{
			Group: "ipv6", Bar: within(500*time.Millisecond, 1), Short: true,
			One: Place{NAT: Masquerade, IPv6: IPv6Broken}, Two: Place{NAT: Masquerade, IPv6: IPv6Broken},
		},
		{
			Group: "ipv6", Bar: within(500*time.Millisecond, 1),
			One: Place{NAT: Masquerade, IPv6: IPv6Broken}, Two: Place{NAT: Masquerade, IPv6: IPv6Firewall},
		},
	}
}

func lineCells() []Cell {
	return []Cell{
		{Group: "loss", One: at(Masquerade), Two: at(Masquerade), Loss: 0.2, Skew: cellSkew, Bar: within(3*time.Second, 1)},
		{Group: "loss", One: at(Masquerade), Two: at(OpenInput), Loss: 0.2, Skew: cellSkew, Bar: within(3*time.Second, 1)},
		{Group: "loss", One: at(OpenInput), Two: at(OpenInput), Loss: 0.2, Skew: cellSkew, Bar: within(3*time.Second, 1)},
		{Group: "tcp", One: at(UDPBlocked), Two: at(UDPBlocked), Bar: within(5*time.Second, 0.9), Short: true},
		{Group: "lines", One: at(SmallMTU), Two: at(Masquerade), Bar: easyBar()},
		{Group: "lines", One: at(Lossy), Two: at(Masquerade), Bar: within(3*time.Second, 1)},
		{Group: "lines", One: at(Policed), Two: at(Masquerade), Bar: within(3*time.Second, 1)},
	}
}
