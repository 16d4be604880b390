package trust

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "7": true, "anna-laptop": true, "a--b": true, strings.Repeat("a", 63): true,
		"": false, strings.Repeat("a", 64): false, "-a": false, "a-": false, "-": false, "A": false,
		"a.b": false, "a_b": false, "a b": false, "büro": false, "a\x00": false, "a\x1b[31m": false,
	} {
		if err := ValidName(name); (err == nil) != want {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestNormalizeName(t *testing.T) {
	for host, want := range map[string]string{
		"Büro PC":                      "buero-pc",
		"Bu\u0308ro":                   "buero", // NFD
		"cafe\u0301":                   "cafe",
		"Straße":                       "strasse",
		"äöüß-æøœåðþıđ":                "aeoeuess-aeoeoeaadthid",
		"àçèğìľñóřşțùýż":               "acegilnorstuyz",
		"łódź":                         "lodz",
		"anna-laptop":                  "anna-laptop",
		"Anna’s MacBook":               "annas-macbook",
		"web01.example.org":            "web01",
		"__a__b__":                     "a-b",
		"a - b":                        "a-b",
		"":                             "node",
		"...":                          "node",
		"日本":                           "node",
		"localhost.localdomain":        "node",
		"\x1b[31mred\xff":              "31mred",
		strings.Repeat("x", 70):        strings.Repeat("x", 63),
		strings.Repeat("x", 62) + "-y": strings.Repeat("x", 62),
	} {
		if got := NormalizeName(host); got != want {
			t.Errorf("%q becomes %q, want %q", host, got, want)
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		host := rapid.String().Draw(rt, "host")
		name := NormalizeName(host)
		if err := ValidName(name); err != nil {
			rt.Errorf("%q becomes %q: %v", host, name, err)
		}
		if again := NormalizeName(name); again != name {
			rt.Errorf("%q becomes %q, and that %q", host, name, again)
		}
	})
}

func TestValidServer(t *testing.T) {
	for server, want := range map[string]bool{
		"vpn.example.org:443": true, "VPN:1": true, "203.0.113.5:65535": true, "[2001:db8::5]:8443": true,
		"localhost:8443": true, "127.0.0.1:8443": true, "3com.com:80": true,
		"": false, "vpn": false, ":443": false, "vpn:": false, "vpn:0": false, "vpn:65536": false,
		"vpn:0443": false, "vpn:+443": false, "vpn:https": false, "2001:db8::5:443": false,
		"[vpn]:443": false, "[fe80::1%eth0]:443": false, "0.0.0.0:443": false, "[::]:443": false,
		"224.0.0.1:443": false, "203.0.113:443": false, "203.0.113.256:443": false,
		"a..b:1": false, "vpn.example.org.:1": false, "-a:1": false, "a b:1": false, "a\n:1": false,
		"http://vpn:443": false, "user@vpn:443": false,
		strings.Repeat("abc.", 63) + "d:1":  true,
		strings.Repeat("abc.", 63) + "de:1": false,
	} {
		if err := ValidServer(server); (err == nil) != want {
			t.Errorf("%q: %v", server, err)
		}
	}
}
