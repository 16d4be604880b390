package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// addrStates are the flags that make an address unusable or unwelcome as a
	// source: not yet checked for duplicates, a duplicate, out of date.
	addrStates = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
	// dumpTries bounds how often a listing is repeated that the kernel marks as
	// torn by a change in the middle.
	dumpTries = 3

	tunPath = "/dev/net/tun"
)

// HostAddrs lists the addresses, with their prefix lengths, at which this host
// can be reached by others: those of links that are up and have a carrier.
// Loopback and link-local addresses are left out, so are addresses not usable
// (yet or any more) and those of TUN and WireGuard links, which would lead a
// tunnel through a tunnel. It looks at the network namespace of the calling
// thread.
func HostAddrs() ([]netip.Prefix, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	usable := make(map[int]bool)
	for _, l := range links {
		usable[l.Attrs().Index] = running(l.Attrs().RawFlags) && !isTunnel(l)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var list []netip.Prefix
	for _, a := range addrs {
		p, ok := netipPrefix(a.IPNet)
		if ok && usable[a.LinkIndex] && a.Flags&addrStates == 0 && pathAddr(p.Addr()) {
			list = append(list, p)
		}
	}
	return list, nil
}

// dump repeats a listing that a change tore; the last one is taken as it is.
func dump[T any](list func() ([]T, error)) (out []T, err error) {
	for range dumpTries {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, nil
}

// pathAddr tells whether a can be one end of a path to another host.
func pathAddr(a netip.Addr) bool {
	return a.IsGlobalUnicast() // without loopback, link-local, multicast, unspecified
}

func running(flags uint32) bool {
	const both = unix.IFF_UP | unix.IFF_RUNNING
	return flags&both == both
}

func isTUN(l netlink.Link) bool {
	t, ok := l.(*netlink.Tuntap)
	return ok && t.Mode != netlink.TUNTAP_MODE_TAP
}

func isTunnel(l netlink.Link) bool {
	_, wg := l.(*netlink.Wireguard)
	return wg || isTUN(l)
}

// ownTUN tells whether this process made the TUN of that name.
func ownTUN(name string) bool { return holdsTUN("/proc/self", name) }

// holdsTUN tells whether the process with that /proc folder has the TUN open.
// The kernel writes the interface's name into fdinfo ("iff:").
func holdsTUN(proc, name string) bool {
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return false
	}
	for _, f := range files {
		if to, err := os.Readlink(filepath.Join(proc, "fd", f.Name())); err != nil || to != tunPath {
			continue
		}
		info, err := os.ReadFile(filepath.Join(proc, "fdinfo", f.Name()))
		if err == nil && strings.Contains(string(info)+"\n", "iff:\t"+name+"\n") {
			return true
		}
	}
	return false
}

func netipPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	p := netip.PrefixFrom(a.Unmap(), ones)
	return p, ok && p.IsValid()
}

// SinceBoot is the time since the machine started, sleep included; 0 when the
// system has no such clock. Safe for concurrent use.
func SinceBoot() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
