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
	eventually(t, 5*time.Second, "the link is joined", func() bool { // it takes a moment to come up
		join()
		return len(all[0].links) > 0 && len(all[1].links) > 0
	})
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

// A unicast datagram from anywhere is not of the group, whose own one comes behind it.
func TestUnicastIsNoMulticast(t *testing.T) {
	s := newSpace(t) // where the port is free
	s.addLink(t, cable("lan"), "10.1.2.3/24", "fe80::9/64")
	const port = 41999
	var m *Multicast
	s.do(t, func() (err error) {
		m, err = OpenMulticast(netip.MustParseAddr("239.255.111.118"), netip.MustParseAddr("ff12::6f76:6c79"), port)
		return err
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	heard, done := make(chan string, 1000), make(chan error, 1)
	go func() { done <- m.Run(ctx, func(b []byte) { heard <- string(b) }) }()
	for _, host := range []string{"127.0.0.1", "::1"} {
		to := net.UDPAddrFromAddrPort(at(host, port))
		_, err := listenIn(t, s, netip.AddrPortFrom(to.AddrPort().Addr(), 0).String()).WriteTo([]byte("unicast"), to)
		check(t, err)
	}
	got := map[string]int{}
	eventually(t, 5*time.Second, "the group is heard over both families", func() bool {
		s.do(t, m.Join)
		check(t, (&Multicast{v4: m.v4, to4: m.to4, links: m.links}).Send([]byte("group by IPv4")))
		check(t, (&Multicast{v6: m.v6, to6: m.to6, links: m.links}).Send([]byte("group by IPv6")))
		for len(heard) > 0 {
			got[<-heard]++
		}
		return got["group by IPv4"] > 0 && got["group by IPv6"] > 0
	})
	cancel()
	check(t, <-done)
	if len(got) != 2 {
		t.Errorf("heard %v", got)
	}
}
