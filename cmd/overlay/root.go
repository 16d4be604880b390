package main

import (
	"cmp"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

const about = `overlay connects machines behind NATs, directly, over WireGuard.

  on a server that the others reach      overlay coord
  on the first machine                   sudo overlay up INVITE
  on every other one                     sudo overlay up INVITE

Machines that cannot reach each other directly go through the server, or through
a nearer relay where there is one:
  on a server in another region          overlay relay INVITE

The server prints the first invite, the first machine the next one; more come
from "overlay invite". Then:  ssh to any of them by "overlay ssh NAME".`

// rootCommand is the program with all its verbs.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "overlay",
		Short:         "a private network of machines behind NATs",
		Long:          about,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(
		coordCommand(), relayCommand(), upCommand(), downCommand(), leaveCommand(),
		statusCommand(), pingCommand(), whyCommand(), netcheckCommand(), ipCommand(), sshCommand(),
		inviteCommand(), invitesCommand(), nodesCommand(), versionCommand(),
	)
	return root
}

// nodeFlags are the flags that every verb about the node takes.
type nodeFlags struct {
	state      string
	socket     string
	iface      string
	listenPort int
}

// addNodeFlags gives cmd the node flags. Those that change nothing for a verb
// are accepted but not shown, so that one set of flags fits all verbs.
func addNodeFlags(cmd *cobra.Command, shown ...string) *nodeFlags {
	n := &nodeFlags{}
	f := cmd.Flags()
	f.StringVar(&n.state, "state", overlay.DefaultStateDir, "directory of keys and settings")
	f.StringVar(&n.socket, "socket", overlay.DefaultSocket, "socket of the daemon")
	f.StringVar(&n.iface, "interface", "", fmt.Sprintf("network interface (default %q)", overlay.DefaultInterface))
	f.IntVar(&n.listenPort, "listen-port", 0, "UDP port (default a random one, drawn once)")
	for _, name := range []string{"state", "socket", "interface", "listen-port"} {
		f.Lookup(name).Hidden = true
	}
	for _, name := range append(shown, "socket") {
		f.Lookup(name).Hidden = false
	}
	return n
}

func (n *nodeFlags) client() *overlay.Client { return overlay.NewClient(n.socket) }

// places makes both paths absolute, for a process with another working folder.
func (n *nodeFlags) places() (state, socket string, err error) {
	if state, err = filepath.Abs(cmp.Or(n.state, overlay.DefaultStateDir)); err != nil {
		return "", "", fmt.Errorf("find the state directory: %w", err)
	}
	if socket, err = filepath.Abs(cmp.Or(n.socket, overlay.DefaultSocket)); err != nil {
		return "", "", fmt.Errorf("find the socket: %w", err)
	}
	return state, socket, nil
}

// completePeers offers the names of the peers for a verb's first argument.
func completePeers(n *nodeFlags) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		st, err := n.client().Status(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return peerNames(st), cobra.ShellCompDirectiveNoFileComp
	}
}

func peerNames(st overlay.Status) []string {
	names := make([]string, 0, len(st.Peers))
	for _, p := range st.Peers {
		names = append(names, p.Name)
	}
	return names
}
