package tun

import (
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// An eventSocket is a subscription to what the kernel says about links,
// addresses and routes of one network namespace, in the order it happened. One
// socket for all of it keeps that order; the subscriptions of package netlink
// use one socket and goroutine per kind.
type eventSocket struct {
	sock   *nl.NetlinkSocket
	closed atomic.Bool
}

// newEventSocket subscribes in the network namespace of the calling thread.
func newEventSocket() (*eventSocket, error) {
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("subscribe to network changes: %w", err)
	}
	return &eventSocket{sock: sock}, nil
}

// close ends a receive that waits; it may be called more than once.
func (s *eventSocket) close() {
	s.closed.Store(true)
	s.sock.Close()
}

// receive waits for messages until the time given, or for ever when it is zero.
// Errors: unix.EAGAIN when the time is over, unix.ENOBUFS when messages were
// lost, os.ErrClosed.
func (s *eventSocket) receive(until time.Time) ([]event, error) {
	var tv unix.Timeval
	if !until.IsZero() {
		tv = unix.NsecToTimeval(int64(max(time.Until(until), time.Microsecond)))
	}
	if err := s.sock.SetReceiveTimeout(&tv); err != nil {
		return nil, err
	}
	msgs, from, err := s.sock.Receive()
	if s.closed.Load() {
		return nil, os.ErrClosed // the socket's own error for it is not exported
	}
	if err != nil {
		return nil, err
	}
	if from.Pid != nl.PidKernel {
		return nil, nil
	}
	var events []event
	for _, m := range msgs {
		if e, ok := parseEvent(m); ok {
			events = append(events, e)
		}
	}
	return events, nil
}

// An event is one message of the kernel, as far as anybody here looks at it.
type event struct {
	kind   uint16 // RTM_NEWLINK and so on
	link   int    // interface index; 0: a route over several links
	flags  uint32 // of the link (IFF_) or of the address (IFA_F_)
	name   string // of the link
	tun    bool   // the link is a TUN
	prefix netip.Prefix
}

func parseEvent(m syscall.NetlinkMessage) (event, bool) {
	e := event{kind: m.Header.Type}
	switch e.kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return parseLink(e, m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return parseAddr(e, m.Data)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return parseRoute(e, m.Data)
	}
	return e, false
}

func parseLink(e event, m syscall.NetlinkMessage) (event, bool) {
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] != unix.AF_UNSPEC {
		return e, false
	}
	l, err := netlink.LinkDeserialize((*unix.NlMsghdr)(&m.Header), m.Data)
	if err != nil {
		return e, false
	}
	a := l.Attrs()
	e.link, e.flags, e.name, e.tun = a.Index, a.RawFlags, a.Name, isTUN(l)
	return e, true
}

func parseAddr(e event, b []byte) (event, bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return e, false
	}
	msg := nl.DeserializeIfAddrmsg(b)
	attrs, err := nl.ParseRouteAttr(b[msg.Len():])
	if err != nil {
		return e, false
	}
	e.link, e.flags = int(msg.Index), uint32(msg.Flags)
	var local, far netip.Addr
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(a.Value)
		case unix.IFA_ADDRESS: // of the far end where there is one, else our own
			far, _ = netip.AddrFromSlice(a.Value)
		case unix.IFA_FLAGS:
			e.flags = attrUint32(a.Value)
		}
	}
	bits := int(msg.Prefixlen)
	switch {
	case !local.IsValid():
		local = far
	case far.IsValid() && far != local:
		bits = local.BitLen()
	}
	e.prefix = netip.PrefixFrom(local, bits)
	return e, e.prefix.IsValid()
}

// parseRoute keeps unicast routes; local, broadcast and multicast ones follow
// from addresses, which have messages of their own.
func parseRoute(e event, b []byte) (event, bool) {
	if len(b) < unix.SizeofRtMsg {
		return e, false
	}
	msg := nl.DeserializeRtMsg(b)
	attrs, err := nl.ParseRouteAttr(b[msg.Len():])
	if err != nil || msg.Type != unix.RTN_UNICAST || msg.Flags&unix.RTM_F_CLONED != 0 {
		return e, false
	}
	dst := netip.IPv4Unspecified()
	if msg.Family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(a.Value)
		case unix.RTA_OIF:
			e.link = int(attrUint32(a.Value))
		}
	}
	e.prefix = netip.PrefixFrom(dst, int(msg.Dst_len))
	return e, e.prefix.IsValid()
}

func attrUint32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return nl.NativeEndian().Uint32(b)
}
