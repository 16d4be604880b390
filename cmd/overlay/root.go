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
		Version:       version(),
	}
	root.SetVersionTemplate("overlay {{.Version}}\n")
	root.AddCommand(
		coordCommand(), relayCommand(), upCommand(), downCommand(), leaveCommand(),
		statusCommand(), pingCommand(), whyCommand(), netcheckCommand(), ipCommand(), sshCommand(),
		inviteCommand(), invitesCommand(), nodesCommand(), versionCommand(),
	)
	root.SetFlagErrorFunc(flagError)
	limitCompletion(root)
	return root
}

// limitCompletion has a shell that there is no completion for refused.
func limitCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	if cmd, _, err := root.Find([]string{"completion"}); err == nil {
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
}

// nodeFlags say which node a verb is about.
type nodeFlags struct {
	state      string
	socket     string
	iface      string
	listenPort int
}

// addNodeFlags gives cmd the flag for the socket and those of the others that it names:
// a flag that would change nothing is refused.
func addNodeFlags(cmd *cobra.Command, names ...string) *nodeFlags {
	n := &nodeFlags{state: overlay.DefaultStateDir}
	f := cmd.Flags()
	f.StringVar(&n.socket, "socket", overlay.DefaultSocket, "socket of the daemon")
	for _, name := range names {
		switch name {
		case "state":
			f.StringVar(&n.state, name, overlay.DefaultStateDir, "directory of keys and settings")
		case "interface":
			f.StringVar(&n.iface, name, "", fmt.Sprintf("network interface (default %q)", overlay.DefaultInterface))
		case "listen-port":
			f.IntVar(&n.listenPort, name, 0, "UDP port (default a random one, drawn once)")
		}
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
