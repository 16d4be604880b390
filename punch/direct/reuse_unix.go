//go:build unix

package direct

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// reuse lets several sockets of this program have one port: a listener and
// connections to the server and to the peer.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	failed := c.Control(func(fd uintptr) {
		err = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
		)
	})
	return errors.Join(failed, err)
}
