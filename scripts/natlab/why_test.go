package natlab

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"overlay/overlay"
)

const (
	// whySettle is how long a direct path is looked for before its absence is
	// explained.
	whySettle = 6 * time.Second
	whyPoll   = 200 * time.Millisecond
)

// randomize has the router of a home give every destination another port, at
// random.
func (h *Home) randomize(t *testing.T) {
	t.Helper()
	var s script
	s.add("nft flush chain ip nat post")
	s.add("nft add rule ip nat post oifname wan meta l4proto udp masquerade fully-random")
	s.add("nft add rule ip nat post oifname wan masquerade")
	if err := h.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

// why asks a node until it names a cause, and gives the text as well.
func (n *member) why(t *testing.T, peer *member, cause string) (overlay.Why, string) {
	t.Helper()
	return n.whyUntil(t, peer, whySettle, func(w overlay.Why) bool { return strings.Contains(w.Verdict, cause) })
}

// whyUntil asks a node until that says enough.
func (n *member) whyUntil(t *testing.T, peer *member, limit time.Duration, enough func(overlay.Why) bool) (w overlay.Why, text string) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(whyPoll) {
		out, err := n.run(t.Context(), "why", peer.nodeName, "--json")
		if err != nil {
			t.Fatal(err)
		}
		w = overlay.Why{}
		if err := json.Unmarshal([]byte(out), &w); err != nil || w.Schema != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		if enough(w) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after %v %s says of %s no more than %s", limit, n.nodeName, peer.nodeName, out)
		}
	}
	text, err := n.run(t.Context(), "why", peer.nodeName)
	if err != nil {
		t.Fatal(err)
	}
	if testing.Verbose() {
		fmt.Printf("--- overlay why %s, on %s\n%s\n", peer.nodeName, n.nodeName, text)
	}
	return w, text
}

// netcheck looks at a node's network.
func (n *member) netcheck(t *testing.T) overlay.Netcheck {
	t.Helper()
	out, err := n.run(t.Context(), "netcheck", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var c overlay.Netcheck
	if err := json.Unmarshal([]byte(out), &c); err != nil || c.Schema != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	if testing.Verbose() {
		text, err := n.run(t.Context(), "netcheck")
		fmt.Printf("--- overlay netcheck, on %s (%v)\n%s\n", n.nodeName, err, text)
	}
	return c
}

// cause is what `overlay why` has to say of a pair that is not direct.
type cause struct {
	verdict, step, help string
}

func (c cause) must(t *testing.T, n, peer *member) {
	t.Helper()
	w, text := n.why(t, peer, c.verdict)
	if !strings.Contains(w.Verdict, c.verdict) || w.Failed != c.step || !strings.Contains(strings.Join(w.Help, "\n"), c.help) {
		t.Errorf("%s says of %s: %q, failed %q, help %q; want %+v", n.nodeName, peer.nodeName, w.Verdict, w.Failed, w.Help, c)
	}
	for _, want := range []string{w.Verdict, "what would help", c.help} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the text:\n%s", want, text)
		}
	}
	if st := pathTo(n.status(t), peer.nodeName); !strings.HasSuffix(w.Verdict, ": "+st.Reason) {
		t.Errorf("status says %q, why says %q", st.Reason, w.Verdict)
	}
}

// TestWhyNamesTheCause has `overlay why` name what stands in the way, on both
// sides, and what would help; and netcheck judge the same networks.
func TestWhyNamesTheCause(t *testing.T) {
	needLab(t)
	asideNamed(t, []namedTest{
		{"udp blocked on one side", func(t *testing.T) {
			m := newMesh(t)
			a, b := m.join(t, m.laptopAt(t, "a", Only443)), m.join(t, m.laptopAt(t, "b", Masquerade))
			cause{verdict: "this network passes no UDP", step: "udp here", help: "let UDP packets out of this network"}.must(t, a, b)
			cause{verdict: "a's network passes no UDP", step: "udp there", help: "let UDP packets out of a's network"}.must(t, b, a)
			judged(t, a, "UDP is blocked: paths go over relays by TLS", "blocked")
			judged(t, b, "direct paths work with nearly all networks", "passes")
		}},
		{"random ports on both sides", func(t *testing.T) {
			m := newMesh(t)
			one, two := m.laptopAt(t, "a", Masquerade), m.laptopAt(t, "b", Masquerade)
			one.home.randomize(t)
			two.home.randomize(t)
			a, b := m.join(t, one), m.join(t, two)
			for _, x := range [][2]*member{{a, b}, {b, a}} {
				cause{verdict: "both NATs choose another port for every destination", step: "checks", help: "forward UDP port "}.must(t, x[0], x[1])
				judged(t, x[0], "hard NAT: ports chosen per destination at random", "passes")
			}
		}},
		{"server's relay only over TLS", func(t *testing.T) {
			m := newMesh(t)
			if err := m.BlockUDP(t.Context(), m.server.Addr()); err != nil {
				t.Fatal(err)
			}
			// Their routers answer unexpected TCP, or there would be a path over TCP.
			a, b := m.join(t, m.laptopAt(t, "a", Reset)), m.join(t, m.laptopAt(t, "b", Reset))
			for _, x := range [][2]*member{{a, b}, {b, a}} {
				cause{verdict: "the server answers neither this machine nor " + x[1].nodeName + " over UDP", step: "udp here", help: "let UDP ports 443, 3478 and 3479 in on the server's firewall"}.must(t, x[0], x[1])
			}
			judged(t, a, "UDP is blocked, here or at the server", "blocked")
		}},
		{"peer offline", func(t *testing.T) {
			_, a, b := pair(t, Masquerade, Masquerade)
			mustDirect(t, a, b)
			w, text := a.why(t, b, "is reached directly")
			if w.Failed != "" || w.Since == nil || w.Path.Kind != "direct" || !strings.Contains(text, "answers, in use") {
				t.Errorf("%+v:\n%s", w, text)
			}
			if err := b.down(t.Context()); err != nil {
				t.Fatal(err)
			}
			gone := func(st overlay.Status) bool { return pathTo(st, b.nodeName).Kind != "direct" }
			if _, err := a.await(t.Context(), offlineWait, gone); err != nil {
				t.Fatal(err)
			}
			cause{verdict: "b is not connected", step: "peer", help: "sudo overlay up"}.must(t, a, b)
		}},
		{"public", func(t *testing.T) {
			m := newMesh(t)
			judged(t, m.join(t, m.laptopAt(t, "a", Public)), "no NAT: direct paths work with every network", "passes")
		}},
	})
}

// offlineWait is how long a path lives whose peer is gone.
const offlineWait = 45 * time.Second

// judged wants a verdict of netcheck.
func judged(t *testing.T, n *member, verdict, udp string) {
	t.Helper()
	c := n.netcheck(t)
	if !strings.HasPrefix(c.Verdict, verdict) || c.UDP != udp || !c.Online || len(c.Relays) == 0 {
		t.Errorf("%s: %+v, want %q", n.nodeName, c, verdict)
	}
}

// TestNetcheckLifetime measures how long a router keeps mappings that are left
// alone: 10 s here, once both sides have sent.
func TestNetcheckLifetime(t *testing.T) {
	m := newMesh(t)
	a := m.join(t, m.laptopAt(t, "a", ShortTimeouts))
	out, err := a.run(t.Context(), "netcheck", "--lifetime", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var c overlay.Netcheck
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		t.Fatal(err)
	}
	if l := c.Lifetime; l == nil || l.BelowS == nil || *l.BelowS > 20 || l.AtLeastS > 10 {
		t.Errorf("lifetime %+v of %s", c.Lifetime, out)
	}
}

// TestWhyTellsOfRounds has `overlay why` tell what is planned where ports have to be
// guessed, what that took and what comes next, and that nothing is where it cannot.
func TestWhyTellsOfRounds(t *testing.T) {
	needLab(t)
	const step = "hard rounds"
	asideNamed(t, []namedTest{
		{"block", func(t *testing.T) {
			_, a, b := pair(t, Block, Block)
			for _, x := range [][2]*member{{a, b}, {b, a}} {
				w, text := x[0].whySending(t, x[1], func(w overlay.Why) bool { return w.Rounds.Ended != "" })
				r := w.Rounds
				if r.Ended == "" || r.Kind != "birthday" || r.Sockets == 0 || r.Targets == 0 || r.Low < blockStart-roundsMargin || r.High >= blockStart+1024+roundsMargin || r.Packets == 0 || r.Spent < r.Packets || r.Packets > 1200 {
					t.Errorf("%+v", r)
				}
				if !strings.Contains(text, step) || !strings.Contains(text, "ports tried at random") {
					t.Errorf("not in the text:\n%s", text)
				}
				if r.Ended == "in-vain" && (r.State != "paused" && r.State != "back-off" || r.Next == nil) {
					t.Errorf("after a round in vain: %+v", r)
				}
			}
		}},
		{"sequential", func(t *testing.T) {
			_, a, b := pair(t, Sequential, Masquerade)
			mustDirect(t, a, b)
			w, text := a.whySending(t, b, func(w overlay.Why) bool { return w.Rounds.Ended == "found" })
			if r := w.Rounds; r.Kind != "predicted" || r.Ended != "found" || !strings.Contains(text, "ports predicted") {
				t.Errorf("%+v\n%s", r, text)
			}
		}},
		{"random", func(t *testing.T) {
			_, a, b := pair(t, Random, Random)
			w, text := a.whySending(t, b, func(w overlay.Why) bool { return w.Rounds.State == "useless" })
			if r := w.Rounds; r.State != "useless" || r.Spent != 0 || !strings.Contains(text, "none: a side's ports are random") {
				t.Errorf("%+v\n%s", r, text)
			}
		}},
	})
}

// whySending is whyUntil of a node that sends to the other.
func (n *member) whySending(t *testing.T, peer *member, enough func(overlay.Why) bool) (overlay.Why, string) {
	t.Helper()
	ping := startPing(t, n.Host, peer.addr, whyPoll)
	defer ping.stop(t)
	return n.whyUntil(t, peer, roundsWait, enough)
}

// roundsWait is how long the first round may take to be over.
const roundsWait = 20 * time.Second

// roundsMargin is how far beyond a block the estimate of it may reach.
const roundsMargin = 256
