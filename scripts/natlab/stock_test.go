package natlab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	stockProgram = "wireguard-go"
	stockPath    = "golang.zx2c4.com/wireguard"
	stockDevice  = "wg0"
	stockPort    = 51820

	// envStock names a ready wireguard-go.
	envStock = "OVERLAY_LAB_WIREGUARD"
)

// The stock peer is no member of the mesh; both ends have addresses that no
// netmap knows.
func ourEnd() [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd99::1")}
}

func stockEnd() [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("fd99::2")}
}

// TestStockPeer has a node talk to a stock wireguard-go that was configured by
// hand on both sides: in the plain format, with checksums the other kernel
// verifies, and without harm from what the mesh does meanwhile.
func TestStockPeer(t *testing.T) {
	m := newMeshIn(t, Options{Delay: -1})
	a := m.join(t, mustServer(t, m.Lab, "a"))
	stock := mustServer(t, m.Lab, "stock")
	key := startStock(t, m.Lab, stock, a)
	befriend(t, a, stock, key)
	ours := stock.tally(t, "ours", fmt.Sprintf("ip saddr %s meta l4proto udp @th,64,8 & 0x80 == 0x80", a.Addr()))

	talk(t, a.Host, stock)
	m.join(t, mustServer(t, m.Lab, "late")) // another netmap, another set of peers
	if got := output(t, a.Host, "wg", "show", overlayDevice, "allowed-ips"); !strings.Contains(got, key.String()) {
		t.Fatalf("the peer configured by hand is gone: %s", got)
	}
	talk(t, a.Host, stock)

	seconds := time.Duration(runs(2, 10)) * time.Second
	for _, side := range []struct {
		from, to *Host
		addr     netip.Addr
	}{{a.Host, stock, stockEnd()[0]}, {stock, a.Host, ourEnd()[0]}} {
		serveIperf(t, side.to, side.addr)
		tcp := iperf(t, side.from, side.addr, seconds)
		udp := iperf(t, side.from, side.addr, seconds, "-u", "-b", "100M", "-l", "1200")
		t.Logf("TCP from %s to %s: %.2f Gbit/s, at 100 Mbit/s of UDP %.0f of %.0f packets lost", side.from.Name(), side.to.Name(),
			tcp.End.SumReceived.BitsPerSecond/gigabit, udp.End.Sum.LostPackets, udp.End.Sum.Packets)
		if tcp.End.SumReceived.Bytes == 0 || udp.delivered() == 0 {
			t.Errorf("nothing arrived at %s", side.to.Name())
		}
	}
	t.Logf("memory of the node: %d MB", memory(t, a.daemon(t))>>20)
	for _, h := range []*Host{a.Host, stock} {
		if n := h.errors(t, "InCsumErrors"); n > 0 {
			t.Errorf("%d packets with a wrong checksum came to %s", n, h.Name())
		}
	}
	if n := ours(); n > 0 {
		t.Errorf("the stock peer was sent %d frames of our own", n)
	}
}

// talk sends by TCP and pings, both ways and both families.
func talk(t *testing.T, a, stock *Host) {
	t.Helper()
	size := int64(runs(8, 64)) << 20
	for i := range ourEnd() {
		transfer(t, a, stock, stockEnd()[i], size)
		transfer(t, stock, a, ourEnd()[i], size)
	}
	for from, to := range map[*Host]netip.Addr{a: stockEnd()[0], stock: ourEnd()[0]} {
		ping := startPing(t, from, to, slowPing)
		time.Sleep(time.Second)
		echoes := ping.stop(t)
		if n := lost(echoes); n > 0 {
			t.Errorf("%d of %d pings from %s got no reply", n, len(echoes), from.Name())
		}
	}
}

// startStock runs a stock wireguard-go on a machine, with the node a as its
// peer, and returns its key.
func startStock(t *testing.T, l *Lab, stock *Host, a *member) wgtypes.Key {
	t.Helper()
	installStock(t, l)
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stock.Start(context.WithoutCancel(t.Context()), nil, stockProgram, "-f", stockDevice); err != nil {
		t.Fatal(err)
	}
	port := strings.TrimSpace(output(t, a.Host, "wg", "show", overlayDevice, "listen-port"))
	ours, theirs := ourEnd(), stockEnd()
	var s script
	s.add("n=0; until wg show %s >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.05; done", stockDevice)
	s.add("wg set %s listen-port %d private-key /dev/stdin <<'KEY'\n%s\nKEY", stockDevice, stockPort, key)
	s.add("wg set %s peer %s endpoint %s:%s allowed-ips %s/32,%s/128",
		stockDevice, a.status(t).Self.PublicKey, a.Addr(), port, ours[0], ours[1])
	s.add("ip addr add %s/24 dev %s", theirs[0], stockDevice)
	s.add("ip addr add %s/64 dev %s nodad", theirs[1], stockDevice)
	s.add("ip link set %s mtu %d up", stockDevice, 1400)
	if err := stock.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return key.PublicKey()
}

// befriend gives the node a peer that its mesh knows nothing of.
func befriend(t *testing.T, a *member, stock *Host, key wgtypes.Key) {
	t.Helper()
	ours, theirs := ourEnd(), stockEnd()
	var s script
	s.add("wg set %s peer %s endpoint %s:%d allowed-ips %s/32,%s/128",
		overlayDevice, key, stock.Addr(), stockPort, theirs[0], theirs[1])
	for i, bits := range []int{32, 128} {
		s.add("ip addr add %s/%d dev %s", ours[i], bits, overlayDevice)
		s.add("ip route add %s/%d dev %s src %s", theirs[i], bits, overlayDevice, ours[i])
	}
	if err := a.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

// installStock puts a wireguard-go of the version in go.mod where the machines
// of the lab find it.
func installStock(t *testing.T, l *Lab) {
	t.Helper()
	to := filepath.Join(l.binDir(), stockProgram)
	install := func() error { return compile(t.Context(), stockPath, to) }
	if ready := os.Getenv(envStock); ready != "" {
		install = func() error { return copyProgram(to, ready) }
	}
	if err := install(); err != nil {
		t.Fatal(err)
	}
}
