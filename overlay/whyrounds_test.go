package overlay

import (
	"testing"
	"time"

	"overlay/punch"
)

// TestRoundStep has rounds told in words: what is planned, what it cost, and what
// the next one waits for.
func TestRoundStep(t *testing.T) {
	now := time.Now()
	hard := NATStatus{Mapping: addressPortDependent, Allocation: "block"}
	random := NATStatus{Mapping: addressPortDependent, Allocation: "random"}
	h := hurdles{peer: "bob", now: now, here: hard, there: NATStatus{Mapping: endpointIndependent}}
	for name, x := range map[string]struct {
		here        NATStatus
		r           punch.Rounds
		state, text string
		none        bool
	}{
		"easy NATs":  {here: NATStatus{Mapping: endpointIndependent}, r: punch.Rounds{State: punch.RoundUseless}, none: true},
		"not needed": {here: hard, none: true},
		"useless":    {here: random, r: punch.Rounds{State: punch.RoundUseless}, state: stepFailed, text: "none: a side's ports are random, so that neither can guess the other's"},
		"asked":      {here: hard, r: punch.Rounds{State: punch.RoundAsked}, text: "bob is asked to take part"},
		"at work": {
			here: hard, r: punch.Rounds{State: punch.RoundRunning, Kind: punch.Birthday, Sockets: 97, Targets: 1, Low: 41641, High: 41641, Packets: 30, Spent: 30},
			text: "at work; ports tried at random: port 41641 from 97 sockets; 30 packets",
		},
		"in vain": {
			here: hard, r: punch.Rounds{
				State: punch.RoundPaused, Next: now.Add(36500 * time.Millisecond), Kind: punch.Birthday, Targets: 97, Low: 30011, High: 31020,
				InVain: 2, Packets: 291, Spent: 582, Began: now.Add(-23 * time.Second), Ended: punch.RoundSpent,
			},
			state: stepFailed,
			text:  "one a minute, the next in 37 s; ports tried at random: 97 within 30011-31020 from the main socket; 291 packets in the last, 582 in all, none answered 23 s ago, 2 rounds in vain",
		},
		"found": {
			here: hard, r: punch.Rounds{Kind: punch.Predicted, Targets: 33, Low: 20010, High: 20042, Packets: 12, Spent: 12, Began: now, Ended: punch.RoundFound},
			state: stepOK, text: "over; ports predicted: 33 within 20010-20042 from the main socket; 12 packets, which found it now",
		},
	} {
		h.here = x.here
		step, ok := roundStep(h, x.r)
		if ok == x.none || ok && (step.State != x.state || step.Text != x.text) {
			t.Errorf("%s: %v %+v", name, ok, step)
		}
	}
}

func TestWhyRounds(t *testing.T) {
	now := time.Now()
	w := whyRounds(punch.Rounds{State: punch.RoundBackoff, Kind: punch.Birthday, Targets: 5, Began: now})
	if w.State != "back-off" || w.Kind != "birthday" || w.Targets != 5 || w.Began == nil || w.Next != nil {
		t.Errorf("%+v", w)
	}
	if w := whyRounds(punch.Rounds{}); w.State+w.Kind+w.Ended != "" {
		t.Errorf("of nothing: %+v", w)
	}
}
