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
		Args:  cobra.NoArgs,
	}
	n := addNodeFlags(cmd, "state")
	var r overlay.LeaveRequest
	cmd.Flags().BoolVar(&r.ForgetRoot, "forget-root", false, "even when the only root key of the mesh goes with it")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := leave(cmd, n, r); err != nil {
			return err
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "this machine has left the mesh; its keys are deleted")
		return nil
	}
	return cmd
}

// leave asks the daemon, or does without one.
func leave(cmd *cobra.Command, n *nodeFlags, r overlay.LeaveRequest) error {
	ctx := cmd.Context()
	d := watchDaemon(n.socket)
	defer d.close()
	err := n.client().Leave(ctx, r)
	switch overlay.KindOf(err) {
	case overlay.NotRunning:
		return overlay.Leave(ctx, overlay.Config{StateDir: n.state}, r)
	case overlay.Permission, overlay.Failure:
		return err
	}
	return errors.Join(err, d.wait(ctx))
}
