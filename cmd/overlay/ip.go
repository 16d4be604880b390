package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// ipCommand prints overlay addresses.
func ipCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ip [NAME]",
		Short: "print the overlay addresses of this machine or of a peer",
		Args:  cobra.MaximumNArgs(1),
	}
	n := addNodeFlags(cmd)
	cmd.ValidArgsFunction = completePeers(n)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		st, err := n.client().Status(cmd.Context())
		if err != nil {
			return err
		}
		four, six := st.Self.IPv4, st.Self.IPv6
		if len(args) == 1 && args[0] != st.Self.Name {
			p, err := findPeer(st, args[0])
			if err != nil {
				return err
			}
			four, six = p.IPv4, p.IPv6
		}
		return printLine(cmd.OutOrStdout(), fmt.Sprintf("%s\n%s", four, six))
	}
	return cmd
}

// findPeer looks a peer up by name or overlay address.
func findPeer(st overlay.Status, name string) (overlay.PeerStatus, error) {
	if s := st.Self; name == s.Name || name == s.IPv4.String() || name == s.IPv6.String() {
		return overlay.PeerStatus{}, overlay.ThisMachine(name)
	}
	for _, p := range st.Peers {
		if p.Name == name || p.IPv4.String() == name || p.IPv6.String() == name {
			return p, nil
		}
	}
	for _, r := range st.Relays {
		if r.Name == name && !r.Peer {
			return overlay.PeerStatus{}, overlay.NotAPeer(name)
		}
	}
	return overlay.PeerStatus{}, overlay.UnknownPeer(name, peerNames(st))
}
