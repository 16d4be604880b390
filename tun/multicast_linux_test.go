package tun

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestMulticast has two sockets of one host hear both, over a link that comes
// after them, and nothing when it is gone.
func TestMulticast(t *testing.T) {
	s := newSpace(t)
	group4, group6 := netip.MustParseAddr("239.255.1.2"), netip.MustParseAddr("ff12::1:2")
	heard := make(chan string, 100)
	var all [2]*Multicast
	for i := range all {
		s.do(t, func() (err error) {
			all[i], err = OpenMulticast(group4, group6, 41999)
			return err
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- all[i].Run(ctx, func(b []byte) { heard <- fmt.Sprintf("%d: %s", i, b) })
		}()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	join := func() {
		for _, m := range all {
			s.do(t, m.Join)
		}
	}
	join()
	if err := all[0].Send([]byte("nobody")); err != nil {
		t.Errorf("without a link: %v", err)
	}
	link := cable("lan")
	s.addLink(t, link)
	addr := &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("10.1.2.3/24"))}
	s.do(t, func() error { return netlink.AddrAdd(link, addr) })
	join()
	if err := all[0].Send([]byte("hello")); err != nil {
		t.Errorf("over a link: %v", err)
	}
	got := map[string]bool{}
	for end := time.After(5 * time.Second); len(got) < len(all); {
		select {
		case text := <-heard:
			got[text] = true
		case <-end:
			t.Fatalf("heard %v", got)
		}
	}
	if !got["0: hello"] || !got["1: hello"] {
		t.Errorf("heard %v", got)
	}
	s.do(t, func() error { return netlink.LinkDel(link) })
	join()
	if len(all[0].links) != 0 {
		t.Errorf("joined on %v", all[0].links)
	}
}

// A unicast datagram from anywhere is not of the group.
func TestUnicastIsNoMulticast(t *testing.T) {
	const port = 41999
	m, err := OpenMulticast(netip.MustParseAddr("239.255.111.118"), netip.MustParseAddr("ff12::6f76:6c79"), port)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	got := make(chan string, 10)
	for _, to := range []string{"127.0.0.1:41999", "[::1]:41999"} {
		c, err := net.Dial("udp", to)
		if err != nil {
			t.Log(err)
			continue
		}
		_, _ = c.Write([]byte("unicast " + to))
	}
	_ = m.Run(ctx, func(b []byte) { got <- string(b) })
	close(got)
	for s := range got {
		t.Errorf("heard %q", s)
	}
}
