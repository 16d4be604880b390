package server

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
)

// What the owner signed cannot be changed by a flag of the next start, which
// says so.
func TestFlagsThatComeTooLate(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	found(t, s)
	s.stop()
	for _, x := range []struct {
		config Config
		want   []string
	}{
		{Config{}, nil},
		{
			Config{Mesh: "office", Prefix: netip.MustParsePrefix("10.0.0.0/8"), Public: "vpn.example.org:444"},
			[]string{"--mesh has no effect", "--prefix has no effect", "overlay up --server vpn.example.org:444"},
		},
	} {
		var log bytes.Buffer
		c := x.config
		c.Listen, c.STUN, c.StateDir = "127.0.0.1:0", "127.0.0.1:0", dir
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
		s, err := Open(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if got := strings.Count(log.String(), "has no effect"); got != len(x.want) {
			t.Errorf("%d warnings, want %d:\n%s", got, len(x.want), &log)
		}
		for _, want := range x.want {
			if !strings.Contains(log.String(), want) {
				t.Errorf("no %q in:\n%s", want, &log)
			}
		}
	}
}
