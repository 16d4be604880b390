package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/okzk/sdnotify"
	"github.com/spf13/cobra"

	"overlay/coord/server"
	"overlay/overlay"
)

// coordCommand runs the coordination server in the foreground.
func coordCommand() *cobra.Command {
	var c server.Config
	var prefix string
	cmd := &cobra.Command{
		Use:   "coord",
		Short: "run the coordination server",
		Long: `Runs the coordination server until it is interrupted. As long as the mesh has no
owner it prints one line, the invite for the owner's machine; every start makes
a new one. It is also the relay for machines that cannot reach each other. It
logs to standard error.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if c.Prefix, err = parsePrefix(prefix); err != nil {
				return err
			}
			if err = checkRate(cmd, "relay-rate", c.RelayRate); err != nil {
				return err
			}
			c.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			return runCoord(cmd, c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Listen, "listen", ":443", "TCP address for nodes; UDP there answers STUN and relays")
	f.StringVar(&c.STUN, "stun", ":3478", "UDP address for STUN and relaying; the next port answers too")
	f.IntVar(&c.RelayRate, "relay-rate", 0, relayRateUsage)
	f.StringVar(&c.Public, "public", "", "HOST[:PORT] that nodes reach the server at (default found out)")
	f.StringVar(&prefix, "prefix", "", "IPv4 prefix of the mesh (default chosen by its owner's machine)")
	f.StringVar(&c.Mesh, "mesh", "home", "name of the mesh")
	f.StringVar(&c.StateDir, "state", "/var/lib/overlay-coord", "directory of the server's key and data")
	return cmd
}

func parsePrefix(s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, failure(overlay.Usage, "for example: --prefix 100.80.0.0/16", "--prefix %q is not a network", s)
	}
	return p, nil
}

func runCoord(cmd *cobra.Command, c server.Config) error {
	s, err := server.Open(c)
	if err != nil {
		return coordError(err)
	}
	if invite, ok := s.OwnerInvite(); ok {
		if err := printLine(cmd.OutOrStdout(), invite.String()); err != nil {
			return errors.Join(err, s.Close())
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "this mesh has no owner yet; on the first machine run:  sudo overlay up  with the invite above (works once)")
	}
	if err := notifyReady(); err != nil {
		return errors.Join(err, s.Close())
	}
	return s.Run(cmd.Context())
}

// coordError gives the server's errors their kind. An error about a flag begins
// with the flag.
func coordError(err error) error {
	switch {
	case strings.HasPrefix(err.Error(), "--"):
		return failure(overlay.Usage, "see: overlay coord --help", "%v", err)
	case errors.Is(err, fs.ErrPermission):
		return failure(overlay.Permission, "run it with sudo, or use another --state DIR and ports from 1024", "%v", err)
	}
	return err
}

// notifyReady tells systemd that the service is there, when it started us.
func notifyReady() error {
	if err := sdnotify.Ready(); err != nil && !errors.Is(err, sdnotify.ErrSdNotifyNoSocket) {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return nil
}
