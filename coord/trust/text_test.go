package trust

import (
	"strings"
	"testing"
)

func FuzzKeyText(f *testing.F) {
	good := key(deviceSeed).String()
	for _, s := range []string{good, good[:43], good + "=", good + "\n", good[:9] + "\r\n" + good[9:], strings.Repeat("/", 43) + "=", ""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var k Key
		if err := k.UnmarshalText(text); err != nil {
			if k != (Key{}) {
				t.Errorf("%q: %v, but the key is set", text, err)
			}
			return
		}
		if back, err := k.MarshalText(); err != nil || string(back) != string(text) {
			t.Errorf("%q was read as %q: %v", text, back, err)
		}
	})
}
