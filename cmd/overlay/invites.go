package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlay/coord"
)

// invitesOutput is the JSON of `overlay invites`.
type invitesOutput struct {
	Schema  int                `json:"schema"`
	Invites []coord.InviteInfo `json:"invites"`
}

// invitesCommand lists the invites of the mesh.
func invitesCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "invites",
		Short: "list the invites and who used them",
		Args:  cobra.NoArgs,
	}
	n := addNodeFlags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := n.client().Invites(cmd.Context())
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), invitesOutput{schema, append([]coord.InviteInfo{}, list.Invites...)})
		}
		rows := make([][]string, 0, len(list.Invites))
		for _, i := range list.Invites {
			rows = append(rows, inviteRow(i))
		}
		return printTable(cmd.OutOrStdout(), []string{"STATE", "USED", "EXPIRES", "NAME", "TAGS", "MADE BY", "USED BY"}, rows)
	}
	return cmd
}

func inviteRow(i coord.InviteInfo) []string {
	return []string{
		i.State, fmt.Sprintf("%d of %d", len(i.Used), i.Uses), i.Expires.UTC().Format(time.RFC3339),
		i.Name, strings.Join(i.Tags, ","), i.CreatedBy, strings.Join(i.Used, ","),
	}
}
