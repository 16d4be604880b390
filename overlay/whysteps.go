package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"overlay/punch"
)

// The states of a step.
const (
	stepOK     = "ok"
	stepFailed = "failed"
)

// steps goes through what has to work for a direct path, in order. All comes from h,
// e and w, so that no step says what another one denies.
func steps(h hurdles, e punch.Explanation, w Why) []WhyStep {
	candidates := WhyStep{stepCandidates, verdictOf(h.totals.direct > h.totals.barred, true), candidateText(h)}
	list := []WhyStep{
		serverStep(h), peerStep(h),
		{stepUDPHere, udpState(w.Here), hereText(w.Here, h.now)},
		signalStep(h, e),
		{stepUDPThere, udpState(w.There), thereText(w.There)},
		candidates, checkStep(h),
	}
	tcp := w.Path.Kind == "direct" && w.Path.Via == viaTCP
	if tcp { // what was tried over UDP is no hurdle any more
		for i := range list {
			if n := list[i].Name; n == stepCandidates || n == stepChecks {
				list[i].State, list[i].Text = "", "over UDP: "+list[i].Text
			}
		}
	}
	if rounds, ok := roundStep(h, e.Rounds); ok {
		list = append(list, rounds)
	}
	if tcp {
		list = append(list, WhyStep{stepTCP, stepOK, "a connection to " + h.peer + " carries all"})
	}
	path := WhyStep{stepPath, verdictOf(w.Path.Kind == "direct", true), "none answers"}
	if w.Path.Kind == "direct" {
		path.Text = "direct"
	} else if h.totals.answers > 0 {
		path.Text = "none answers now"
	}
	list = append(list, path)
	for i := range list {
		if list[i].Name == w.Failed {
			list[i].State = stepFailed // where that was not sure by itself
		}
	}
	return list
}

// verdictOf is a step's state; known says that it is known at all.
func verdictOf(ok, known bool) string {
	switch {
	case !known:
		return ""
	case ok:
		return stepOK
	}
	return stepFailed
}

func serverStep(h hurdles) WhyStep {
	switch {
	case !h.server:
		return WhyStep{stepServer, stepFailed, "not connected to the server"}
	case h.reach.links > 0 && h.reach.none():
		return WhyStep{stepServer, stepOK, "connected to the server, but no relay is reached"}
	}
	return WhyStep{stepServer, stepOK, "connected to the server"}
}

// peerStep tells what the server says of the peer, or said before it was lost.
func peerStep(h hurdles) WhyStep {
	step := WhyStep{Name: stepPeer, State: verdictOf(h.online || h.reached, h.server || h.reached)}
	switch {
	case h.server && h.online:
		step.Text = h.peer + " is connected to the server"
	case h.server && h.reached:
		step.Text = h.peer + " is not connected to the server, but is at a relay"
	case h.server:
		step.Text = h.peer + " is not connected to the server, nor seen at a relay"
	case h.online:
		step.Text = h.peer + " was connected, as the server said last"
	default:
		step.Text = h.peer + " was not connected, as the server said last"
	}
	if h.reached && !h.server {
		step.Text += "; there is a path to it"
	}
	return step
}

func udpState(d Side) string { return verdictOf(d.UDP == udpPasses, d.Told && d.UDP != "") }

func hereText(d Side, now time.Time) string {
	silent := silentFor(d.UDPAnswer, now)
	switch {
	case d.UDP == udpPasses:
		return "servers or peers answer over UDP"
	case d.UDP == udpBlocked && silent != "":
		return "no server answers over UDP: " + silent
	case d.UDP == udpBlocked:
		return "no server answers over UDP"
	case silent != "":
		return "not known: " + silent
	}
	return "not known yet"
}

func thereText(d Side) string {
	switch {
	case !d.Told:
		return "not told"
	case d.UDP == udpPasses:
		return "servers answer it over UDP, as it told last"
	case d.UDP == udpBlocked:
		return "no server answers it over UDP, as it told last"
	}
	return "not known yet"
}

func signalStep(h hurdles, e punch.Explanation) WhyStep {
	g := e.Signals
	step := WhyStep{Name: stepSignals, Text: "nothing was said yet"}
	switch {
	case g.Sent+g.Heard == 0:
		return step
	case g.Heard > 0:
		step.State = stepOK
	case g.Sent > 0 && h.now.Sub(g.LastSent) > lookFor:
		step.State = stepFailed
	}
	step.Text = fmt.Sprintf("%d sent", g.Sent)
	if g.Failed > 0 {
		step.Text += fmt.Sprintf(" (%d of them not carried)", g.Failed)
	}
	step.Text += fmt.Sprintf(", %d heard", g.Heard)
	if g.Heard > 0 {
		step.Text += ", the last " + ago(g.LastHeard, h.now)
	}
	return step
}

func candidateText(h hurdles) string {
	t := h.totals
	if t.direct == 0 {
		return h.peer + " has named no address"
	}
	return fmt.Sprintf("%d, of which %d can be tried from here", t.direct, t.direct-t.barred)
}

func checkStep(h hurdles) WhyStep {
	t := h.totals
	step := WhyStep{Name: stepChecks, Text: "none was sent"}
	if t.checks+t.openers == 0 {
		if t.heard > 0 {
			step.Text += fmt.Sprintf(", %d heard", t.heard)
		}
		return step
	}
	step.State = verdictOf(t.answers > 0, t.answers > 0 || h.now.Sub(t.first) > lookFor)
	step.Text = fmt.Sprintf("%d and %d openers to %s in %d s: %d answered, %d of %s's heard",
		t.checks, t.openers, addresses(t.tried), int(h.now.Sub(t.first).Seconds()), t.answers, t.heard, h.peer)
	return step
}

func addresses(n int) string {
	if n == 1 {
		return "1 address"
	}
	return fmt.Sprintf("%d addresses", n)
}

// ago says how long ago something was.
func ago(t, now time.Time) string {
	d := now.Sub(t)
	switch {
	case d < time.Second:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	}
	return fmt.Sprintf("%d h ago", int(d.Hours()))
}

// directText is the verdict on a direct path: which it is, and what it beat.
func (w *Why) directText(e punch.Explanation) string {
	text := fmt.Sprintf("%s is reached directly, %s", w.Name, kindText(w.Path.Via))
	var slower []string
	for _, r := range e.Pairs {
		if r.Selected || r.State != punch.PairValid || r.RTT == 0 {
			continue
		}
		slower = append(slower, fmt.Sprintf("%s in %.1f ms", otherKind(r.Type), 1000*r.RTT.Seconds()))
	}
	switch {
	case len(slower) > 0:
		return text + "; it is preferred to " + strings.Join(slower, ", ")
	case e.Before.Type == punch.Relayed:
		return text + "; it took over from a relay"
	}
	return text
}

func otherKind(t punch.CandidateType) string {
	if t == punch.Relayed {
		return "a relay"
	}
	return "another address (" + via(t) + ")"
}

// kindText says what a way to a peer means.
func kindText(via string) string {
	switch via {
	case "host":
		return "at an address of its own"
	case "srflx":
		return "at its NAT's address, as a server saw it"
	case "prflx":
		return "at its NAT's address, as its own packets showed it"
	case "mapped":
		return "at a port that its router forwards"
	case "predicted":
		return "at a port of its NAT that was predicted"
	case "birthday":
		return "at a port of its NAT that was found by trying many"
	case viaTCP:
		return "over TCP, which passes where UDP does not"
	}
	return "by " + via
}

// relayedText begins the verdict on a path that is not direct.
func (w *Why) relayedText(reached bool) string {
	over, _ := strings.CutPrefix(w.Path.Via, "relay-")
	if over == viaPeer {
		over = "peer, udp"
	}
	switch {
	case w.Path.Kind == "relay" && over == "":
		return fmt.Sprintf("%s is to be reached over relay %s, which is down", w.Name, w.Path.Relay)
	case !reached:
		return w.Name + " is not reached"
	}
	return fmt.Sprintf("%s is reached over relay %s (%s)", w.Name, w.Path.Relay, over)
}

// numbers lists ports for people.
func numbers(ports []uint16) string {
	slices.Sort(ports)
	var list []string
	for _, p := range ports {
		list = append(list, fmt.Sprint(p))
	}
	if len(list) < 2 {
		return strings.Join(list, "")
	}
	return strings.Join(list[:len(list)-1], ", ") + " and " + list[len(list)-1]
}

// hosts keeps the addresses of prefixes.
func hosts(list []netip.Prefix) []netip.Addr {
	var all []netip.Addr
	for _, p := range list {
		all = append(all, p.Addr())
	}
	return all
}
