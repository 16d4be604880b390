package overlay

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
)

// explained is a peer with candidates in every state.
func explained(now time.Time) punch.Explanation {
	at := netip.MustParseAddrPort
	ago := func(s int) time.Time { return now.Add(-time.Duration(s) * time.Second) }
	both := []punch.Source{punch.Published, punch.Signalled}
	return punch.Explanation{
		Online:  true,
		Signals: punch.Signals{Sent: 4, Failed: 1, Heard: 3, LastSent: ago(9), LastHeard: ago(2)},
		Pairs: []punch.PairReport{
			{Remote: at("203.0.113.2:41641"), Type: punch.ServerReflexive, From: both, State: punch.PairSilent, Openers: 2, Checks: 14, First: ago(60), Last: ago(3)},
			{Remote: at("203.0.113.2:41642"), Type: punch.ServerReflexive, From: both, State: punch.PairSilent, Openers: 1, Checks: 7, First: ago(50), Last: ago(5)},
			{Remote: at("192.168.7.2:41641"), Type: punch.Host, From: both[1:], State: punch.PairBarred, Obstacle: punch.OtherSite},
			{Remote: at("[2001:db8::2]:41641"), Type: punch.Host, From: both, State: punch.PairBarred, Obstacle: punch.OtherFamily},
			{Remote: at("203.0.113.9:1"), Type: punch.PeerReflexive, From: []punch.Source{punch.Learnt}, State: punch.PairBarred, Obstacle: punch.Unsendable, Err: errors.New("x: network is unreachable")},
			{Remote: at("[fd00::1]:32768"), Type: punch.Relayed, From: []punch.Source{punch.ByRelay}, State: punch.PairValid, Selected: true, Checks: 9, Answers: 9},
		},
		Refused: []punch.Refusal{{Candidate: punch.Candidate{Addr: at("127.0.0.1:9"), Type: punch.Host}, From: punch.Signalled, Obstacle: punch.Unusable}},
	}
}

func TestTotals(t *testing.T) {
	now := time.Now()
	e := explained(now)
	got := totalsOf(e)
	if got.err == nil {
		t.Error("no error")
	}
	got.err = nil
	want := totals{
		direct: 6, barred: 3, family: 1, refused: 1, tried: 2, openers: 3, checks: 21,
		first: e.Pairs[0].First, last: e.Pairs[0].Last,
	}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestPeerSide(t *testing.T) {
	m := &member{record: trust.Record{Serial: 1}}
	side := peerSide(m, explained(time.Now()), true)
	if !side.Told || side.UDP != udpPasses || !side.IPv4 || !side.IPv6 || strings.Join(side.Public, " ") != "203.0.113.2" || side.NAT.Mapping != endpointDependent {
		t.Errorf("%+v", side)
	}
	if side := peerSide(m, explained(time.Now()), false); len(side.Public) != 0 {
		t.Errorf("addresses are told: %+v", side)
	}
	silent := punch.Explanation{Signals: punch.Signals{Heard: 1}}
	if side := peerSide(&member{}, silent, true); !side.Told || side.UDP != udpBlocked {
		t.Errorf("%+v", side)
	}
	if side := peerSide(&member{}, punch.Explanation{}, true); side.Told || side.UDP != "" {
		t.Errorf("%+v", side)
	}
}

// TestStepTexts has what was said and sent counted in words.
func TestStepTexts(t *testing.T) {
	now := time.Now()
	e := explained(now)
	h := hurdles{peer: "bob", online: true, now: now, totals: totalsOf(e)}
	for _, x := range []struct {
		got         WhyStep
		state, text string
	}{
		{signalStep(h, e), stepOK, "4 sent (1 of them not carried), 3 heard, the last 2 s ago"},
		{signalStep(h, punch.Explanation{}), "", "nothing was said yet"},
		{signalStep(h, punch.Explanation{Signals: punch.Signals{Sent: 1, LastSent: now}}), "", "1 sent, 0 heard"},
		{signalStep(h, punch.Explanation{Signals: punch.Signals{Sent: 1, LastSent: now.Add(-time.Minute)}}), stepFailed, "1 sent, 0 heard"},
		{checkStep(h), stepFailed, "21 and 3 openers to 2 addresses in 60 s: 0 answered, 0 of bob's heard"},
		{checkStep(hurdles{now: now}), "", "none was sent"},
	} {
		if x.got.State != x.state || x.got.Text != x.text {
			t.Errorf("%+v, want %q %q", x.got, x.state, x.text)
		}
	}
	if got := candidateText(h); got != "6, of which 3 can be tried from here" {
		t.Error(got)
	}
}

// TestDirectVerdict has the path say what it is and what it beat.
func TestDirectVerdict(t *testing.T) {
	w := &Why{Name: "bob", Path: PathStatus{Kind: "direct", Via: "srflx"}}
	e := punch.Explanation{Pairs: []punch.PairReport{
		{Selected: true, State: punch.PairValid, RTT: 10 * time.Millisecond},
		{Type: punch.Relayed, State: punch.PairValid, RTT: 61 * time.Millisecond},
		{Type: punch.Host, State: punch.PairSilent},
	}}
	if got := w.directText(e); got != "bob is reached directly, at its NAT's address, as a server saw it; it is preferred to a relay in 61.0 ms" {
		t.Error(got)
	}
	if got := w.directText(punch.Explanation{Before: punch.Path{Type: punch.Relayed}}); !strings.HasSuffix(got, "; it took over from a relay") {
		t.Error(got)
	}
	for path, want := range map[PathStatus]string{
		{Kind: "none"}:                                    "bob is not reached",
		{Kind: "relay", Relay: "fra"}:                     "bob is to be reached over relay fra, which is down",
		{Kind: "relay", Relay: "fra", Via: "relay-tls"}:   "bob is reached over relay fra (tls)",
		{Kind: "relay", Relay: "carl", Via: "peer-relay"}: "bob is reached over relay carl (peer, udp)",
	} {
		w.Path = path
		if got := w.relayedText(path.Via != ""); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestPortList(t *testing.T) {
	for _, x := range []struct {
		ports []uint16
		want  string
	}{{nil, ""}, {[]uint16{443}, "443"}, {[]uint16{3479, 443, 3478}, "443, 3478 and 3479"}} {
		if got := numbers(x.ports); got != x.want {
			t.Errorf("%q, want %q", got, x.want)
		}
	}
}
