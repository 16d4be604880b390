package overlay

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"overlay/coord"
	"overlay/tun"
)

// CheckInvite reads an invite without the network; its error is for people.
func CheckInvite(s string) error {
	_, err := parseInvite(s)
	return err
}

func parseInvite(s string) (coord.Invite, error) {
	inv, err := coord.ParseInvite(s)
	if err != nil {
		return inv, &Error{Kind: Usage, Message: err.Error()}
	}
	return inv, nil
}

// serverError turns what a request to the server ended with into an Error.
func serverError(err error, server string) error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if e, ok := errors.AsType[*coord.Error](err); ok {
		return &Error{Kind: refusal(e.Code), Message: e.Message, Hint: e.Hint}
	}
	if reach, ok := errors.AsType[*coord.ReachError](err); ok {
		return &Error{Kind: Unreachable, Message: reach.Error(), Hint: "check that the server runs and that this network reaches it, then run it again"}
	}
	if pin, ok := errors.AsType[*coord.PinError](err); ok {
		return &Error{Kind: Refused, Message: pin.Error(), Hint: "if the server was set up anew, its owner has new invites"}
	}
	if errors.Is(err, coord.ErrMesh) {
		return &Error{Kind: Refused, Message: err.Error(), Hint: "ask the owner of the mesh; do not use this server until it is clear why"}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fail(Unreachable, "run it again", "the server at %s did not answer in time", server)
	}
	return err
}

func refusal(c coord.Code) Kind {
	switch c {
	case coord.CodeRateLimited, coord.CodeStorage, coord.CodeInternal:
		return Failure
	}
	return Refused
}

// troubleText is the one-line reason why the server is not reached.
func troubleText(err error) string {
	if err == nil {
		return "the server did not answer yet"
	}
	return serverError(err, "the server").Error()
}

// deviceError says why the interface could not be opened.
func deviceError(err error, c *settings) error {
	switch {
	case errors.Is(err, tun.ErrNoTUN):
		return fail(Failure, "in a container add: --device /dev/net/tun --cap-add NET_ADMIN; on a host: modprobe tun", "/dev/net/tun is missing")
	case errors.Is(err, tun.ErrPermission), errors.Is(err, fs.ErrPermission):
		return errNeedRoot()
	case errors.Is(err, tun.ErrInterfaceTaken):
		return fail(Failure, "use another name: overlay up --interface NAME", "interface %q exists and is not ours: %v", c.Interface, err)
	case errors.Is(err, tun.ErrPortTaken):
		return fail(Failure, "use another port: overlay up --listen-port N", "%v", err)
	}
	return err
}

func errNeedRoot() *Error {
	return fail(Permission, "run it with sudo", "creating the network interface needs root")
}

// CheckMachine finds out, before anything is started, whether this machine can
// run a node at all.
func CheckMachine() error {
	if _, err := os.Stat("/dev/net/tun"); errors.Is(err, fs.ErrNotExist) {
		return deviceError(tun.ErrNoTUN, nil)
	}
	if os.Geteuid() != 0 {
		return errNeedRoot()
	}
	return nil
}
