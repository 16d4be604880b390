package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlay/coord/store"
)

func ecCertificate() (tls.Certificate, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}, err
}

func TestOpenErrors(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tcp.Close() }()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = udp.Close() }()
	me := fmt.Sprintf("used by pid %d (", os.Getpid())
	for name, c := range map[string]struct {
		change func(*Config)
		text   []string
		is     error
	}{
		"port taken": {
			func(c *Config) { c.Listen = tcp.Addr().String() },
			[]string{"cannot listen on " + tcp.Addr().String() + ": " + me, "Try --listen :"},
			syscall.EADDRINUSE,
		},
		"STUN port taken": {
			func(c *Config) { c.STUN = udp.LocalAddr().String() },
			[]string{"cannot listen on " + udp.LocalAddr().String() + "/udp: " + me, "Try --stun :"},
			syscall.EADDRINUSE,
		},
		"bad listen": {func(c *Config) { c.Listen = "nonsense" }, []string{`--listen "nonsense": use [HOST]:PORT`}, nil},
		"bad stun":   {func(c *Config) { c.STUN = "127.0.0.1:65535" }, []string{`--stun "127.0.0.1:65535"`}, nil},
		"bad public": {func(c *Config) { c.Public = "a b" }, []string{`--public "a b"`}, nil},
		"bad prefix": {func(c *Config) { c.Prefix = netip.MustParsePrefix("100.64.0.1/16") }, []string{"--prefix 100.64.0.1/16"}, nil},
		"bad name":   {func(c *Config) { c.Mesh = "My Home" }, []string{`name "My Home" is not usable`}, nil},
	} {
		config := Config{Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: t.TempDir()}
		c.change(&config)
		s, err := Open(config)
		if err == nil {
			_ = s.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		for _, text := range c.text {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v; want %q", name, err, text)
			}
		}
		if c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: %v is not %v", name, err, c.is)
		}
	}
}

func TestSecondServer(t *testing.T) {
	s := start(t, t.TempDir())
	_, err := Open(Config{Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: s.dir})
	if !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), "another overlay coord runs on "+s.dir) {
		t.Error(err)
	}
}

func TestServerKeyFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, keyFile)
	open := func() error {
		s, err := Open(Config{Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: dir})
		if err == nil {
			err = s.Close()
		}
		return err
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := open(); err == nil || err.Error() != path+" is readable by others (0644). Fix: chmod 600 "+path {
		t.Error(err)
	}
	if err := errors.Join(os.WriteFile(path, []byte("garbage"), 0o600), os.Chmod(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := open(); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Error(err)
	}
}

// A new key for an old mesh would be one that every node takes for an attack.
func TestLostServerKey(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	found(t, s)
	s.stop()
	path := filepath.Join(dir, keyFile)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	again, err := Open(Config{Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: dir})
	if err == nil {
		_ = again.Close()
	}
	if err == nil || !strings.Contains(err.Error(), path+" is missing") {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("a new key was made:", err)
	}
}

// A mesh whose owner left admits nobody any more; its server says so when it starts.
func TestOwnerGone(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	said := func() string {
		s.stop()
		var out strings.Builder
		again, err := Open(Config{
			Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", StateDir: s.dir, Log: slog.New(slog.NewTextHandler(&out, nil)),
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Server, s.stop = again, func() { _ = again.Close() }
		return out.String()
	}
	if got := said(); strings.Contains(got, "owner") {
		t.Error(got)
	}
	s.stop()
	s = start(t, s.dir)
	o.server = s.Addr().String()
	if err := o.dial(t, o.server).Revoke(t.Context(), o.revocation(t, public(o.device), o.device)); err != nil {
		t.Fatal(err)
	}
	if got := said(); !strings.Contains(got, `the owner of this mesh, \"anna\", left it on 20`) || !strings.Contains(got, "--state with an empty DIR") {
		t.Error(got)
	}
	s.stop()
}

func TestPublicAddress(t *testing.T) {
	everywhere := &net.TCPAddr{IP: net.IPv6unspecified, Port: 8443}
	for _, c := range []struct {
		public string
		listen net.Addr
		want   string
	}{
		{"vpn.example.org", everywhere, "vpn.example.org:8443"},
		{"vpn.example.org:443", everywhere, "vpn.example.org:443"},
		{"2001:db8::1", everywhere, "[2001:db8::1]:8443"},
		{"[2001:db8::1]", everywhere, "[2001:db8::1]:8443"},
		{"[2001:db8::1]:443", everywhere, "[2001:db8::1]:443"},
		{"", &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 9}, "10.1.2.3:9"},
	} {
		got, err := publicAddress(c.public, c.listen, slog.New(slog.DiscardHandler))
		if err != nil || got != c.want {
			t.Errorf("%q on %v: %q, %v; want %q", c.public, c.listen, got, err, c.want)
		}
	}
}

func TestPrivateAddressWarns(t *testing.T) {
	for host, warn := range map[string]bool{
		"192.168.1.5": true, "100.64.3.4": true, "fd00::1": true, "127.0.0.1": true,
		"203.0.113.5": false, "2001:db8::5": false, "vpn.example.org": false,
	} {
		var out strings.Builder
		if _, err := publicAddress(host, &net.TCPAddr{Port: 443}, slog.New(slog.NewTextHandler(&out, nil))); err != nil {
			t.Error(err)
		}
		want := host + " is a private address; invites will only work in this LAN"
		if strings.Contains(out.String(), want) != warn {
			t.Errorf("%s: %s", host, out.String())
		}
	}
}

func TestOnlyReachable(t *testing.T) {
	for _, c := range []struct{ addrs, want string }{
		{"127.0.0.1/8 192.168.1.5/24 203.0.113.5/24", "203.0.113.5"},
		{"203.0.113.5/24 2001:db8::5/64 fe80::1/64", "203.0.113.5"},
		{"10.0.0.1/8 2001:db8::5/64", "2001:db8::5"},
		{"203.0.113.5/24 203.0.113.6/24", ""},
		{"10.0.0.1/8", ""},
	} {
		var addrs []net.Addr
		for a := range strings.FieldsSeq(c.addrs) {
			ip, network, err := net.ParseCIDR(a)
			if err != nil {
				t.Fatal(err)
			}
			addrs = append(addrs, &net.IPNet{IP: ip, Mask: network.Mask})
		}
		got := onlyReachable(addrs)
		if want, _ := netip.ParseAddr(c.want); got != want {
			t.Errorf("%s: %v, want %q", c.addrs, got, c.want)
		}
	}
}
