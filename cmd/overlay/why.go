package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// whyCommand explains the path to a peer.
func whyCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "why PEER",
		Short: "explain the path to a peer, and why it is not direct",
		Args:  cobra.ExactArgs(1),
	}
	n := addNodeFlags(cmd)
	cmd.ValidArgsFunction = completePeers(n)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		w, err := n.client().Why(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), w)
		}
		return showWhy(cmd.OutOrStdout(), w, time.Now())
	}
	return cmd
}

func showWhy(out io.Writer, w overlay.Why, now time.Time) error {
	p := &page{}
	p.line("%s", w.Verdict)
	p.gap()
	p.facts(whyFacts(w, now))
	p.gap()
	for _, s := range w.Steps {
		mark := map[string]string{"ok": "ok", "failed": "FAILED"}[s.State]
		if s.Name == w.Failed {
			mark += " <--"
		}
		p.row("  "+s.Name, cmp.Or(mark, "-"), s.Text)
	}
	p.flush()
	p.gap()
	p.row("CANDIDATE", "KIND", "NAMED BY", "SENT", "BACK", "LAST SENT", "RTT", "STATE")
	for _, c := range w.Pairs {
		p.row(pairCells(c, now)...)
	}
	if len(w.Pairs) == 0 {
		p.row("none")
	}
	p.flush()
	p.help(w.Help)
	return p.print(out)
}

// whyFacts are both sides' networks and the ways to relays.
func whyFacts(w overlay.Why, now time.Time) [][2]string {
	facts := [][2]string{{"path", whyPath(w, now)}}
	facts = append(facts, sideFacts("here", w.Here, now)...)
	facts = append(facts, sideFacts(w.Name, w.There, now)...)
	for _, r := range w.Relays {
		text := []string{cmp.Or(r.Transport, "down")}
		if ms := roundTrip(r.RTTms); ms != "" {
			text = append(text, ms+" from here")
		}
		if r.PeerTripMs != nil {
			text = append(text, fmt.Sprintf("%d ms from %s", *r.PeerTripMs, w.Name))
		}
		if r.Home {
			text = append(text, "home")
		}
		if !r.PeerHere {
			text = append(text, w.Name+" is not there")
		}
		facts = append(facts, [2]string{"relay", r.Name + ": " + strings.Join(text, ", ")})
	}
	if w.NextRound != nil && w.NextRound.After(now) {
		facts = append(facts, [2]string{"next try", fmt.Sprintf("in %d s", int(w.NextRound.Sub(now).Seconds())+1)})
	}
	return facts
}

func whyPath(w overlay.Why, now time.Time) string {
	if w.Path.Kind == "none" {
		return "none"
	}
	text := pathText(w.Path)
	if ms := roundTrip(w.RTTms); ms != "" {
		text += ", " + ms
	}
	if w.Since != nil {
		text += ", chosen " + since(*w.Since, now)
	}
	if w.Before.Kind != "none" {
		text += ", before that " + pathText(w.Before)
	}
	return text
}

// sideFacts are two lines about a network.
func sideFacts(name string, d overlay.Side, now time.Time) [][2]string {
	if !d.Told {
		return [][2]string{{name, "its network is not told"}}
	}
	udp := cmp.Or(map[string]string{"passes": "UDP passes", "blocked": "UDP does not pass"}[d.UDP], "UDP not known")
	if d.UDP != "passes" && d.UDPAnswer != nil {
		udp += ", last answer " + since(*d.UDPAnswer, now)
	}
	facts := [][2]string{{name, strings.Join(d.Public, ", ")}}
	for _, text := range []string{families(d.IPv4, d.IPv6), udp} {
		if text != "" && facts[0][1] != "" {
			text = "; " + text
		}
		facts[0][1] += text
	}
	nat := cmp.Or(d.NAT.Text(), "not known")
	if d.NAT.Mapping == "none" {
		return append(facts, [2]string{"", "no NAT"})
	}
	return append(facts, [2]string{"", "NAT: " + nat})
}

func families(four, six bool) string {
	switch {
	case four && six:
		return "IPv4 and IPv6"
	case four:
		return "no IPv6"
	case six:
		return "no IPv4"
	}
	return ""
}

func pairCells(c overlay.WhyPair, now time.Time) []string {
	sent, back, last := "-", "-", "-"
	if c.Openers+c.Checks > 0 {
		sent = fmt.Sprintf("%d+%d", c.Openers, c.Checks)
	}
	if c.Openers+c.Checks+c.Heard > 0 {
		back = fmt.Sprintf("%d, heard %d", c.Answers, c.Heard)
	}
	if c.Last != nil {
		last = since(*c.Last, now)
	}
	return []string{
		cmp.Or(c.Remote, c.Relay, "(root sees it)"), c.Kind, strings.Join(c.From, ","), sent, back, last,
		cmp.Or(roundTrip(c.RTTms), "-"), pairText(c, now),
	}
}

// pairText says how far a candidate came, in words.
func pairText(c overlay.WhyPair, now time.Time) string {
	text := c.State
	switch c.State {
	case "valid":
		text = "answers"
	case "suspect":
		text = "does not answer any more"
	case "silent":
		text = "no answer"
	case "checking":
		text = "no answer yet"
	case "untried":
		text = "not tried"
	case "held":
		text = "waits until the peer's router is open for it"
	case "barred":
		text = "not tried: " + obstacleText(c)
	}
	if c.Selected {
		text += ", in use"
	}
	if c.Answered != nil && c.State != "valid" {
		text += ", answered " + since(*c.Answered, now)
	}
	if c.Local != "" {
		text += ", from " + c.Local
	}
	if c.Withheld > 0 {
		text += fmt.Sprintf(", %d held back by the limits", c.Withheld)
	}
	return text
}

func obstacleText(c overlay.WhyPair) string {
	switch c.Obstacle {
	case "other-family":
		return "this machine has no address of that IP version"
	case "other-site":
		return "a private address of another network"
	case "forbidden":
		return "the mesh's own, a server's or a relay's"
	case "unusable":
		return "no address that may be tried"
	case "limit":
		return "the limits on packets and candidates"
	case "not-at-relay":
		return "the peer is not at this relay"
	case "unsendable":
		return "the system refuses: " + c.Error
	}
	return c.Obstacle
}
