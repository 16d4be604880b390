package tun

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// Bounds of a super-packet that travels as one message, in bytes: with headers
// it stays below what one UDP_SEGMENT send takes, and below 64 fragments.
const (
	maxSuper        = 62000
	messagePadding  = 15 // at most
	messageOverhead = keepaliveSize + messagePadding + recordAt + reportRecord
)

// superSize is the largest super-packet of one message over paths of an MTU.
func superSize(mtu int) int {
	return min(maxSuper, maxFragments*(mtu+keepaliveSize-fragmentHeader)-messageOverhead)
}

// limitSuper makes the kernel build super-packets no larger than a message
// takes. Without, they are cut in two.
func limitSuper(name string, size int) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetGSOMaxSize(l, size); err != nil {
		return fmt.Errorf("set gso_max_size of %s to %d: %w", name, size, err)
	}
	// Kernels before 6.3 have one size for both families.
	_ = netlink.LinkSetGSOIPv4MaxSize(l, size)
	return nil
}
