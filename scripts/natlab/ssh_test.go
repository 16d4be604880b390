package natlab

import "testing"

func TestSSH(t *testing.T) {
	lab := newLab(t, Options{})
	server := mustServer(t, lab, "server")
	laptop := mustLaptop(t, mustHome(t, lab, "home", Masquerade), "laptop")
	for _, h := range []*Host{server, laptop} {
		if err := h.StartSSHD(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := output(t, laptop, "ssh", "-o", "HostKeyAlias=server", server.Addr().String(), "hostname"); got != "server\n" {
		t.Errorf("over ssh the server calls itself %q", got)
	}
	// The address comes after sshd, as an overlay address does.
	output(t, server, "ip", "addr", "add", "192.0.2.250/32", "dev", "lo")
	if got := output(t, server, "ssh", "-o", "HostKeyAlias=server", "192.0.2.250", "hostname"); got != "server\n" {
		t.Errorf("over a later address the server calls itself %q", got)
	}
	impostor := laptop.Command(t.Context(), "ssh", "-o", "HostKeyAlias=laptop", server.Addr().String(), "true")
	if out, err := impostor.CombinedOutput(); err == nil {
		t.Errorf("ssh accepts the server's key for the laptop: %s", out)
	}
}
