package overlay

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlay/punch"
)

func TestReasons(t *testing.T) {
	now := time.Now()
	tried := punch.Attempt{Calls: 2, Since: now.Add(-time.Minute), Answered: true, Public: true, Mapped: true}
	with := func(change func(*punch.Attempt)) punch.Attempt {
		a := tried
		change(&a)
		return a
	}
	udp, tls, none := reach{links: 1, udp: 1}, reach{links: 1, tls: 1}, reach{links: 1}
	for _, x := range []struct {
		h    hurdles
		want string
	}{
		{hurdles{online: true, reach: udp, attempt: tried}, "no answer on any direct path"},
		{hurdles{online: true, reach: tls, attempt: with(func(a *punch.Attempt) { a.Mapped = false })}, "this network passes no UDP"},
		{hurdles{online: true, reach: tls, attempt: punch.Attempt{}}, "this network passes no UDP"}, // known at once
		{hurdles{online: true, reach: tls, attempt: tried}, "no relay answers over UDP"},            // it passed once
		{hurdles{online: true, reach: none, attempt: tried}, "no relay is reached"},
		{hurdles{online: true, reach: udp, attempt: with(func(a *punch.Attempt) { a.Public = false })}, "bob's network passes no UDP"},
		{hurdles{online: true, reach: udp, attempt: with(func(a *punch.Attempt) { a.Since = now; a.Public = false })}, "still looking"},
		{hurdles{online: true, reach: udp}, "still looking"},
		{hurdles{online: true, reach: udp, attempt: with(func(a *punch.Attempt) { a.Answered = false })}, "bob has answered no call"},
		{hurdles{online: true, reach: none, attempt: with(func(a *punch.Attempt) { a.Mapped = false })}, "no relay"},
		{hurdles{online: true, reach: none}, "still looking"},
		{hurdles{reach: none}, "bob is not connected"},
		{hurdles{reach: udp}, "bob is not connected"},
		{hurdles{reach: udp, attempt: tried}, "bob is not connected"},                        // it was demanded
		{hurdles{reach: udp, reached: true, attempt: tried}, "no answer on any direct path"}, // only the server lost it
	} {
		x.h.peer, x.h.now, x.h.server = "bob", now, true
		if x.h.reach.noUDP() {
			x.h.udp = udpBlocked
		}
		if got := x.h.reason(); !strings.Contains(got, x.want) {
			t.Errorf("%+v: %q, want %q", x.h, got, x.want)
		}
	}
}

func TestCausesOfSilence(t *testing.T) {
	now := time.Now()
	tried := punch.Attempt{Calls: 2, Since: now.Add(-time.Minute), Answered: true, Public: true, Mapped: true}
	unmapped := tried
	unmapped.Mapped = false
	easy, hard := NATStatus{Mapping: endpointIndependent}, NATStatus{Mapping: addressPortDependent, Allocation: punch.Random.String()}
	told := NATStatus{Mapping: endpointDependent}
	udp, tls := reach{links: 1, udp: 1}, reach{links: 1, tls: 1}
	sent := totals{direct: 2, tried: 2, checks: 14}
	for _, x := range []struct {
		h          hurdles
		step, want string
		help       string
	}{
		{hurdles{here: hard, there: told}, stepChecks, "both NATs choose another port for every destination, at random", "forward UDP port 41641 "},
		{hurdles{here: told, there: told}, stepChecks, "both NATs choose another port for every destination", "PCP"},
		{hurdles{here: hard, there: easy}, stepChecks, "the NAT here chooses another port", "IPv6"},
		{hurdles{here: easy, there: told}, stepChecks, "bob's NAT chooses another port", "router"},
		{hurdles{here: easy, there: easy}, stepChecks, "no answer on any direct path", "router"},
		{hurdles{totals: totals{direct: 1, tried: 1, checks: 3, heard: 4}}, stepChecks, "bob's packets arrive here, but ours do not", "router"},
		{hurdles{totals: totals{direct: 1, tried: 1, answers: 3, heard: 4}}, stepPath, "stopped answering", "wait"},
		{hurdles{totals: totals{direct: 2, barred: 2, family: 2}}, stepCandidates, "IP version that this machine has not", "IPv6"},
		{hurdles{totals: totals{direct: 2, barred: 2, family: 1}}, stepCandidates, "none of bob's addresses", "table"},
		{hurdles{totals: totals{direct: 2, barred: 1, refused: 1, err: fmt.Errorf("send to 192.0.2.1:7: %w", syscall.EPERM)}}, stepChecks, "cannot send to bob: operation not permitted", "firewall"},
		{hurdles{reach: tls, attempt: unmapped, mute: true, ports: "443, 3478 and 3479"}, stepUDPHere, "the server answers neither this machine nor bob over UDP", "443, 3478 and 3479 in on the server"},
		{hurdles{reach: tls, attempt: unmapped}, stepUDPHere, "this network passes no UDP", "let UDP packets out of this network"},
	} {
		x.h.peer, x.h.now, x.h.online, x.h.port = "bob", now, true, 41641
		if x.h.reach == (reach{}) {
			x.h.reach, x.h.attempt = udp, tried
		}
		if x.h.reach.noUDP() {
			x.h.udp = udpBlocked
		}
		if x.h.totals == (totals{}) {
			x.h.totals = sent
		}
		d := x.h.diagnose()
		if d.step != x.step || !strings.Contains(d.reason, x.want) || !strings.Contains(strings.Join(d.help, "\n"), x.help) {
			t.Errorf("%+v:\n%+v, want %s: %q and %q", x.h, d, x.step, x.want, x.help)
		}
		if strings.ContainsAny(d.reason, "\n") || strings.Contains(d.reason, "192.0.2.1") {
			t.Errorf("reason %q", d.reason)
		}
	}
}

// A help for those who may not know the port does not name it.
func TestHelpKeepsThePort(t *testing.T) {
	h := hurdles{peer: "bob"}
	if text := strings.Join(h.open(), "\n"); !strings.Contains(text, "forward a UDP port to this machine") {
		t.Error(text)
	}
}
