package portmap

import (
	"context"
	"net"
	"net/netip"

	"golang.org/x/sync/errgroup"
)

// announcePort is where hosts listen for what routers say of PCP and NAT-PMP
// after a restart (RFC 6887 section 14.1, RFC 6886 section 3.2.1).
const announcePort = 5350

// listen tells, until ctx ends, when the router of r says that it was restarted.
// That is no more than a hint: the router is asked then. Where the system does
// not let us listen, checks from time to time do.
func listen(ctx context.Context, r Route, restarted func()) {
	link, err := net.InterfaceByIndex(r.Link)
	if err != nil {
		return
	}
	var group errgroup.Group
	boot := ""
	for at, judge := range map[netip.AddrPort]func([]byte) bool{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{224, 0, 0, 1}), announcePort): isAnnouncement,
		netip.AddrPortFrom(ssdpGroup(), ssdpPort): func(b []byte) bool {
			note, err := parseNotify(b, r.Gateway)
			news := err == nil && note.boot != boot
			if news {
				boot = note.boot
			}
			return news
		},
	} {
		conn, err := net.ListenMulticastUDP("udp4", link, net.UDPAddrFromAddrPort(at))
		if err != nil {
			continue
		}
		group.Go(func() error {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			hear(conn, r.Gateway, judge, restarted)
			return nil
		})
	}
	_ = group.Wait() // hearing does not fail
}

// hear reads until the socket is closed.
func hear(conn *net.UDPConn, gateway netip.Addr, judge func([]byte) bool, restarted func()) {
	b := make([]byte, maxSSDP)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if from.Addr().Unmap() == gateway && judge(b[:n]) {
			restarted()
		}
	}
}

// isAnnouncement knows a PCP ANNOUNCE and the outer address of NAT-PMP.
func isAnnouncement(b []byte) bool {
	if r, err := parsePCP(b); err == nil {
		return r.opcode == pcpAnnounce
	}
	r, err := parsePMP(b)
	return err == nil && r.opcode == pmpAddress
}
