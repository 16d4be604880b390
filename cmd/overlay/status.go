package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// watchInterval is how often `status --watch` looks.
const watchInterval = time.Second

// clearScreen is "cursor home, erase all" (ECMA-48).
const clearScreen = "\x1b[H\x1b[2J"

// statusCommand shows this node's view of the mesh.
func statusCommand() *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "show this node, its peers and the paths to them",
		Args:  cobra.NoArgs,
	}
	n := addNodeFlags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&watch, "watch", false, "show it again every second")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		show := showStatus
		switch {
		case asJSON && watch:
			show = func(cmd *cobra.Command, st overlay.Status) error { return printJSONLine(cmd.OutOrStdout(), st) }
		case asJSON:
			show = func(cmd *cobra.Command, st overlay.Status) error { return printJSON(cmd.OutOrStdout(), st) }
		case watch:
			show = redrawStatus
		}
		st, err := n.client().Status(cmd.Context())
		if err != nil {
			return err
		}
		if err := show(cmd, st); err != nil || !watch {
			return err
		}
		return watchStatus(cmd, n, show)
	}
	return cmd
}

// watchStatus shows the status every second until the user has seen enough.
func watchStatus(cmd *cobra.Command, n *nodeFlags, show func(*cobra.Command, overlay.Status) error) error {
	for pause(cmd.Context(), watchInterval) {
		st, err := n.client().Status(cmd.Context())
		if cmd.Context().Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		if err := show(cmd, st); err != nil {
			return err
		}
	}
	return nil
}

// pause waits for d and says whether to go on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func redrawStatus(cmd *cobra.Command, st overlay.Status) error {
	out := cmd.OutOrStdout()
	if mayDraw(out) {
		if _, err := io.WriteString(out, clearScreen); err != nil {
			return fmt.Errorf("write the output: %w", err)
		}
		return showStatus(cmd, st)
	}
	if err := showStatus(cmd, st); err != nil {
		return err
	}
	return printLine(out, "")
}

func showStatus(cmd *cobra.Command, st overlay.Status) error {
	rows := [][]string{{st.Self.Name, st.Self.IPv4.String(), "this machine", "", "", ""}}
	now := time.Now()
	for _, p := range st.Peers {
		rows = append(rows, peerRow(p, now))
	}
	if err := printTable(cmd.OutOrStdout(), []string{"NAME", "IPV4", "PATH", "RTT", "RX/TX", "HANDSHAKE"}, rows); err != nil {
		return err
	}
	if err := showRelays(cmd.OutOrStdout(), st.Relays); err != nil {
		return err
	}
	if err := showReasons(cmd.OutOrStdout(), st.Peers); err != nil {
		return err
	}
	if err := showPeerRelay(cmd.OutOrStdout(), st.Self.PeerRelay); err != nil {
		return err
	}
	if !st.Self.Online {
		fmt.Fprintf(cmd.ErrOrStderr(), "! not connected to the server: %s\n", clean(st.Self.Trouble))
	}
	return nil
}

func peerRow(p overlay.PeerStatus, now time.Time) []string {
	handshake := ""
	if p.LastHandshake != nil {
		handshake = since(*p.LastHandshake, now)
	}
	path := pathText(p.Path)
	if p.Path.Kind == "none" {
		path = "no path yet"
		if !p.Online {
			path = "offline"
		}
	}
	return []string{
		p.Name, p.IPv4.String(), path, roundTrip(p.RTTms),
		size(p.RxBytes) + " / " + size(p.TxBytes), handshake,
	}
}

// showRelays prints the relays that this machine keeps a link to.
func showRelays(w io.Writer, list []overlay.RelayStatus) error {
	if len(list) == 0 {
		return nil
	}
	rows := make([][]string, 0, len(list))
	for _, r := range list {
		link, notes := cmp.Or(r.Transport, "down"), []string{}
		if r.Home {
			notes = append(notes, "home")
		}
		if r.Peer {
			notes = append(notes, "peer")
		}
		if r.Trouble != "" {
			notes = append(notes, r.Trouble)
		}
		rows = append(rows, []string{r.Name, link, roundTrip(r.RTTms), strings.Join(notes, "; ")})
	}
	if err := printLine(w, ""); err != nil {
		return err
	}
	return printTable(w, []string{"RELAY", "LINK", "RTT", "NOTE"}, rows)
}

// showPeerRelay says what this machine relays for others.
func showPeerRelay(w io.Writer, r *overlay.PeerRelayStatus) error {
	if r == nil {
		return nil
	}
	return printLine(w, fmt.Sprintf("\nrelays for others at port %d: %d of at most %d pairs, %d nodes, %s so far, at most %d Mbit/s",
		r.Port, r.Flows, r.MaxFlows, r.Nodes, size(int64(r.Bytes)), r.MaxMbits))
}

// showReasons says of every peer without a direct path why it has none.
func showReasons(w io.Writer, peers []overlay.PeerStatus) error {
	lines := []string{""}
	for _, p := range peers {
		if p.Path.Kind != "direct" && p.Path.Reason != "" {
			lines = append(lines, clean(fmt.Sprintf("%s is not direct: %s", p.Name, p.Path.Reason)))
		}
	}
	if len(lines) == 1 {
		return nil
	}
	return printLine(w, strings.Join(lines, "\n"))
}

// pathText says how packets go; others than root are not told the endpoint.
func pathText(p overlay.PathStatus) string {
	text := p.Kind
	if p.Kind == "relay" {
		if p.Relay != "" {
			text += " " + p.Relay
		}
		if p.Via == "peer-relay" {
			text += " (peer, udp)"
		} else if transport, up := strings.CutPrefix(p.Via, "relay-"); up {
			text += " (" + transport + ")"
		}
		return text
	}
	if p.Endpoint != "" {
		text += " " + p.Endpoint
	}
	if p.Via != "" {
		text += " (" + p.Via + ")"
	}
	return text
}
