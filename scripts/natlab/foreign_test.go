package natlab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

const (
	stunPort    = 3478
	foreignWait = 15 * time.Second
)

// TestForeignSTUN has our client ask the server of coturn, and clients of others
// ask ours, from behind several routers.
func TestForeignSTUN(t *testing.T) {
	m := newMesh(t)
	m.join(t, m.laptopAt(t, "owner", Masquerade))
	coturn := mustServer(t, m.Lab, "coturn")
	startTurnserver(t, coturn)
	for _, nat := range []NAT{Public, Masquerade, OtherPort, Random} {
		t.Run(string(nat), func(t *testing.T) {
			laptop := m.laptopAt(t, "laptop-"+string(nat), nat)
			for _, server := range []*Host{coturn, m.server} {
				seen := askByAgent(t, laptop, netip.AddrPortFrom(server.Addr(), stunPort))
				if seen.Addr() != laptop.outside() {
					t.Errorf("our client hears %s of %s, the Internet knows %s", seen, server.Name(), laptop.outside())
				}
			}
			askByNatdiscovery(t, laptop, m.server)
			askByStun(t, laptop, m.server)
		})
	}
}

func startTurnserver(t *testing.T, h *Host) {
	t.Helper()
	_, err := h.Start(t.Context(), nil, "turnserver", "-n", "--stun-only", "--no-tls", "--no-dtls", "--no-cli",
		"--listening-ip", h.Addr().String(), "--listening-port", fmt.Sprint(stunPort), "--log-file", "stdout", "--pidfile", "/run/turnserver.pid", "--db", "/run/turn.db")
	if err != nil {
		t.Fatal(err)
	}
}

// askByAgent has an agent ask a server until it knows its address, as long as the
// server may still be starting.
func askByAgent(t *testing.T, from *Host, server netip.AddrPort) netip.AddrPort {
	t.Helper()
	var conn *net.UDPConn
	err := from.inside(func() (err error) {
		conn, err = net.ListenUDP("udp4", nil)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan netip.AddrPort, 16)
	agent, err := punch.New(punch.Config{
		PrivateKey: [32]byte{1},
		Send: func(b []byte, to netip.AddrPort, _ netip.AddrPort, _ int) error {
			_, err := conn.WriteToUDPAddrPort(b, to)
			return err
		},
		OnCandidates: func(list []punch.Candidate) {
			for _, c := range list {
				seen <- c.Addr
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), foreignWait)
	var g errgroup.Group
	defer func() {
		stop()
		conn.Close()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	}()
	g.Go(func() error { return agent.Run(ctx) })
	g.Go(func() error {
		b := make([]byte, probeMaxLen+punch.ServerAnswerSize)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return nil // closed
			}
			agent.Receive(b[:n], from, netip.AddrPort{})
		}
	})
	for {
		agent.SetServers([]punch.Server{{Addr: server}})
		select {
		case addr := <-seen:
			return addr
		case <-time.After(time.Second):
		case <-ctx.Done():
			t.Fatalf("%s does not answer our client at %s", server, from.Name())
		}
	}
}

// askByNatdiscovery asks with the client of coturn, in the ways of RFC 5780. It
// wants a second address for more than the first step.
func askByNatdiscovery(t *testing.T, from, server *Host) {
	t.Helper()
	for _, flag := range []string{"-m", "-f"} {
		hears(t, from, "UDP reflexive addr: %s:", "turnutils_natdiscovery", flag, "-p", fmt.Sprint(stunPort), server.Addr().String())
	}
}

// askByStun asks with a client of RFC 3489.
func askByStun(t *testing.T, from, server *Host) {
	t.Helper()
	hears(t, from, "MappedAddress = %s:", "stun", server.Addr().String(), "-v")
}

// hears runs a program that has to say which address the host has outside. Its
// exit status tells kinds of NAT.
func hears(t *testing.T, from *Host, as, program string, args ...string) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), foreignWait)
	defer stop()
	out, err := from.Command(ctx, program, args...).CombinedOutput()
	if want := fmt.Sprintf(as, from.outside()); !strings.Contains(string(out), want) {
		t.Errorf("%s %v says nothing of %q: %v\n%s", program, args, want, err, out)
	}
}
