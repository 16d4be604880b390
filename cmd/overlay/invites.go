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
			return printJSON(cmd.OutOrStdout(), invitesJSON(list))
		}
		rows := make([][]string, 0, len(list.Invites))
		for _, i := range list.Invites {
			rows = append(rows, inviteRow(i))
		}
		return printTable(cmd.OutOrStdout(), []string{"STATE", "USED", "EXPIRES", "NAME", "TAGS", "MADE BY", "USED BY"}, rows)
	}
	return cmd
}

func invitesJSON(list coord.InviteList) invitesOutput {
	out := invitesOutput{Schema: schema, Invites: []coord.InviteInfo{}}
	for _, i := range list.Invites {
		i.Used = append([]string{}, i.Used...)
		out.Invites = append(out.Invites, i)
	}
	return out
}

// neverYear is the year of an end that stands for none (RFC 5280 section 4.1.2.5).
const neverYear = 9999

func inviteRow(i coord.InviteInfo) []string {
	expires := i.Expires.UTC().Format(time.RFC3339)
	if i.Expires.Year() >= neverYear {
		expires = "never"
	}
	return []string{
		i.State, fmt.Sprintf("%d of %d", len(i.Used), i.Uses), expires,
		i.Name, strings.Join(i.Tags, ","), i.CreatedBy, strings.Join(i.Used, ","),
	}
}
