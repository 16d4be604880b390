package natlab

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

const (
	perClientBar = 20 << 10 // bytes of a TLS client
	perFlowBar   = 1000     // bytes of a flow: 10,000 are 10 MB
	crowdSettle  = 3 * time.Second
)

// TestRelayMemory weighs the server with many flows between clients over UDP,
// and with many idle clients over TLS.
func TestRelayMemory(t *testing.T) {
	needLab(t)
	m := newMesh(t)
	a := m.join(t, mustServer(t, m.Lab, "a"))
	task := lightTask{TLS: runs(100, 1000), UDP: runs(60, 142)}
	task.Mesh = a.crowdInvite(t, task.TLS)
	task.UDPMesh = a.crowdInvite(t, task.UDP)
	if err := a.down(t.Context()); err != nil {
		t.Fatal(err)
	}
	say, heard := startLight(t, mustServer(t, m.Lab, "crowd"), task)
	weigh := func(after string) int64 {
		t.Helper()
		if got := heard(); got != after {
			t.Fatalf("the crowd says %q, not %q", got, after)
		}
		time.Sleep(crowdSettle)
		size := memory(t, m.coord.PID())
		t.Logf("%s: server has %.1f MiB", after, float64(size)/(1<<20))
		return size
	}
	joined := weigh("joined")
	say()
	flows := weigh("udp true")
	say()
	clients := weigh("udp false")
	count := task.UDP * (task.UDP - 1) / 2
	perFlow, perClient := (flows-joined)/int64(count), (clients-flows)/int64(task.TLS)
	t.Logf("%d flows of %d clients over UDP: %d bytes each; %d clients over TLS: %d bytes each", count, task.UDP, perFlow, task.TLS, perClient)
	if !testing.Short() && (perFlow > perFlowBar || perClient > perClientBar) {
		t.Errorf("a flow takes %d bytes, a client over TLS %d", perFlow, perClient)
	}
}

// crowdInvite is an invite for many.
func (n *member) crowdInvite(t *testing.T, uses int) string {
	t.Helper()
	return strings.TrimSpace(output(t, n.Host, "overlay", "invite", "--uses", fmt.Sprint(uses)))
}

// TestRelayRefusesOthers has somebody who is no member of the mesh try to get
// into its relay, with credentials of his own mesh and with a member's.
func TestRelayRefusesOthers(t *testing.T) {
	m := newMesh(t)
	a := m.join(t, mustServer(t, m.Lab, "a"))
	other := &mesh{Lab: m.Lab, server: mustServer(t, m.Lab, "other-server")}
	var err error
	if other.coord, other.owner, err = other.server.StartCoord(t.Context()); err != nil {
		t.Fatal(err)
	}
	x := other.join(t, mustServer(t, m.Lab, "x"))
	_, heard := startLight(t, mustServer(t, m.Lab, "mallory"), lightTask{Mesh: a.newInvite(t), Foreign: x.newInvite(t)})
	var all []intrusion
	if err := json.Unmarshal([]byte(heard()), &all); err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		t.Logf("%+v", i)
		want := ""
		switch i.Who {
		case "own, udp true":
			want = "udp"
		case "own, udp false":
			want = "tls"
		}
		if i.Transport != want {
			t.Errorf("%s: link is by %q, not %q: %s", i.Who, i.Transport, want, i.Err)
		}
	}
	if len(all) != 6 {
		t.Errorf("%d tries", len(all))
	}
}
