package punch

import (
	"bytes"
	"net/netip"
	"testing"
)

func TestClassic(t *testing.T) {
	from := netip.MustParseAddrPort("203.0.113.7:700")
	header := append([]byte{0, 1, 0, 0}, bytes.Repeat([]byte{9}, 16)...)
	with := func(attributes ...byte) []byte {
		b := append(bytes.Clone(header), attributes...)
		b[3] = byte(len(attributes))
		return b
	}
	change := func(bits byte) []byte { return with(0, 3, 0, 4, 0, 0, 0, bits) }
	want := append([]byte{1, 1, 0, 12}, header[4:]...)
	want = append(want, 0, 1, 0, 8, 0, 1, 700>>8, 700&255, 203, 0, 113, 7)
	for name, c := range map[string]struct {
		b       []byte
		from    netip.AddrPort
		plainly bool
		answer  bool
	}{
		"bare":             {header, from, true, true},
		"no change":        {change(0), from, true, true},
		"mapped IPv4":      {header, netip.MustParseAddrPort("[::ffff:203.0.113.7]:700"), true, true},
		"change of port":   {change(2), from, true, false},
		"other attribute":  {with(0, 6, 0, 4, 0, 0, 0, 0), from, true, false},
		"cut attribute":    {with(0, 3, 0, 4), from, true, false},
		"half a header":    {with(0, 3), from, true, false},
		"wrong length":     {append(bytes.Clone(header), 0), from, true, false},
		"answer":           {want, from, true, false},
		"IPv6":             {header, netip.MustParseAddrPort("[2001:db8::7]:700"), true, false},
		"beyond the limit": {header, from, false, false},
		"short":            {header[:19], from, true, false},
	} {
		got := AnswerBinding(c.b, c.from, sessions(nil, c.plainly))
		if (got != nil) != c.answer || got != nil && !bytes.Equal(got, want) {
			t.Errorf("%s: %x", name, got)
		}
	}
}
