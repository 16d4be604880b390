package tun

import "errors"

// What callers of Open and Run branch on. The errors returned wrap these and
// name the interface or port, and who occupies it where that can be found.
var (
	// ErrNoTUN: the kernel offers no /dev/net/tun.
	ErrNoTUN = errors.New("/dev/net/tun is missing")
	// ErrPermission: making interfaces needs CAP_NET_ADMIN.
	ErrPermission = errors.New("not permitted")
	// ErrInterfaceTaken: the name belongs to another interface, or to another
	// process's UAPI socket.
	ErrInterfaceTaken = errors.New("interface name is taken")
	// ErrPortTaken: another socket is bound to the UDP port.
	ErrPortTaken = errors.New("udp port is taken")
	// ErrInterfaceGone: somebody deleted the interface while it was in use;
	// close the Device and open it again.
	ErrInterfaceGone = errors.New("interface was deleted")
	// ErrClosed: the Device is closed, or its Run has ended.
	ErrClosed = errors.New("device is closed")
	// ErrUnknownPeer: the key was not in the last SetPeers.
	ErrUnknownPeer = errors.New("unknown peer")
)
