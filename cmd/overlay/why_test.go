package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlay/overlay"
)

// TestWhyPage shows a pair that is relayed because both NATs are hard.
func TestWhyPage(t *testing.T) {
	now := time.Now()
	ago := func(s int) *time.Time { at := now.Add(-time.Duration(s) * time.Second); return &at }
	near, far, trip, yes := 30.2, 61.4, 31, false
	w := overlay.Why{
		Name: "bob", Online: true, Path: overlay.PathStatus{Kind: "relay", Via: "relay-udp", Relay: "fra"}, RTTms: &far,
		Since: ago(130), Before: overlay.PathStatus{Kind: "none"}, NextRound: ago(-12),
		Here: overlay.Side{Told: true, UDP: "passes", IPv4: true, Public: []string{"203.0.113.1"}, NAT: overlay.NATStatus{
			Mapping: "address-and-port-dependent", Allocation: "random", Preserves: &yes,
		}},
		There:  overlay.Side{Told: true, UDP: "passes", IPv4: true, IPv6: true, Public: []string{"203.0.113.2"}, NAT: overlay.NATStatus{Mapping: "endpoint-dependent"}},
		Relays: []overlay.RelayLeg{{RelayStatus: overlay.RelayStatus{Name: "fra", Transport: "udp", RTTms: &near, Home: true}, PeerTripMs: &trip, PeerHere: true}},
		Pairs: []overlay.WhyPair{
			{Relay: "fra", Kind: "relay", From: []string{"relay"}, State: "valid", Selected: true, Checks: 9, Answers: 9, Last: ago(1), RTTms: &far},
			{Remote: "203.0.113.2:41641", Kind: "srflx", From: []string{"published", "signalled"}, State: "silent", Openers: 2, Checks: 14, Last: ago(3)},
			{Remote: "192.168.7.2:41641", Kind: "host", From: []string{"signalled"}, State: "barred", Obstacle: "other-site"},
			{Remote: "203.0.113.9:1\x1b", Kind: "prflx", From: []string{"learnt"}, State: "suspect", Checks: 3, Answers: 2, Heard: 1, Last: ago(70), Answered: ago(70), Withheld: 4},
		},
		Steps: []overlay.WhyStep{
			{Name: "server", State: "ok", Text: "connected to the server"},
			{Name: "udp there", State: "", Text: "not known yet"},
			{Name: "checks", State: "failed", Text: "14 and 2 openers"},
			{Name: "path", State: "failed", Text: "none answers"},
		},
		Failed: "checks", Verdict: "bob is reached over relay fra (udp): both NATs choose another port for every destination",
		Help: []string{"switch PCP, NAT-PMP or UPnP on, on either router"},
	}
	wantPage(t, whyPage, func(out *strings.Builder) error { return showWhy(out, w, now) })
}

const whyPage = `bob is reached over relay fra (udp): both NATs choose another port for every destination

path      relay fra (udp), 61 ms, chosen 2 min ago
here      203.0.113.1; no IPv6; UDP passes
          NAT: another port for every destination (address-and-port-dependent), chosen at random
bob       203.0.113.2; IPv4 and IPv6; UDP passes
          NAT: another port for every destination (endpoint-dependent)
relay     fra: udp, 30 ms from here, 31 ms from bob, home
next try  in 13 s

  server     ok          connected to the server
  udp there  -           not known yet
  checks     FAILED <--  14 and 2 openers
  path       FAILED      none answers

CANDIDATE          KIND   NAMED BY             SENT  BACK        LAST SENT  RTT    STATE
fra                relay  relay                0+9   9, heard 0  1 s ago    61 ms  answers, in use
203.0.113.2:41641  srflx  published,signalled  2+14  0, heard 0  3 s ago    -      no answer
192.168.7.2:41641  host   signalled            -     -           -          -      not tried: a private address of another network
203.0.113.9:1?     prflx  learnt               0+3   2, heard 1  70 s ago   -      does not answer any more, answered 70 s ago, 4 held back by the limits

what would help
  - switch PCP, NAT-PMP or UPnP on, on either router
`

// TestWhyOldAnswer says when UDP answered last where it does not any more.
func TestWhyOldAnswer(t *testing.T) {
	now := time.Now()
	at := now.Add(-40 * time.Second)
	for udp, want := range map[string]string{
		"": "UDP not known, last answer 40 s ago", "blocked": "UDP does not pass, last answer 40 s ago", "passes": "UDP passes",
	} {
		if got := sideFacts("here", overlay.Side{Told: true, UDP: udp, UDPAnswer: &at}, now)[0][1]; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestPingNamesTCP says which direct path is a connection.
func TestPingNamesTCP(t *testing.T) {
	ms := 31.0
	for via, want := range map[string]string{
		"tcp": "pong from bob (100.90.0.2) via 198.51.100.2:5 (tcp) in 31 ms", "srflx": "pong from bob (100.90.0.2) via 198.51.100.2:5 in 31 ms",
	} {
		r := overlay.PingReply{Name: "bob", IP: netip.MustParseAddr("100.90.0.2"), OK: true, RTTms: &ms, Path: overlay.PathStatus{Kind: "direct", Endpoint: "198.51.100.2:5", Via: via}}
		if got := pingText(r); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// wantPage compares what is printed line by line.
func wantPage(t *testing.T, want string, show func(*strings.Builder) error) {
	t.Helper()
	var out strings.Builder
	if err := show(&out); err != nil {
		t.Fatal(err)
	}
	if out.String() == want {
		return
	}
	got, lines := strings.Split(out.String(), "\n"), strings.Split(want, "\n")
	for i := range max(len(got), len(lines)) {
		g, w := "", ""
		if i < len(got) {
			g = got[i]
		}
		if i < len(lines) {
			w = lines[i]
		}
		if g != w {
			t.Errorf("line %d is\n%q, want\n%q", i+1, g, w)
		}
	}
}

// TestNetcheckPages shows a network that is easy, and one that passes no UDP.
func TestNetcheckPages(t *testing.T) {
	rtt, no, yes := 40.1, false, true
	below, mtu, link := 40, 1280, 1500
	n := overlay.Netcheck{
		Name: "anna", Server: "198.51.100.1:443", Online: true, UDP: "passes", Asked: 3, Answered: 3,
		Addresses: []string{"192.168.1.2"}, Public: []string{"203.0.113.1"},
		Observed: []overlay.Observed{{Server: "198.51.100.1:443", Mapped: "203.0.113.1:41641", OK: true, Port: 443}, {Server: "198.51.100.1:3478", Port: 3478}},
		IPv4:     overlay.FamilyLook{Own: true, Asked: 3, Answered: 3, RTTms: &rtt},
		NAT:      overlay.NATStatus{Mapping: "endpoint-independent", Allocation: "preserving", Filtering: "address-and-port-dependent", Hairpin: &no},
		Lifetime: &overlay.Lifetime{AtLeastS: 28, BelowS: &below},
		Relays:   []overlay.RelayStatus{{Name: "198.51.100.1", Transport: "udp", RTTms: &rtt, Home: true}},
		Verdict:  "direct paths work with nearly all networks",
		Routers: []overlay.RouterLook{
			{Router: "192.168.1.1", Protocol: "pcp", External: "100.64.0.9:7000", Outer: "100.64.0.9", OuterKind: "carrier", Settled: true},
			{Router: "fe80::1", Refused: []overlay.RouterRefusal{{Protocol: "pcp", Words: "the router refuses: result 2, not authorized"}}, Silent: []string{"upnp"}, Settled: true},
			{OuterKind: "private"},
		},
		DoubleNAT: &yes, MTU: &mtu, LinkMTU: &link,
	}
	wantPage(t, easyPage, func(out *strings.Builder) error { return showNetcheck(out, n) })
	n = overlay.Netcheck{
		Name: "anna", Online: true, UDP: "blocked", Asked: 3, Observed: []overlay.Observed{{Port: 443}}, IPv4: overlay.FamilyLook{Own: true, Asked: 3},
		Relays:  []overlay.RelayStatus{{Name: "server", Transport: "tls", RTTms: &rtt, Home: true, Trouble: "no answer\x1b"}},
		Verdict: "UDP is blocked: paths go over relays by TLS", Help: []string{"let UDP out"},
	}
	wantPage(t, blockedPage, func(out *strings.Builder) error { return showNetcheck(out, n) })
	n.MappingTrouble = "find the router: no netlink"
	page := strings.Replace(blockedPage, "no router to ask", "not asked: find the router: no netlink", 1)
	wantPage(t, page, func(out *strings.Builder) error { return showNetcheck(out, n) })
}

const easyPage = `direct paths work with nearly all networks

server         198.51.100.1:443: connected
proxy          none
udp            passes: 3 of 3 server ports answer
ipv4           40 ms to the nearest server
ipv6           no address that leads out
addresses      192.168.1.2
public         203.0.113.1
seen at        203.0.113.1:41641 by 198.51.100.1:443
               no answer from 198.51.100.1:3478
nat            one port for all destinations (endpoint-independent), the machine's own
filtering      address-and-port-dependent: only who was sent to may answer
hairpin        no
lifetime       between 28 and 40 s
port mapping   192.168.1.1 forwards 100.64.0.9:7000 by pcp, an address of the provider's: of use behind the same NAT only
               fe80::1 forwards none: pcp: the router refuses: result 2, not authorized; no answer by upnp
               the router forwards none: still asked; its own address is private, of another router's network
double nat     yes
carrier's nat  not known
mtu            1280 to the server, 1500 on this machine's link

RELAY         LINK  RTT    NOTE
198.51.100.1  udp   40 ms  home
`

const blockedPage = `UDP is blocked: paths go over relays by TLS

server         connected
proxy          none
udp            does not pass: 0 of 3 server ports answer
ipv4           an address of its own, but no server answers
ipv6           no address that leads out
seen at        no answer from port 443
nat            not known
filtering      not measured
hairpin        not measured
lifetime       not measured; see --lifetime
port mapping   no router to ask
double nat     not known
carrier's nat  not known
mtu            not measured

RELAY   LINK  RTT    NOTE
server  tls   40 ms  home; no answer?

what would help
  - let UDP out
`
