package natlab

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlay/overlay"
)

// overlayStatus is the status as the daemon gives it.
type overlayStatus = overlay.Status

// TestThreeLaptops has laptops behind three kinds of routers reach each other
// directly, and one log in to another.
func TestThreeLaptops(t *testing.T) {
	m := newMesh(t)
	for name, kind := range map[string]NAT{"one": Public, "two": Masquerade, "three": FullCone} {
		m.join(t, m.laptopAt(t, name, kind))
	}
	last := m.members[2]
	if err := last.StartSSHD(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, a := range m.members {
		for _, b := range m.members {
			if a != b {
				mustDirect(t, a, b)
				pingFor(t, a, b, 2*slowPing)
			}
		}
	}
	first := m.members[0]
	for _, command := range [][]string{
		{"ssh", "-o", "HostKeyAlias=" + last.Name(), last.addr.String(), "hostname"},
		{"overlay", "ssh", last.nodeName, "hostname"},
	} {
		if got := output(t, first.Host, command[0], command[1:]...); got != last.Name()+"\n" {
			t.Errorf("%v says %q", command, got)
		}
	}
}

// TestSecretsStaySecret looks for invites and private keys where they must not
// be: logs, command lines and environments of daemons.
func TestSecretsStaySecret(t *testing.T) {
	m, a, b := pair(t, Masquerade, Masquerade)
	mustDirect(t, a, b)
	spare := a.newInvite(t)
	exitCode(t, b.Host, "up", m.owner) // refused: it is used
	exitCode(t, b.Host, "up", "--name", "other", spare)
	if err := both(a, b, func(n *member) error { return n.down(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	if err := both(a, b, func(n *member) error { return n.up(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	secret := secretsOf(t, a, b)
	for i, invite := range []string{m.owner, a.invite, b.invite, spare, strings.TrimSpace(a.printed)} {
		if invite != "" {
			secret[fmt.Sprintf("invite %d", i)] = strings.TrimPrefix(invite, invitePrefix)
		}
	}
	places := m.logs(t)
	for _, pid := range []int{a.daemon(t), b.daemon(t), m.coord.cmd.Process.Pid} {
		places = append(places, fmt.Sprintf("/proc/%d/cmdline", pid), fmt.Sprintf("/proc/%d/environ", pid))
	}
	const logs, processes = 3, 3
	if len(secret) < 10 || len(places) != logs+2*processes {
		t.Fatalf("%d secrets looked for in %v", len(secret), places)
	}
	for _, place := range places {
		text, err := os.ReadFile(place)
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range secret {
			if bytes.Contains(text, []byte(value)) {
				t.Errorf("%s is in %s", name, place)
			}
		}
	}
}

// secretsOf reads private keys and lists how they could be printed.
func secretsOf(t *testing.T, members ...*member) map[string]string {
	t.Helper()
	list := map[string]string{}
	for _, n := range members {
		text, err := os.ReadFile(n.state() + "/keys.json")
		if err != nil {
			t.Fatal(err)
		}
		var keys struct{ Device, WireGuard, Root, Signer []byte }
		if err := json.Unmarshal(text, &keys); err != nil {
			t.Fatal(err)
		}
		for name, key := range map[string][]byte{
			"device": keys.Device, "wireguard": keys.WireGuard, "root": keys.Root, "signer": keys.Signer,
		} {
			if len(key) < 32 {
				continue
			}
			seed := key[:32]
			list[n.nodeName+" "+name+" hex"] = hex.EncodeToString(seed)
			list[n.nodeName+" "+name+" base64"] = base64.StdEncoding.EncodeToString(seed)[:42]
		}
	}
	return list
}

// logs are all logs of the lab, with those of the nodes.
func (m *mesh) logs(t *testing.T) (list []string) {
	t.Helper()
	err := filepath.WalkDir(m.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.Contains(e.Name(), ".log") {
			list = append(list, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}
