package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// leaveCommand gives up this machine's place in the mesh.
func leaveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "leave the mesh for good and delete the keys",
		Long: `Tells the server that this machine leaves the mesh, ends the daemon and deletes the
keys. With --state it is the node or the relay of that directory that leaves; a
relay is to be stopped first.`,
		Args: cobra.NoArgs,
	}
	n := addNodeFlags(cmd, "state")
	var r overlay.LeaveRequest
	cmd.Flags().BoolVar(&r.ForgetRoot, "forget-root", false, "even when the only root key of the mesh goes with it")
	cmd.Flags().BoolVar(&r.Offline, "offline", false, "even when the server cannot be told; it lists this machine for ever then")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := leave(cmd, n, r); err != nil {
			return err
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "this machine has left the mesh; its keys are deleted")
		return nil
	}
	return cmd
}

// leave asks the daemon, or does without one. A directory that is named is the
// only one that is left: the daemon may be that of another.
func leave(cmd *cobra.Command, n *nodeFlags, r overlay.LeaveRequest) error {
	ctx, named := cmd.Context(), cmd.Flags().Changed("state")
	state, socket, err := n.places()
	if err != nil {
		return err
	}
	if named {
		r.State = state
	}
	d := watchDaemon(n.socket)
	defer d.close()
	err = n.client().Leave(ctx, r)
	kind := overlay.KindOf(err)
	switch {
	case kind == overlay.NotRunning && !named && cmd.Flags().Changed("socket"):
		return failure(kind, "name the directory of its keys: overlay leave --state DIR", "no daemon runs at the socket %s", socket)
	case kind == overlay.NotRunning:
		return overlay.Leave(ctx, overlay.Config{StateDir: state}, r)
	case err == nil, kind == overlay.Unreachable && r.Offline:
		return errors.Join(err, d.wait(ctx))
	}
	return err
}
