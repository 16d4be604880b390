package main

import (
	"cmp"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"overlay/coord"
)

// nodesOutput is the JSON of `overlay nodes`.
type nodesOutput struct {
	Schema int          `json:"schema"`
	Nodes  []nodeOutput `json:"nodes"`
}

type nodeOutput struct {
	Name      string     `json:"name"`
	IPv4      netip.Addr `json:"ipv4"`
	IPv6      netip.Addr `json:"ipv6"`
	PublicKey string     `json:"publicKey"`
	Role      string     `json:"role"` // node, relay
	Tags      []string   `json:"tags"`
	Online    bool       `json:"online"`
	LastSeen  *time.Time `json:"lastSeen"`
	Joined    *time.Time `json:"joined"`
	InvitedBy string     `json:"invitedBy"`
}

// nodesCommand lists the members as the server sees them.
func nodesCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "nodes",
		Short: "list all machines of the mesh",
		Args:  cobra.NoArgs,
	}
	n := addNodeFlags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := n.client().Nodes(cmd.Context())
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), nodesJSON(list))
		}
		rows, now := make([][]string, 0, len(list.Nodes)), time.Now()
		for _, i := range list.Nodes {
			rows = append(rows, nodeRow(i, now))
		}
		return printTable(cmd.OutOrStdout(), []string{"NAME", "IPV4", "ROLE", "ONLINE", "JOINED", "INVITED BY"}, rows)
	}
	return cmd
}

func nodesJSON(list coord.NodeList) nodesOutput {
	out := nodesOutput{Schema: schema, Nodes: []nodeOutput{}}
	for _, i := range list.Nodes {
		out.Nodes = append(out.Nodes, nodeOutput{
			Name: i.Name, IPv4: i.IP4, IPv6: i.IP6, PublicKey: i.WireGuard.String(),
			Role: roleOf(i), Tags: append([]string{}, i.Tags...), Online: i.Online,
			LastSeen: timeOrNull(i.LastSeen), Joined: timeOrNull(i.Joined), InvitedBy: i.InvitedBy,
		})
	}
	return out
}

// roleOf is what a member is; a server that does not tell knows only nodes.
func roleOf(i coord.NodeInfo) string { return cmp.Or(i.Role, "node") }

func nodeRow(i coord.NodeInfo, now time.Time) []string {
	online := "online"
	if !i.Online {
		online = "offline"
		if seen := since(i.LastSeen, now); seen != "" {
			online = "offline, seen " + seen
		}
	}
	return []string{i.Name, i.IP4.String(), roleOf(i), online, since(i.Joined, now), i.InvitedBy}
}
