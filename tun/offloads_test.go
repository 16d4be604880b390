package tun

import (
	"strings"
	"testing"
)

func TestOffloadsAreKnownWords(t *testing.T) {
	for _, list := range []string{"", "-gso", "+gso", "-gso,-gro,-tso,-large", "-large,-large"} {
		if err := CheckOffloads(list); err != nil {
			t.Errorf("%q: %v", list, err)
		}
	}
	for _, list := range []string{"gso", "-GSO", ",", "-gso,", "-gso, -gro", "-gso;-gro", "all", "\x00"} {
		err := CheckOffloads(list)
		if err == nil {
			t.Errorf("%q is taken", list)
			continue
		}
		for _, known := range []string{"-gso", "+gso", "-gro", "-tso", "-large"} {
			if !strings.Contains(err.Error(), known) {
				t.Errorf("%q: %v does not name %s", list, err, known)
			}
		}
	}
}

func TestSwitchedIsTheWholeWord(t *testing.T) {
	c := Config{Offloads: "-gro,-large"}
	for word, want := range map[string]bool{offGRO: true, offLarge: true, offGSO: false, forceGSO: false, "-g": false} {
		if c.switched(word) != want {
			t.Errorf("%s in %q: %v", word, c.Offloads, !want)
		}
	}
}
