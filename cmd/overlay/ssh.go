package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// sshCommand becomes the system's ssh to a peer's overlay address.
func sshCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ssh [USER@]NAME [ARG...]",
		Short: "run ssh to a peer",
		Long: `Runs the system's ssh to the peer's overlay address. Host keys are remembered by
the peer's name, and whatever stands after NAME goes to ssh as it is.`,
		Args: cobra.MinimumNArgs(1),
	}
	cmd.Flags().SetInterspersed(false)
	n := addNodeFlags(cmd)
	cmd.ValidArgsFunction = completePeers(n)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		st, err := n.client().Status(cmd.Context())
		if err != nil {
			return err
		}
		peer, argv, err := sshArgs(st, args)
		if err != nil {
			return err
		}
		tellAbsence(cmd.ErrOrStderr(), peer)
		program, err := exec.LookPath(argv[0])
		if err != nil {
			return failure(overlay.Failure, "install an OpenSSH client", "there is no ssh on this machine")
		}
		if err := syscall.Exec(program, argv, os.Environ()); err != nil {
			return fmt.Errorf("run %s: %w", program, err)
		}
		return nil
	}
	return cmd
}

// tellAbsence says why ssh may wait for long.
func tellAbsence(w io.Writer, peer overlay.PeerStatus) {
	if !peer.Online && peer.Path.Kind == "none" {
		fmt.Fprintf(w, "%s is not connected; trying all the same\n", clean(peer.Name))
	}
}

// sshArgs is the peer, and the command line of ssh, for what the user asked.
func sshArgs(st overlay.Status, args []string) (peer overlay.PeerStatus, argv []string, err error) {
	name, to := args[0], ""
	if at := strings.LastIndexByte(name, '@'); at >= 0 {
		to, name = name[:at+1], name[at+1:]
	}
	if strings.HasPrefix(to, "-") {
		return peer, nil, failure(overlay.Usage, "options of ssh go after NAME", "user %q begins with \"-\"", strings.TrimSuffix(to, "@"))
	}
	if name == "" {
		return peer, nil, failure(overlay.Usage, "for example: overlay ssh root@laptop-b", "%q names no peer", args[0])
	}
	if peer, err = findPeer(st, name); err != nil {
		return peer, nil, err
	}
	argv = []string{"ssh", "-o", "HostKeyAlias=" + peer.Name, to + peer.IPv4.String()}
	return peer, append(argv, args[1:]...), nil
}
