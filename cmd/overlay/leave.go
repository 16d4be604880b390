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
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := leave(cmd, n); err != nil {
			return err
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "this machine has left the mesh; its keys are deleted")
		return nil
	}
	return cmd
}

// leave asks the daemon, or does without one.
func leave(cmd *cobra.Command, n *nodeFlags) error {
	ctx := cmd.Context()
	d := watchDaemon(n.socket)
	defer d.close()
	err := n.client().Leave(ctx)
	switch overlay.KindOf(err) {
	case overlay.NotRunning:
		return overlay.Leave(ctx, overlay.Config{StateDir: n.state})
	case overlay.Permission:
		return err
	}
	return errors.Join(err, d.wait(ctx))
}
