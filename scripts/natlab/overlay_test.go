package natlab

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const statusText = `{"schema":1,"self":{"name":"a","ipv4":"100.90.0.1","ipv6":"fd00::1","publicKey":"KEY","online":true},
"peers":[{"name":"b","ipv4":"100.90.0.2","ipv6":"fd00::2","publicKey":"OTHER","online":true,
"path":{"kind":"direct","endpoint":"203.0.113.2:4500","via":"srflx"},
"rttMs":40.5,"rxBytes":10,"txBytes":20,"segments":4,"lastHandshake":"2026-01-02T03:04:05Z","new":1},
{"name":"c","ipv4":"100.90.0.3","ipv6":"fd00::3","publicKey":"THIRD","online":false,
"path":{"kind":"relay","endpoint":"","via":"relay-tls","relay":"r1","reason":"no UDP"},"rttMs":null,"rxBytes":0,"txBytes":0,"lastHandshake":null}],
"relays":[{"name":"r1","transport":"tls","rttMs":30.5,"home":true},{"name":"r2","transport":"","rttMs":null,"home":false,"trouble":"refused"}]}`

func TestParseStatus(t *testing.T) {
	got, err := parseStatus([]byte(statusText))
	if err != nil {
		t.Fatal(err)
	}
	handshake := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := StatusPeer{
		StatusNode: StatusNode{"b", netip.MustParseAddr("100.90.0.2"), netip.MustParseAddr("fd00::2"), "OTHER", true},
		Path:       StatusPath{Kind: "direct", Endpoint: "203.0.113.2:4500", Via: "srflx"},
		RTTms:      40.5, RxBytes: 10, TxBytes: 20, Segments: 4, LastHandshake: &handshake,
	}
	peer, err := got.Peer("b")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, peer, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("peer b (-want +got):\n%s", diff)
	}
	if peer, err := got.Peer("c"); err != nil || peer.RTTms != 0 || peer.LastHandshake != nil {
		t.Errorf("peer c: %+v, %v", peer, err)
	}
	relayed := StatusPath{Kind: "relay", Via: "relay-tls", Relay: "r1", Reason: "no UDP"}
	if peer, err := got.Peer("c"); err != nil || peer.Path != relayed {
		t.Errorf("peer c: %+v, %v", peer, err)
	}
	trip := 30.5
	relays := []StatusRelay{{"r1", "tls", &trip, true, ""}, {"r2", "", nil, false, "refused"}}
	if diff := cmp.Diff(relays, got.Relays); diff != "" {
		t.Errorf("relays (-want +got):\n%s", diff)
	}
	if _, err := got.Peer("d"); err == nil {
		t.Error("peer d exists")
	}
}

func TestParseStatusRefuses(t *testing.T) {
	for _, text := range []string{"", "{}", `{"schema":2}`, `{"schema":1,"self":{"ipv4":"x"}}`} {
		if got, err := parseStatus([]byte(text)); err == nil {
			t.Errorf("%q gives %+v", text, got)
		}
	}
}

func TestFirstLine(t *testing.T) {
	f := &firstLine{found: make(chan string, 1)}
	for _, part := range []string{"ovl1_", "abc\nsecond", "\nthird\n"} {
		if n, err := f.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("write gives %d, %v", n, err)
		}
	}
	if got := <-f.found; got != "ovl1_abc" {
		t.Errorf("first line is %q", got)
	}
}
