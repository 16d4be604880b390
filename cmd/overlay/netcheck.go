package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// netcheckCommand looks at the network of this machine.
func netcheckCommand() *cobra.Command {
	var asJSON bool
	var q overlay.NetcheckRequest
	cmd := &cobra.Command{
		Use:   "netcheck",
		Short: "look at this machine's network: UDP, NAT, relays",
		Args:  cobra.NoArgs,
	}
	n := addNodeFlags(cmd, "state")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&q.Lifetime, "lifetime", false, "also measure how long UDP mappings live (up to 5 minutes)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if q.Lifetime {
			fmt.Fprintln(cmd.ErrOrStderr(), "measuring how long UDP mappings live takes up to 5 minutes")
		}
		r, err := n.client().Netcheck(cmd.Context(), q)
		if overlay.KindOf(err) == overlay.NotRunning && !q.Lifetime {
			r, err = overlay.NetcheckAlone(cmd.Context(), n.state)
		}
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), r)
		}
		return showNetcheck(cmd.OutOrStdout(), r)
	}
	return cmd
}

func showNetcheck(out io.Writer, n overlay.Netcheck) error {
	p := &page{}
	p.line("%s", n.Verdict)
	p.gap()
	p.facts(netFacts(n))
	if len(n.Relays) > 0 {
		p.gap()
		p.row("RELAY", "LINK", "RTT", "NOTE")
	}
	for _, r := range n.Relays {
		var notes []string
		if r.Home {
			notes = append(notes, "home")
		}
		if r.Trouble != "" {
			notes = append(notes, r.Trouble)
		}
		p.row(r.Name, cmp.Or(r.Transport, "down"), cmp.Or(roundTrip(r.RTTms), "-"), cmp.Or(strings.Join(notes, "; "), "-"))
	}
	p.help(n.Help)
	return p.print(out)
}

func netFacts(n overlay.Netcheck) [][2]string {
	server := "connected"
	if !n.Online {
		server = "not connected: " + n.Trouble
	}
	if n.Server != "" {
		server = n.Server + ": " + server
	}
	facts := [][2]string{
		{"server", server},
		{"proxy", cmp.Or(n.Proxy, "none")},
		{"udp", udpFact(n)},
		{"ipv4", familyFact(n.IPv4)},
		{"ipv6", familyFact(n.IPv6)},
	}
	if len(n.Addresses) > 0 {
		facts = append(facts, [2]string{"addresses", strings.Join(n.Addresses, ", ")})
	}
	if len(n.Public) > 0 {
		facts = append(facts, [2]string{"public", strings.Join(n.Public, ", ")})
	}
	label := "seen at"
	for _, o := range n.Observed {
		facts = append(facts, [2]string{label, observedFact(o)})
		label = ""
	}
	return append(facts, natFacts(n)...)
}

func udpFact(n overlay.Netcheck) string {
	if n.Asked == 0 {
		return "nothing to ask"
	}
	text := map[string]string{"passes": "passes", "blocked": "does not pass"}[n.UDP]
	return fmt.Sprintf("%s: %d of %d server ports answer", cmp.Or(text, "not known"), n.Answered, n.Asked)
}

func familyFact(f overlay.FamilyLook) string {
	switch {
	case !f.Own:
		return "no address that leads out"
	case f.Asked == 0:
		return "an address of its own, but no server to ask"
	case f.Answered == 0:
		return "an address of its own, but no server answers"
	}
	return cmp.Or(roundTrip(f.RTTms), "slow") + " to the nearest server"
}

func observedFact(o overlay.Observed) string {
	switch {
	case !o.OK && o.Server == "":
		return fmt.Sprintf("no answer from port %d", o.Port)
	case !o.OK:
		return "no answer from " + o.Server
	case o.Mapped == "":
		return fmt.Sprintf("an address, by port %d", o.Port)
	}
	return o.Mapped + " by " + o.Server
}

// natFacts are what is known of the NAT, and what is not.
func natFacts(n overlay.Netcheck) [][2]string {
	if n.NAT.Mapping == "none" {
		return [][2]string{{"nat", "none"}, {"filtering", cmp.Or(n.NAT.Filtering, "not measured: the server cannot")}, {"mtu", mtuFact(n)}}
	}
	facts := [][2]string{
		{"nat", cmp.Or(n.NAT.Text(), "not known")},
		{"filtering", filteringFact(n.NAT.Filtering)},
		{"hairpin", yesNo(n.NAT.Hairpin, "not measured")},
		{"lifetime", lifetimeFact(n.Lifetime)},
	}
	facts = append(facts, routerFacts(n)...)
	return append(facts,
		[2]string{"double nat", yesNo(n.DoubleNAT, "not known")},
		[2]string{"carrier's nat", yesNo(n.CarrierGrade, "not known")},
		[2]string{"mtu", mtuFact(n)},
	)
}

// routerFacts are what every router says about mapping a port.
func routerFacts(n overlay.Netcheck) [][2]string {
	if n.MappingOff {
		return [][2]string{{"port mapping", "switched off; on again by: overlay up --port-mapping on"}}
	}
	if n.MappingTrouble != "" {
		return [][2]string{{"port mapping", "not asked: " + n.MappingTrouble}}
	}
	if len(n.Routers) == 0 {
		return [][2]string{{"port mapping", "no router to ask"}}
	}
	var facts [][2]string
	label := "port mapping"
	for _, r := range n.Routers {
		facts = append(facts, [2]string{label, routerFact(r)})
		label = ""
	}
	return facts
}

func routerFact(r overlay.RouterLook) string {
	text := cmp.Or(r.Router, "the router") + " "
	if r.Protocol != "" {
		text += "forwards " + cmp.Or(r.External, "a port") + " by " + r.Protocol
		return text + map[string]string{
			"carrier": ", an address of the provider's: of use behind the same NAT only",
			"private": ", a private address: of use behind the same router only",
		}[r.OuterKind]
	}
	var parts []string
	for _, f := range r.Refused {
		parts = append(parts, f.Protocol+": "+f.Words)
	}
	if len(r.Silent) > 0 {
		parts = append(parts, "no answer by "+strings.Join(r.Silent, ", "))
	}
	if !r.Settled {
		parts = append(parts, "still asked")
	}
	if r.OuterKind != "" {
		own := "its own address is " + cmp.Or(r.Outer, r.OuterKind)
		parts = append(parts, own+map[string]string{"carrier": ", of the provider's network", "private": ", of another router's network"}[r.OuterKind])
	}
	return text + "forwards none: " + strings.Join(parts, "; ")
}

func filteringFact(f string) string {
	switch f {
	case "":
		return "not measured"
	case "at-most-address-dependent":
		return "not by ports; whether by addresses, one server alone cannot tell"
	case "endpoint-independent":
		return f + ": anybody may send to a port that is open"
	case "address-and-port-dependent":
		return f + ": only who was sent to may answer"
	}
	return f + ": any port of who was sent to may answer"
}

func lifetimeFact(l *overlay.Lifetime) string {
	switch {
	case l == nil:
		return "not measured; see --lifetime"
	case l.BelowS == nil:
		return fmt.Sprintf("%d s or longer", l.AtLeastS)
	}
	return fmt.Sprintf("between %d and %d s", l.AtLeastS, *l.BelowS)
}

func mtuFact(n overlay.Netcheck) string {
	text := "not measured"
	switch {
	case n.MTU != nil && n.LinkMTU != nil && *n.MTU < *n.LinkMTU && *n.MTU == 1500:
		text = "1500 or more to the server"
	case n.MTU != nil:
		text = fmt.Sprintf("%d to the server", *n.MTU)
	}
	if n.LinkMTU != nil {
		text += fmt.Sprintf(", %d on this machine's link", *n.LinkMTU)
	}
	return text
}

func yesNo(b *bool, unknown string) string {
	switch {
	case b == nil:
		return unknown
	case *b:
		return "yes"
	}
	return "no"
}
