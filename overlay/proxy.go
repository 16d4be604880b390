package overlay

import (
	"net/url"
	"strconv"
	"strings"
)

// parseProxy reads http://[user:password@]host:port; empty means no proxy. Its
// error is for people and never shows more than the host.
func parseProxy(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil
	}
	const hint = "for example: --proxy http://proxy.example.org:3128, or http://USER:PASSWORD@... where it asks for them; --proxy none for no proxy"
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fail(Usage, hint, "--proxy is not a URL")
	case u.Scheme != "http":
		return nil, fail(Usage, hint, "--proxy begins with %q: only http:// is spoken to a proxy", schemeOf(s, u))
	case u.Hostname() == "" || !validPort(u.Port()):
		return nil, fail(Usage, hint, "--proxy %q is not http://HOST:PORT", hostOf(s, u))
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, fail(Usage, hint, "--proxy %q has more behind HOST:PORT than a proxy needs", hostOf(s, u))
	}
	u.Path = ""
	return u, nil
}

// schemeOf names what stands in place of the scheme; without "//" that could be
// a part of anything, a password too.
func schemeOf(s string, u *url.URL) string {
	if strings.HasPrefix(s, u.Scheme+"://") {
		return u.Scheme + "://"
	}
	return "something else"
}

// hostOf names the proxy. With a character in the password that has to be
// written as %XX, what looks like the host is the beginning of it.
func hostOf(s string, u *url.URL) string {
	known := 0
	if u.User != nil {
		known = 1
	}
	if strings.Count(s, "@") > known {
		return "http://..."
	}
	return "http://" + u.Host
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}
