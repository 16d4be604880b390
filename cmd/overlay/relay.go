package main

import (
	"cmp"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

const relayRateUsage = "most Mbit/s that one node relays to another (default no limit but what the machine can do)"

// relayCommand runs a relay in the foreground.
func relayCommand() *cobra.Command {
	var c overlay.RelayConfig
	cmd := &cobra.Command{
		Use:   "relay [INVITE|-]",
		Short: "run a relay for nodes that cannot reach each other",
		Long: `Runs a relay until it is interrupted. Nodes use it by themselves, the nearest of
several; it forwards what they have encrypted and can read nothing of it. The
coordination server is a relay too: more of them only make the way shorter.

The first start joins the mesh with an invite for a relay, which the machine
that founded the mesh makes:  sudo overlay invite --tag relay
Later starts need none. With "-" the invite is read from standard input; it may
also be in the variable OVERLAY_INVITE.

Nodes must reach the port by UDP, by TCP or by both. It logs to standard error.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&c.Listen, "listen", overlay.DefaultRelayListen, "UDP and TCP address for nodes")
	f.StringVar(&c.Public, "public", "", "HOST[:PORT] that nodes reach the relay at (default found out)")
	f.StringVar(&c.StateDir, "state", overlay.DefaultRelayDir, "directory of the relay's keys and what it knows of the mesh")
	f.StringVar(&c.Name, "name", "", "name of the relay (default the host name)")
	f.IntVar(&c.Rate, "rate", 0, relayRateUsage)
	f.StringVar(&c.Server, "server", "", "HOST:PORT of the server, instead of the invite's")
	f.StringVar(&c.Proxy, "proxy", "", proxyUsage)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := readRelay(cmd, &c); err != nil {
			return err
		}
		invite, err := readInvite(cmd, args)
		if err != nil {
			return err
		}
		return runRelay(cmd, c, invite)
	}
	return cmd
}

// readRelay completes what the flags say and refuses what cannot work.
func readRelay(cmd *cobra.Command, c *overlay.RelayConfig) error {
	if err := checkRate(cmd, "rate", c.Rate); err != nil {
		return err
	}
	proxy, err := readProxy(cmd, c.Proxy)
	if err != nil {
		return err
	}
	if c.Proxy = ""; proxy != nil {
		c.Proxy = *proxy
	}
	c.Listen, c.StateDir = cmp.Or(c.Listen, overlay.DefaultRelayListen), cmp.Or(c.StateDir, overlay.DefaultRelayDir)
	c.Version = version()
	c.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	return c.Check()
}

// checkRate refuses a rate that is none.
func checkRate(cmd *cobra.Command, flag string, rate int) error {
	if cmd.Flags().Changed(flag) && (rate < 1 || rate > overlay.MaxRelayRate) {
		return failure(overlay.Usage, fmt.Sprintf("use a number from 1 to %d, in Mbit/s, or leave the flag out for no limit", overlay.MaxRelayRate),
			"--%s %d is out of range", flag, rate)
	}
	return nil
}

func runRelay(cmd *cobra.Command, c overlay.RelayConfig, invite string) error {
	var told error
	err := overlay.ServeRelay(cmd.Context(), c, invite, func(string) { told = notifyReady() })
	if told != nil {
		c.Log.Warn("systemd does not know that the relay serves", "err", told)
	}
	return err
}
