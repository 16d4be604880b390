package overlay

import "overlay/punch"

// withoutUDP is how peers are reached where UDP does not pass.
const withoutUDP = "paths go over relays by TLS, or directly by TCP where the NATs let it through"

// conclude says in one sentence what the network is good for, and what would make
// it better. mute: no server ever saw anybody of the mesh over UDP.
func (n *Netcheck) conclude(mute bool) {
	n.Verdict = n.verdict(mute)
	switch {
	case n.UDP == udpBlocked && mute:
		n.Help = append([]string{"let UDP in on the server's firewall: no other node is answered over UDP either"}, letUDPOut("this network")...)
	case n.UDP == udpBlocked:
		n.Help = letUDPOut("this network")
	case n.NAT.hard() && n.forwarded() == "":
		n.Help = n.helpHard()
	}
	if n.alone {
		n.Help = append(n.Help, "start the daemon, which finds out more: sudo overlay up")
	}
}

// helpHard is what helps where peers cannot know the ports of the NAT.
func (n *Netcheck) helpHard() []string {
	if n.DoubleNAT != nil && *n.DoubleNAT {
		return []string{
			"ask the provider for a public IPv4 address: a port that the router here forwards is behind another NAT",
			"give this network IPv6, which needs no NAT",
		}
	}
	return []string{
		"switch PCP, NAT-PMP or UPnP on, on the router, or forward this machine's UDP port",
		"give this network IPv6, which needs no NAT",
	}
}

// forwarded names the protocol by which everybody is let in; empty: there is none.
func (n *Netcheck) forwarded() string {
	if n.DoubleNAT != nil && *n.DoubleNAT {
		return ""
	}
	for _, r := range n.Routers {
		if r.Protocol != "" && r.OuterKind == outerPublic && r.four {
			return r.Protocol
		}
	}
	return ""
}

// behind says what else there is in the way.
func (n *Netcheck) behind() string {
	switch {
	case n.CarrierGrade != nil && *n.CarrierGrade:
		return "; behind the provider's NAT, too"
	case n.DoubleNAT != nil && *n.DoubleNAT:
		return "; behind two NATs"
	}
	return ""
}

func (n *Netcheck) verdict(mute bool) string {
	switch {
	case n.alone && n.Asked == 0:
		return "the daemon is not running, and no server is known here to be asked"
	case n.Asked == 0 && !n.Online:
		return "the server is not reached, so nothing could be asked"
	case n.Asked == 0 && n.UDP == udpPasses:
		return "a relay answers over UDP, but no server tells how this network looks from outside"
	case n.Asked == 0:
		return "no server tells where to ask over UDP: " + withoutUDP
	case n.lost:
		return "nothing answers over UDP any more: the server went down a moment ago, or UDP was cut; ask again in a few seconds"
	case n.UDP == "":
		return "neither the server nor anything over UDP answers: it is down, or this machine has no network"
	case n.UDP == udpBlocked && mute:
		return "UDP is blocked, here or at the server: " + withoutUDP
	case n.UDP == udpBlocked:
		return "UDP is blocked: " + withoutUDP
	}
	return n.natVerdict() + n.behind()
}

func (n *Netcheck) natVerdict() string {
	if by := n.forwarded(); by != "" {
		return "the router forwards a port (" + by + "): direct paths work with every network that passes UDP"
	}
	switch n.NAT.Mapping {
	case noNAT:
		return "no NAT: direct paths work with every network that passes UDP"
	case endpointIndependent:
		return "direct paths work with nearly all networks"
	case "":
		if n.IPv4.Answered == 0 && n.IPv6.Answered > 0 {
			return "only IPv6 passes: direct paths work with networks that have it"
		}
		return "UDP passes, but one answer does not tell the kind of NAT"
	}
	switch n.NAT.Allocation {
	case punch.Sequential.String(), punch.Block.String():
		return "hard NAT: ports chosen per destination; direct with easy NATs by prediction"
	}
	return "hard NAT: ports chosen per destination at random; direct with easy NATs by trying many, else over relays"
}
