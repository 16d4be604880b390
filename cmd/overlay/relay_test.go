package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"overlay/overlay"
)

func TestPathText(t *testing.T) {
	for want, p := range map[string]overlay.PathStatus{
		"direct 192.0.2.1:5 (srflx)":      {Kind: "direct", Endpoint: "192.0.2.1:5", Via: "srflx"},
		"direct (srflx)":                  {Kind: "direct", Via: "srflx"},
		"relay vpn.example.org (udp)":     {Kind: "relay", Via: "relay-udp", Relay: "vpn.example.org", Endpoint: "[fd00::2]:32769"},
		"relay fra (tls)":                 {Kind: "relay", Via: "relay-tls", Relay: "fra"},
		"relay carol (peer, udp)":         {Kind: "relay", Via: "peer-relay", Relay: "carol"},
		"relay (tls)":                     {Kind: "relay", Via: "relay-tls"},
		"relay fra":                       {Kind: "relay", Relay: "fra"},
		"none":                            {Kind: "none"},
		"direct [2001:db8::1]:5 (mapped)": {Kind: "direct", Endpoint: "[2001:db8::1]:5", Via: "mapped"},
	} {
		if got := pathText(p); got != want {
			t.Errorf("%+v: %q, want %q", p, got, want)
		}
	}
}

func TestPongNamesTheRelay(t *testing.T) {
	rtt := 31.4
	r := overlay.PingReply{
		Name: "bob", OK: true, RTTms: &rtt,
		Path: overlay.PathStatus{Kind: "relay", Endpoint: "[fd00::2]:32769", Via: "relay-udp", Relay: "fra"},
	}
	if got := pingText(r); !strings.HasSuffix(got, " via relay fra (udp) in 31 ms") {
		t.Error(got)
	}
	r.Path = overlay.PathStatus{Kind: "direct", Endpoint: "192.0.2.1:5", Via: "host"}
	if got := pingText(r); !strings.HasSuffix(got, " via 192.0.2.1:5 in 31 ms") {
		t.Error(got)
	}
}

func TestStatusShowsRelaysAndReasons(t *testing.T) {
	near, far := 1.5, 30.0
	cmd := &cobra.Command{}
	var out bytes.Buffer
	cmd.SetOut(&out)
	err := showStatus(cmd, overlay.Status{
		Self: overlay.SelfStatus{Name: "anna", Online: true},
		Peers: []overlay.PeerStatus{
			{Name: "bob", Online: true, RTTms: &far, Path: overlay.PathStatus{Kind: "relay", Via: "relay-tls", Relay: "fra", Reason: "this network\x1b passes no UDP"}},
			{Name: "carl", Online: true, Path: overlay.PathStatus{Kind: "direct", Endpoint: "192.0.2.1:5", Via: "host", Reason: "old"}},
			{Name: "dora", Path: overlay.PathStatus{Kind: "none"}},
		},
		Relays: []overlay.RelayStatus{
			{Name: "vpn.example.org", Transport: "udp", RTTms: &near, Home: true},
			{Name: "fra", Transport: "tls", RTTms: &far, Home: true, Trouble: "no answer over udp"},
			{Name: "nyc", Trouble: "connection refused"},
			{Name: "tok", Transport: "udp"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, got, _ := strings.Cut(out.String(), "\n\n")
	want := `vpn.example.org  udp   1.5 ms  home
fra              tls   30 ms   home; no answer over udp
nyc              down  -       connection refused
tok              udp   -       -

bob is not direct: this network? passes no UDP
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if bob := strings.Fields(strings.Split(out.String(), "\n")[1]); len(bob) < 7 || strings.Join(bob[3:7], " ") != "relay fra (tls) 30" {
		t.Errorf("bob's row %q", bob)
	}
}

func TestReasonIsToldWhenItIsNews(t *testing.T) {
	var note bytes.Buffer
	p := pinger{peer: "bob", untilDirect: true, answered: true, note: &note}
	for _, reason := range []string{"", "calling", "calling", "no UDP\n"} {
		p.explain(overlay.PingReply{OK: true, Path: overlay.PathStatus{Kind: "relay", Reason: reason}})
	}
	if want := "  not direct: calling\n  not direct: no UDP \n"; note.String() != want {
		t.Errorf("told %q, want %q", note.String(), want)
	}
	if err := p.verdict(); err == nil || !strings.HasSuffix(err.Error(), "not over a direct path yet: no UDP\n") {
		t.Errorf("verdict %v", err)
	}
}

func TestReadProxy(t *testing.T) {
	for _, tt := range []struct {
		name, upper, lower string
		flag               []string
		want               string // "-": nil
	}{
		{name: "nothing", want: "-"},
		{name: "flag", upper: "http://b:2", flag: []string{"--proxy", "http://a:1"}, want: "http://a:1"},
		{name: "none", upper: "http://b:2", flag: []string{"--proxy=none"}, want: ""},
		{name: "upper case first", upper: "http://b:2", lower: "http://c:3", want: "http://b:2"},
		{name: "lower case", lower: "http://u:p@c:3", want: "http://u:p@c:3"},
		{name: "no scheme", lower: "u:p@c:3", want: "http://u:p@c:3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("HTTPS_PROXY", tt.upper)
			t.Setenv("https_proxy", tt.lower)
			cmd := &cobra.Command{}
			flag := cmd.Flags().String("proxy", "", "")
			if err := cmd.ParseFlags(tt.flag); err != nil {
				t.Fatal(err)
			}
			p, err := readProxy(cmd, *flag)
			got := "-"
			if p != nil {
				got = *p
			}
			if err != nil || got != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
	t.Setenv("HTTPS_PROXY", "socks5://user:hunter2@p:1")
	_, err := readProxy(&cobra.Command{}, "")
	e, ok := errors.AsType[*overlay.Error](err)
	if !ok || e.Kind != overlay.Usage || strings.Contains(e.Message+e.Hint, "hunter2") || !strings.Contains(e.Message, "HTTPS_PROXY") {
		t.Errorf("a bad variable: %+v", err)
	}
}

func TestStatusShowsWhatIsRelayed(t *testing.T) {
	var out bytes.Buffer
	if err := showPeerRelay(&out, nil); err != nil || out.Len() > 0 {
		t.Errorf("nothing relayed: %q, %v", &out, err)
	}
	r := overlay.PeerRelayStatus{Port: 23456, Nodes: 3, Flows: 2, Bytes: 1_500_000, MaxFlows: 32, MaxMbits: 50}
	if err := showPeerRelay(&out, &r); err != nil {
		t.Fatal(err)
	}
	want := "\nrelays for others at port 23456: 2 of at most 32 pairs, 3 nodes, 1.5 MB so far, at most 50 Mbit/s\n"
	if out.String() != want {
		t.Errorf("%q, want %q", &out, want)
	}
}
