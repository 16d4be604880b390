package trust

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
)

const (
	maxName   = 63  // a DNS label, RFC 1035 section 2.3.4
	maxServer = 255 // a host name is at most 253
)

// ValidName refuses what is no name of a device, mesh or tag: letters a-z,
// digits and "-", 1 to 63 of them, "-" neither first nor last.
func ValidName(name string) error {
	if !isLabel(name) || strings.ToLower(name) != name {
		return fmt.Errorf(`name %.80q is not usable: letters a-z, digits, "-" inside, up to %d`, name, maxName)
	}
	return nil
}

// isLabel says whether s is a label of a host name (RFC 1123 section 2.1).
func isLabel(s string) bool {
	if s == "" || len(s) > maxName || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// NormalizeName makes a valid name of what an operating system calls its host:
// the first label, in lower case, without accents, with "-" for all else. It is
// "node" where nothing usable is left.
func NormalizeName(osHostname string) string {
	host, _, _ := strings.Cut(strings.ToLower(osHostname), ".")
	var b strings.Builder
	var last rune
	for _, c := range host {
		s := fold(c, last)
		last = c
		if s == "-" && (b.Len() == 0 || strings.HasSuffix(b.String(), "-")) {
			continue
		}
		if b.WriteString(s); b.Len() > maxName {
			break
		}
	}
	name := strings.TrimRight(b.String()[:min(b.Len(), maxName)], "-")
	// Every machine calls itself localhost, so it cannot name one of several.
	if name == "" || name == "localhost" {
		return "node"
	}
	return name
}

// fold returns the letters for a lower-case rune that follows last: itself, its
// German or plain spelling, nothing, or "-".
func fold(c, last rune) string {
	const diaeresis = '\u0308' // as a combining mark, the spelling of macOS
	switch {
	case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		return string(c)
	case c == diaeresis && (last == 'a' || last == 'o' || last == 'u'):
		return "e"
	case c == '\'', c == '’', unicode.Is(unicode.Mn, c):
		return ""
	}
	return plain(c)
}

// plain returns the Latin letters that c is an accented or joined form of, or
// "-".
func plain(c rune) string {
	switch c {
	case 'ä', 'æ':
		return "ae"
	case 'ö', 'ø', 'œ':
		return "oe"
	case 'ü':
		return "ue"
	case 'ß':
		return "ss"
	case 'à', 'á', 'â', 'ã', 'ā', 'ă', 'ą':
		return "a"
	case 'å':
		return "aa"
	case 'ç', 'ć', 'ĉ', 'ċ', 'č':
		return "c"
	case 'ď', 'đ', 'ð':
		return "d"
	case 'è', 'é', 'ê', 'ë', 'ē', 'ĕ', 'ė', 'ę', 'ě':
		return "e"
	case 'ĝ', 'ğ', 'ġ', 'ģ':
		return "g"
	case 'ì', 'í', 'î', 'ï', 'ĩ', 'ī', 'į', 'ı':
		return "i"
	case 'ł', 'ĺ', 'ļ', 'ľ':
		return "l"
	case 'ñ', 'ń', 'ņ', 'ň':
		return "n"
	case 'ò', 'ó', 'ô', 'õ', 'ō', 'ő':
		return "o"
	case 'ŕ', 'ř':
		return "r"
	case 'ś', 'ŝ', 'ş', 'š', 'ș':
		return "s"
	case 'ţ', 'ť', 'ț':
		return "t"
	case 'ù', 'ú', 'û', 'ũ', 'ū', 'ŭ', 'ů', 'ű', 'ų':
		return "u"
	case 'ý', 'ÿ':
		return "y"
	case 'ź', 'ż', 'ž':
		return "z"
	case 'þ':
		return "th"
	}
	return "-"
}

// ValidServer refuses what is no host:port of a server: a host name or an IP
// address without zone, an IPv6 one in brackets, and a port from 1 to 65535.
func ValidServer(hostPort string) error {
	if len(hostPort) > maxServer {
		return fmt.Errorf("server address has %d characters; at most %d", len(hostPort), maxServer)
	}
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil || net.JoinHostPort(host, port) != hostPort {
		return fmt.Errorf("server %q is not HOST:PORT", hostPort)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return fmt.Errorf("port of server %q is not 1 to 65535", hostPort)
	}
	if err := validHost(host); err != nil {
		return fmt.Errorf("server %q: %w", hostPort, err)
	}
	return nil
}

func validHost(host string) error {
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() {
			return errors.New("a server cannot have this address")
		}
		return nil
	}
	labels := strings.Split(host, ".")
	for _, label := range labels {
		if !isLabel(label) {
			return errors.New("neither an IP address nor a host name")
		}
	}
	// No top-level domain is a number, so this is an address with a slip.
	if last := labels[len(labels)-1]; strings.Trim(last, "0123456789") == "" {
		return errors.New("not an IP address")
	}
	return nil
}
