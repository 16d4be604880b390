package overlay

import (
	"strings"
	"testing"
)

func TestProxy(t *testing.T) {
	for s, ok := range map[string]bool{
		"": true, "http://proxy:3128": true, "http://proxy:3128/": true, "http://u:secret@192.0.2.1:8080": true,
		"http://[2001:db8::1]:3128": true,
		"proxy:3128":                false, "https://u:secret@proxy:3128": false, "socks5://u:secret@proxy:1": false,
		"http://u:secret@proxy": false, "http://u:secret@:3128": false, "http://u:secret@proxy:0": false,
		"http://u:secret@proxy:99999": false, "http://u:secret@proxy:3128/path": false, "http://u:secret@proxy:3128?x": false,
		"http://u:123/secret@proxy:3128": false, "http://u:123#secret@proxy:3128": false, "http://u@123:1/secret@proxy:3128": false, "http://u:123?secret@proxy:3128": false,
		"http://u:secret%zz@proxy:3128": false, "u:secret@proxy:3128": false, "secret": false, "secret:x": false,
	} {
		err := UpRequest{Proxy: &s}.Check()
		if (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
		if err == nil {
			continue
		}
		if e := asError(err); KindOf(err) != Usage || strings.Contains(e.Message+e.Hint, "secret") || strings.Contains(e.Message, "123") {
			t.Errorf("%q: %s (%s), hint %q", s, e.Message, e.Kind, e.Hint)
		}
	}
}

func TestProxyIsKeptUntilTakenAway(t *testing.T) {
	n := New(Config{StateDir: t.TempDir()})
	up := func(proxy *string) string {
		t.Helper()
		c, err := n.merge(UpRequest{Proxy: proxy})
		if err != nil {
			t.Fatal(err)
		}
		if err := n.store.save(settingsFile, c); err != nil {
			t.Fatal(err)
		}
		return c.Proxy
	}
	proxy, none := "http://u:p@proxy:3128", ""
	if got := []string{up(nil), up(&proxy), up(nil), up(&none), up(nil)}; got[0] != "" || got[1] != proxy || got[2] != proxy || got[3] != "" || got[4] != "" {
		t.Fatalf("proxies %q", got)
	}
}

func FuzzProxy(f *testing.F) {
	f.Add("http://user:password@proxy.example.org:3128")
	f.Add("http://[::1%25eth0]:1")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := parseProxy(s)
		if err == nil && u != nil && (u.Scheme != "http" || u.Hostname() == "" || u.Port() == "") {
			t.Fatalf("%q became %+v", s, u)
		}
	})
}
