package tun

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// needRoot skips, loudly, what needs root; where a lab is promised it fails.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" || os.Getenv("OVERLAY_LAB") == "1" {
		t.Fatalf("%s needs root", t.Name())
	}
	t.Skipf("SKIP: %s NEEDS ROOT", t.Name())
}

// A space is a network namespace of a test.
type space struct{ fd int }

func newSpace(t *testing.T) *space {
	t.Helper()
	needRoot(t)
	s := &space{fd: -1}
	onOwnThread(t, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		s.fd = fd
		return err
	})
	t.Cleanup(func() { unix.Close(s.fd) })
	s.do(t, func() error { return setUp("lo") })
	return s
}

// do runs f on a thread inside the namespace. Sockets and child processes made
// by f itself are in it too.
func (s *space) do(t *testing.T, f func() error) {
	t.Helper()
	onOwnThread(t, func() error {
		if err := unix.Setns(s.fd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// onOwnThread runs f on a thread that ends with it.
func onOwnThread(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func setUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// addLink makes a link with addresses in the namespace, up.
func (s *space) addLink(t *testing.T, l netlink.Link, addrs ...string) {
	t.Helper()
	s.do(t, func() error {
		if err := netlink.LinkAdd(l); err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.AddrAdd(l, mustAddr(t, a)); err != nil {
				return err
			}
		}
		if v, ok := l.(*netlink.Veth); ok && v.PeerNamespace == nil {
			if err := setUp(v.PeerName); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	})
}

func mustAddr(t *testing.T, a string) *netlink.Addr {
	t.Helper()
	addr, err := netlink.ParseAddr(a)
	if err != nil {
		t.Fatal(err)
	}
	addr.Flags = unix.IFA_F_NODAD
	return addr
}

// cable is a link that has a carrier as long as its other end, named with a p
// behind, is up.
func cable(name string) *netlink.Veth {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return &netlink.Veth{LinkAttrs: a, PeerName: name + "p"}
}

// joinSpaces lays a cable from s (10.9.0.1) to far (10.9.0.2 and 10.9.0.3).
func joinSpaces(t *testing.T, s, far *space) {
	t.Helper()
	a := netlink.NewLinkAttrs()
	a.Name = "eth0"
	veth := &netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.fd)}
	s.addLink(t, veth, "10.9.0.1/24", "fd09::1/64")
	far.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range []string{"10.9.0.2/24", "10.9.0.3/24", "fd09::2/64"} {
			if err := netlink.AddrAdd(l, mustAddr(t, a)); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	})
	// The kernel takes a moment, sometimes a second, until a new link carries.
	for _, ends := range [][2]string{{"10.9.0.1:0", "10.9.0.2:0"}, {"[fd09::1]:0", "[fd09::2]:0"}} {
		from, to := listenIn(t, s, ends[0]), listenIn(t, far, ends[1])
		eventually(t, 5*time.Second, "the cable carries", func() bool {
			_, _ = from.WriteTo([]byte("x"), to.LocalAddr())
			_ = to.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			_, _, err := to.ReadFrom(make([]byte, 1))
			return err == nil
		})
	}
}

// linkName is new for each test: the folder of UAPI sockets is shared with the
// whole machine.
func linkName() string { return fmt.Sprintf("ovt%08x", rand.Uint32()) }

// eventually waits until ok, at most for limit.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// listenIn opens a UDP socket in the namespace.
func listenIn(t *testing.T, s *space, at string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	s.do(t, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}
