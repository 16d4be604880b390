//go:build !unix

package direct

import "syscall"

// reuse lets several sockets of this program have one port, which SO_REUSEADDR
// does here alone.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	failed := c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(syscall.Handle(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	})
	if failed != nil {
		return failed
	}
	return err
}
