package overlay

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"overlay/coord"
	"overlay/punch"
)

// TestSaved reads where to ask from what a daemon left behind.
func TestSaved(t *testing.T) {
	st := store{t.TempDir()}
	if got := readSaved(st); got.server != "" || got.addrs != nil || len(got.servers(t.Context())) != 0 {
		t.Errorf("of nothing: %+v", got)
	}
	save := func(name string, v any) {
		t.Helper()
		if err := st.save(name, v); err != nil {
			t.Fatal(err)
		}
	}
	save(settingsFile, settings{Name: "anna", PortMapping: portMappingOff})
	save(meshFile, membership{Servers: []string{"127.0.0.1:8443"}})
	got := readSaved(st)
	want := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:8443"), netip.MustParseAddrPort("127.0.0.1:3478"), netip.MustParseAddrPort("127.0.0.1:3479")}
	if got.name != "anna" || !got.mappingOff || got.unread || !slices.Equal(lookUp(t.Context(), got.server), want) {
		t.Errorf("%+v", got)
	}
	known := netip.MustParseAddrPort("198.51.100.1:3478")
	save(netmapFile, cache{Nodes: []coord.Node{}, Paths: map[string]punch.Candidate{}, Relay: &cachedRelay{
		Server: "127.0.0.1:8443", Key: make([]byte, len(punch.Key{})), Addrs: []netip.AddrPort{known},
	}})
	if list := readSaved(st).servers(t.Context()); len(list) != 1 || list[0].Addr != known {
		t.Errorf("%+v", list)
	}
	if err := os.WriteFile(filepath.Join(st.dir, settingsFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := readSaved(st); got.mappingOff || !got.unread {
		t.Errorf("of settings that cannot be read: %+v", got)
	}
	for _, bad := range []string{"", "127.0.0.1", "127.0.0.1:http"} {
		if list := lookUp(t.Context(), bad); list != nil {
			t.Errorf("%q: %v", bad, list)
		}
	}
}

func TestAnswersTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if !answersTCP(t.Context(), l.Addr().String()) {
		t.Error("does not answer")
	}
	l.Close()
	if answersTCP(t.Context(), l.Addr().String()) {
		t.Error("answers")
	}
}
