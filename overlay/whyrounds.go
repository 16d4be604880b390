package overlay

import (
	"fmt"
	"strings"
	"time"

	"overlay/punch"
)

// WhyRounds is the search for a direct path by guessing at the ports of a NAT, in
// rounds that both sides agree on. State and Ended are those of punch.Rounds.
type WhyRounds struct {
	State string `json:"state"`
	// Kind is predicted or birthday; with how many sockets beside the main one, and
	// at how many ports of the peer's NAT, between which. All zero: none is planned.
	Kind    string `json:"kind,omitempty"`
	Sockets int    `json:"sockets"`
	Targets int    `json:"targets"`
	Low     uint16 `json:"low,omitempty"`
	High    uint16 `json:"high,omitempty"`
	// InVain counts the rounds that found nothing in this network, Packets those
	// that left in the last or present round, and Spent those of all rounds.
	InVain  int        `json:"inVain"`
	Packets int        `json:"packets"`
	Spent   int        `json:"spent"`
	Began   *time.Time `json:"began"`
	Next    *time.Time `json:"next"` // null: not planned, or as soon as the peer agrees
	Ended   string     `json:"ended,omitempty"`
}

func whyRounds(r punch.Rounds) WhyRounds {
	w := WhyRounds{
		State: string(r.State), Sockets: r.Sockets, Targets: r.Targets, Low: r.Low, High: r.High,
		InVain: r.InVain, Packets: r.Packets, Spent: r.Spent, Began: moment(r.Began), Next: moment(r.Next), Ended: string(r.Ended),
	}
	if r.Kind != 0 {
		w.Kind = via(r.Kind)
	}
	return w
}

// roundStep tells of rounds where they matter; false: nothing was or is planned.
func roundStep(h hurdles, r punch.Rounds) (WhyStep, bool) {
	step := WhyStep{Name: stepRounds}
	if r.State == punch.RoundNone && r.Ended == "" || !h.here.hard() && !h.there.hard() && r.Ended == "" {
		return step, false
	}
	switch {
	case r.Ended == punch.RoundFound:
		step.State = stepOK
	case r.State == punch.RoundUseless, r.Ended != "" && r.State != punch.RoundRunning && r.State != punch.RoundPreparing:
		step.State = stepFailed
	}
	parts := []string{roundText(h, r)}
	if r.Targets > 0 {
		parts = append(parts, planText(r))
	}
	if r.Spent > 0 {
		parts = append(parts, spentText(r, h.now))
	}
	step.Text = strings.Join(parts, "; ")
	return step, true
}

// roundText says what the next round waits for.
func roundText(h hurdles, r punch.Rounds) string {
	next := ""
	if wait := r.Next.Sub(h.now); !r.Next.IsZero() && wait > 0 {
		next = fmt.Sprintf(", the next in %d s", int(wait.Seconds())+1)
	}
	switch r.State {
	case punch.RoundRunning:
		return "at work"
	case punch.RoundPreparing:
		return "about to begin"
	case punch.RoundUnanswered:
		return h.peer + " answers no calls"
	case punch.RoundUnknown:
		return "the NAT here is looked at"
	case punch.RoundAsked:
		return h.peer + " is asked to take part"
	case punch.RoundUntold:
		return h.peer + " has not told of its NAT" + next
	case punch.RoundUseless:
		if h.guess() != "" {
			return "none: a side's ports are random, so that neither can guess the other's"
		}
		return "none: no guess at ports has a chance"
	case punch.RoundPaused:
		return "one a minute" + next
	case punch.RoundBackoff:
		return "rarer after each in vain" + next
	case punch.RoundDue:
		return "as soon as " + h.peer + " agrees"
	}
	return "over"
}

// planText is what is sent in a round.
func planText(r punch.Rounds) string {
	how := "ports tried at random"
	if r.Kind == punch.Predicted {
		how = "ports predicted"
	}
	targets := fmt.Sprintf("%d within %d-%d", r.Targets, r.Low, r.High)
	if r.Targets == 1 {
		targets = fmt.Sprintf("port %d", r.Low)
	}
	from := "the main socket"
	if r.Sockets > 0 {
		from = fmt.Sprintf("%d sockets", r.Sockets)
	}
	return fmt.Sprintf("%s: %s from %s", how, targets, from)
}

// spentText is what rounds cost, and how the last one ended.
func spentText(r punch.Rounds, now time.Time) string {
	text := fmt.Sprintf("%d packets in the last, %d in all", r.Packets, r.Spent)
	if r.Packets == r.Spent {
		text = fmt.Sprintf("%d packets", r.Spent)
	}
	end := map[punch.RoundEnd]string{
		punch.RoundFound: "which found it", punch.RoundSpent: "none answered", punch.RoundLate: "the other side did not come in time",
		punch.RoundCrowded: "no sockets could be opened", punch.RoundMoved: "a side moved",
	}[r.Ended]
	if end != "" {
		text += ", " + end + " " + ago(r.Began, now)
	}
	if r.InVain > 1 {
		text += fmt.Sprintf(", %d rounds in vain", r.InVain)
	}
	return text
}
