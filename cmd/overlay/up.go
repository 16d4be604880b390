package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

const (
	inviteEnv      = "OVERLAY_INVITE"
	offloadsEnv    = "OVERLAY_OFFLOADS"
	maxInviteInput = 8 << 10
)

// upVerb is one run of `overlay up`.
type upVerb struct {
	node       *nodeFlags
	request    overlay.UpRequest
	offloads   string
	proxy      string
	foreground bool
	daemon     bool
}

// upCommand joins if needed and connects.
func upCommand() *cobra.Command {
	v := &upVerb{}
	cmd := &cobra.Command{
		Use:   "up [INVITE|-]",
		Short: "join the mesh if needed, connect, and return when online",
		Long: `Joins with an invite the first time, connects, and returns when this machine is
online; a daemon stays. With "-" the invite is read from standard input; it may
also be in the variable OVERLAY_INVITE. Flags are remembered.

--proxy names the HTTP proxy of a network that lets nothing else out; the way
without it is tried too. Without the flag the variable HTTPS_PROXY, or
https_proxy, says the same; without both it stays as it was. --proxy none goes
without one again.

--port-mapping off does not ask the router to let peers in (by PCP, NAT-PMP or
UPnP); on does so again.

A machine that others reach without being asked, at a public address or at a port
that its router maps, relays for pairs of other members that would go a longer way
over other relays. It can read nothing of what it relays, and carries at most 32
pairs and 50 Mbit/s together; --peer-relay 200 makes that 200 Mbit/s, off ends it.

--offloads switches parts of the data path off, to find out which of them a
network, a driver or a kernel does not bear: a list, separated by commas, of
-gso and -gro (many datagrams at a time to and from the UDP sockets), -tso (large
packets to and from the interface) and -large (large messages to and from peers).
+gso uses the first one even where the kernel is known to mangle it, "" switches
all on again. The variable OVERLAY_OFFLOADS says the same.`,
		Args: cobra.MaximumNArgs(1),
	}
	v.node = addNodeFlags(cmd, "state", "interface", "listen-port")
	f := cmd.Flags()
	f.StringVar(&v.request.Name, "name", "", "name of this machine (default its host name)")
	f.StringVar(&v.request.Server, "server", "", "HOST:PORT of the server, instead of the invite's")
	f.IntVar(&v.request.MTU, "mtu", 0, fmt.Sprintf("MTU of the interface (default %d)", overlay.DefaultMTU))
	f.StringVar(&v.proxy, "proxy", "", proxyUsage)
	f.StringVar(&v.request.PortMapping, "port-mapping", "", "on or off: ask the router for a way in (default on)")
	f.StringVar(&v.request.PeerRelay, "peer-relay", "", "on, off, or Mbit/s: relay for other members (default on: at most 50 Mbit/s)")
	f.StringVar(&v.offloads, "offloads", "", "parts of the data path to switch off: -gso,-gro,-tso,-large,+gso")
	f.BoolVar(&v.foreground, "foreground", false, "run the daemon here, log to standard error")
	f.BoolVar(&v.daemon, "daemon", false, "run the daemon here, log to the state directory, wait for another up")
	f.Lookup("daemon").Hidden = true
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := v.read(cmd, args); err != nil {
			return err
		}
		if v.foreground || v.daemon {
			return v.serve(cmd)
		}
		return v.run(cmd)
	}
	return cmd
}

// read completes the request and refuses, before anything is started, what
// cannot work.
func (v *upVerb) read(cmd *cobra.Command, args []string) error {
	v.request.Interface, v.request.ListenPort = v.node.iface, v.node.listenPort
	for name, value := range map[string]int{"mtu": v.request.MTU, "listen-port": v.request.ListenPort} {
		if value == 0 && cmd.Flags().Changed(name) {
			return failure(overlay.Usage, "leave the flag out to keep what is saved", "--%s 0 is out of range", name)
		}
	}
	switch set := os.Getenv(offloadsEnv); {
	case cmd.Flags().Changed("offloads"):
		v.request.Offloads = &v.offloads
	case set != "":
		v.request.Offloads = &set
	}
	var err error
	if v.request.Proxy, err = readProxy(cmd, v.proxy); err != nil {
		return err
	}
	if v.request.Invite, err = readInvite(cmd, args); err != nil {
		return err
	}
	if err := v.request.Check(); err != nil {
		return err
	}
	return overlay.CheckMachine()
}

func readInvite(cmd *cobra.Command, args []string) (string, error) {
	invite := os.Getenv(inviteEnv)
	if len(args) == 1 {
		invite = args[0]
	}
	if invite == "-" {
		b, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxInviteInput))
		if err != nil {
			return "", fmt.Errorf("read the invite from standard input: %w", err)
		}
		return string(b), overlay.CheckInvite(string(b))
	}
	if invite == "" && len(args) == 0 {
		return "", nil
	}
	return invite, overlay.CheckInvite(invite)
}

// run has a daemon do the request and shows its progress.
func (v *upVerb) run(cmd *cobra.Command) error {
	ctx, started := cmd.Context(), false
	if !running(ctx, v.node.client()) {
		if err := v.start(ctx); err != nil {
			return err
		}
		started = true
	}
	res, err := v.node.client().Up(ctx, v.request, progressTo(cmd.ErrOrStderr()))
	if err == nil {
		return showUp(cmd, res)
	}
	if started {
		// What it could not do for this request it shall not go on trying.
		if err := stopDaemon(context.WithoutCancel(ctx), v.node); err != nil && overlay.KindOf(err) != overlay.NotRunning {
			printError(cmd.ErrOrStderr(), err)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// running says whether a daemon answers at the socket, be it with a refusal. One
// that was killed a moment ago still takes connections, but answers none.
func running(ctx context.Context, c *overlay.Client) bool {
	_, err := c.Status(ctx)
	answer, ok := errors.AsType[*overlay.Error](err)
	return err == nil || ok && answer.Kind != overlay.NotRunning
}

// progressTo shows each step of coming up as a line.
func progressTo(w io.Writer) func(overlay.Progress) {
	return func(p overlay.Progress) {
		mark := " "
		if p.Warn {
			mark = "!"
		}
		fmt.Fprintf(w, "%s %-10s %s\n", mark, clean(p.Step), clean(p.Text))
	}
}

// showUp prints the first invite of a mesh that was just founded.
func showUp(cmd *cobra.Command, res overlay.UpResult) error {
	if res.Invite == "" {
		return nil
	}
	fmt.Fprintln(cmd.ErrOrStderr(), "to add a machine, run there:  sudo overlay up  with this invite (works once, for 24 h):")
	return printLine(cmd.OutOrStdout(), res.Invite)
}
