package main

import (
	"slices"
	"testing"
	"time"
)

func TestParseOptions(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		ok   func(*options) bool
	}{
		"nothing": {nil, func(o *options) bool {
			return o.verb == verbCompare && o.pairs == 5 && o.seconds == 10 && slices.Equal(o.variants, list{"raw", "plain", "overlay"})
		}},
		"flags without verb": {[]string{"--quick", "--only", "tcp1,ping-bbr"}, func(o *options) bool {
			return o.verb == verbCompare && o.pairs == 1 && o.seconds == 2 && slices.Equal(o.only, list{"tcp1", "ping-bbr"})
		}},
		"control": {[]string{"compare", "--control"}, func(o *options) bool { return slices.Equal(o.variants, list{"raw", "control"}) }},
		"loss":    {[]string{"loss", "--only", "tcp1-cubic", "--settings", "clean,loss0.05"}, func(o *options) bool { return o.verb == verbLoss }},
		"paths":   {[]string{"paths", "--only", "nat-up"}, func(o *options) bool { return o.verb == verbPaths }},
		"relay": {[]string{"relay", "--pairs", "3", "--only", "slow-reader"}, func(o *options) bool {
			return slices.Equal(o.variants, list{"direct", "relay-udp", "relay-tls"}) && o.pairs == 3
		}},
		"relay alone": {[]string{"relay", "--variants", "relay-tls"}, func(o *options) bool { return slices.Equal(o.variants, list{"relay-tls"}) }},
		"pour":        {[]string{"pour", "-to", "::", "-mbps", "100"}, func(o *options) bool { return o.mbps == 100 && o.wait == time.Second }},
		"profile":     {[]string{"profile", "--variant", "raw"}, func(o *options) bool { return o.variant == variantRaw }},
		"soak":        {[]string{"soak", "--minutes", "2"}, func(o *options) bool { return o.minutes == 2 && o.variant == variantOverlay }},
		"paced":       {[]string{"soak", "--mbps", "300"}, func(o *options) bool { return o.mbps == 300 && o.minutes == 30 }},
		"ping":        {[]string{"ping", "-to", "::", "-for", "3s"}, func(o *options) bool { return o.every == pingEvery && o.wait == 3*time.Second }},
	} {
		t.Run(name, func(t *testing.T) {
			o, err := parseOptions(c.args)
			if err != nil || !c.ok(o) {
				t.Errorf("%+v, %v", o, err)
			}
		})
	}
	for _, args := range [][]string{
		{"race"},
		{"compare", "more"},
		{"--variants", "raw,fast"},
		{"--variants", "raw,raw"},
		{"--only", "tcp9"},
		{"loss", "--only", "udp64"},
		{"loss", "--settings", "loss2"},
		{"--pairs", "0"},
		{"--seconds", "1"},
		{"soak", "--minutes", "0"},
		{"soak", "--pairs", "3"},
		{"soak", "--mbps", "1"},
		{"soak", "--mbps", "-10"},
		{"--mbps", "100"},
		{"relay", "--variants", "raw"},
		{"relay", "--control"},
		{"relay", "--only", "udp64"},
		{"--variants", "relay-udp"},
		{"pour", "-mbps", "1"},
		{"profile", "--variant", "control"},
		{"ping", "-every", "0s"},
		{"ping", "-every", "1ms", "-for", "1h"},
	} {
		if o, err := parseOptions(args); err == nil {
			t.Errorf("%v passes: %+v", args, o)
		}
	}
}
