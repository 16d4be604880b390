package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

// inviteOutput is the JSON of `overlay invite`.
type inviteOutput struct {
	Schema int `json:"schema"`
	overlay.InviteReply
}

// inviteCommand makes an invite.
func inviteCommand() *cobra.Command {
	var r overlay.InviteRequest
	var expires string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "invite",
		Short: "make an invite for another machine",
		Long: `Makes an invite on the machine that founded the mesh. Whoever has the invite can
join: hand it on as you would a password.`,
		Args: cobra.NoArgs,
	}
	n := addNodeFlags(cmd)
	f := cmd.Flags()
	f.IntVar(&r.Uses, "uses", 1, "number of machines it works for")
	f.StringVar(&expires, "expires", "24h", "how long it works, like 90m, 24h or 7d")
	f.StringVar(&r.Name, "name", "", "the name the machine gets")
	f.StringArrayVar(&r.Tags, "tag", nil, "a tag the machine gets; may be repeated; \"relay\" admits a relay and nothing else")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var err error
		if r.Expires, err = parseLife(expires); err != nil {
			return err
		}
		if r.Uses < 1 {
			return failure(overlay.Usage, fmt.Sprintf("use a number from 1 to %d", overlay.MaxInviteUses), "--uses %d is out of range", r.Uses)
		}
		if err := r.Check(); err != nil {
			return err
		}
		reply, err := n.client().Invite(cmd.Context(), r)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), inviteOutput{schema, reply})
		}
		explainInvite(cmd, reply, r.Tags)
		return printLine(cmd.OutOrStdout(), reply.Invite)
	}
	return cmd
}

func explainInvite(cmd *cobra.Command, r overlay.InviteReply, tags []string) {
	times := "once"
	if r.Uses > 1 {
		times = fmt.Sprintf("%d times", r.Uses)
	}
	where := "the other machine run:  sudo overlay up"
	if slices.Contains(tags, overlay.RelayTag) {
		where = "the relay's machine run:  sudo overlay relay"
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "works %s, until %s; on %s  with this invite\n",
		times, r.Expires.Local().Format("2006-01-02 15:04 MST"), where)
}

// parseLife reads a duration, with d for days beside Go's units.
func parseLife(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		n, err = strconv.Atoi(days)
		d = time.Duration(min(n, int(overlay.MaxInviteLife.Hours()))) * 24 * time.Hour
	}
	if err = cmp.Or(err, lifeInRange(d)); err != nil {
		return 0, failure(overlay.Usage, "use 1m to 30d, for example 24h or 7d", "--expires %q is not usable", s)
	}
	return d, nil
}

func lifeInRange(d time.Duration) error {
	return (&overlay.InviteRequest{Expires: cmp.Or(d, -1)}).Check()
}
