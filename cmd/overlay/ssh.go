package main

import (
	"fmt"
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
		argv, err := sshArgs(st, args)
		if err != nil {
			return err
		}
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

// sshArgs is the command line of ssh for what the user asked.
func sshArgs(st overlay.Status, args []string) ([]string, error) {
	name, to := args[0], ""
	if at := strings.LastIndexByte(name, '@'); at >= 0 {
		to, name = name[:at+1], name[at+1:]
	}
	if strings.HasPrefix(to, "-") {
		return nil, failure(overlay.Usage, "options of ssh go after NAME", "user %q begins with \"-\"", strings.TrimSuffix(to, "@"))
	}
	if name == "" {
		return nil, failure(overlay.Usage, "for example: overlay ssh root@laptop-b", "%q names no peer", args[0])
	}
	p, err := findPeer(st, name)
	if err != nil {
		return nil, err
	}
	argv := []string{"ssh", "-o", "HostKeyAlias=" + p.Name, to + p.IPv4.String()}
	return append(argv, args[1:]...), nil
}
