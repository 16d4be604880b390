package tun

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// homeTUN is a TUN that any thread may ask for its MTU. wireguard's own asks in
// the network namespace of the thread it happens to run on, where the interface
// need not be. Safe for concurrent use.
type homeTUN struct {
	wgtun.Device
	raw    syscall.RawConn // of the TUN
	socket *os.File        // in the namespace of the interface
}

// atHome makes a homeTUN in the network namespace of the calling thread. Close
// closes dev.
func atHome(dev wgtun.Device, raw syscall.RawConn) (*homeTUN, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket to ask for the mtu: %w", err)
	}
	return &homeTUN{Device: dev, raw: raw, socket: os.NewFile(uintptr(fd), "mtu of tun")}, nil
}

// MTU is what the interface has now, under whatever name.
func (h *homeTUN) MTU() (int, error) {
	req, err := unix.NewIfreq("")
	if err != nil {
		return 0, fmt.Errorf("ask for the mtu: %w", err)
	}
	if err := ioctl(h.raw, unix.TUNGETIFF, req); err != nil {
		return 0, fmt.Errorf("ask for the name of the tun: %w", err)
	}
	raw, err := h.socket.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("ask for the mtu of %s: %w", req.Name(), err)
	}
	if err := ioctl(raw, unix.SIOCGIFMTU, req); err != nil {
		return 0, fmt.Errorf("ask for the mtu of %s: %w", req.Name(), err)
	}
	return int(int32(req.Uint32())), nil
}

// Close closes the TUN too.
func (h *homeTUN) Close() error {
	_ = h.socket.Close() // nothing was written
	return h.Device.Close()
}

// ioctl is one ioctl about an interface.
func ioctl(raw syscall.RawConn, what uint, req *unix.Ifreq) error {
	var err error
	if e := raw.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), what, req) }); e != nil {
		return e
	}
	return err
}

// MTU is the size that messages are made for: that of the interface, but not
// more than Config.MTU.
func (n *tunnel) MTU() (int, error) { return int(n.bind.mtu.Load()), nil }

// follow makes messages and datagrams follow the MTU of the interface. Whoever
// lowers that has a path that loses large datagrams.
func (n *tunnel) follow() {
	log := n.bind.config.logger()
	mtu, err := n.Device.MTU()
	if err != nil {
		log.Debug("messages keep their size", "err", err)
		return
	}
	mtu = max(min(mtu, n.bind.config.MTU), minMTU)
	if old := n.bind.mtu.Swap(int32(mtu)); int(old) != mtu {
		log.Info("messages follow the mtu of the interface", "mtu", mtu, "before", old)
	}
}
