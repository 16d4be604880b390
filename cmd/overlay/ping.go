package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"overlay/overlay"
)

const (
	pingInterval = time.Second
	directWait   = 10 * time.Second // of --until-direct without -c

	// Until the first reply, echoes leave faster: one that is lost because the
	// path is only being made would cost its whole timeout.
	burstInterval = 150 * time.Millisecond
	burstCount    = 13
	burstWait     = 2500 * time.Millisecond
)

// pinger is one run of `overlay ping`.
type pinger struct {
	client      *overlay.Client
	peer        string
	count       int // 0: until interrupted
	untilDirect bool
	print       func(seq int, r overlay.PingReply) error
	note        io.Writer // what --until-direct waits for goes here

	answered bool
	last     overlay.PathStatus // of the last reply
}

// pingOutput is one line of `overlay ping --json`.
type pingOutput struct {
	Schema int `json:"schema"`
	Seq    int `json:"seq"`
	overlay.PingReply
}

// pingCommand sends echoes to a peer and tells by which path they went.
func pingCommand() *cobra.Command {
	p := &pinger{}
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "ping PEER",
		Short: "ping a peer and show the path",
		Args:  cobra.ExactArgs(1),
	}
	n := addNodeFlags(cmd)
	cmd.ValidArgsFunction = completePeers(n)
	cmd.Flags().IntVarP(&p.count, "count", "c", 0, "stop after this many (default never)")
	cmd.Flags().BoolVar(&p.untilDirect, "until-direct", false, "stop at the first reply over a direct path (at most 10 s without -c)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if p.count < 0 || p.count == 0 && cmd.Flags().Changed("count") {
			return failure(overlay.Usage, "use a number from 1", "-c %d is out of range", p.count)
		}
		p.client, p.peer, p.note = n.client(), args[0], cmd.ErrOrStderr()
		p.print = func(_ int, r overlay.PingReply) error { return printLine(cmd.OutOrStdout(), pingText(r)) }
		if asJSON {
			p.print = func(seq int, r overlay.PingReply) error {
				return printJSONLine(cmd.OutOrStdout(), pingOutput{schema, seq, r})
			}
		}
		return p.run(cmd.Context())
	}
	return cmd
}

func pingText(r overlay.PingReply) string {
	if !r.OK && !r.IP.IsValid() {
		return clean("no reply from " + r.Name)
	}
	if !r.OK {
		return clean(fmt.Sprintf("no reply from %s (%s)", r.Name, r.IP))
	}
	via := r.Path.Endpoint
	if via == "" || r.Path.Kind == "relay" {
		via = pathText(r.Path)
	} else if r.Path.Via == "tcp" {
		via += " (tcp)"
	}
	return clean(fmt.Sprintf("pong from %s (%s) via %s in %s", r.Name, r.IP, via, roundTrip(r.RTTms)))
}

func (p *pinger) run(ctx context.Context) error {
	if p.untilDirect && p.count == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, directWait)
		defer cancel()
	}
	for seq := 1; p.count == 0 || seq <= p.count; seq++ {
		start := time.Now()
		r, err := p.ping(ctx)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		p.answered = p.answered || r.OK
		if err := p.print(seq, r); err != nil {
			return err
		}
		if p.untilDirect && r.OK && r.Path.Kind == "direct" {
			return nil
		}
		p.explain(r)
		if seq == p.count || !pause(ctx, pingInterval-time.Since(start)) {
			break
		}
	}
	return p.verdict()
}

// explain says, when it is news, why the path is not direct.
func (p *pinger) explain(r overlay.PingReply) {
	if p.untilDirect && r.Path.Reason != "" && r.Path.Reason != p.last.Reason {
		fmt.Fprintf(p.note, "  not direct: %s\n", clean(r.Path.Reason))
	}
	p.last = r.Path
}

func (p *pinger) verdict() error {
	switch {
	case !p.answered:
		return failure(overlay.NoReply, "see whether it is online: overlay status", "no reply from %q", p.peer)
	case p.untilDirect && p.last.Reason != "":
		return failure(overlay.Failure, "see its path: overlay status", "%q answers, but not over a direct path yet: %s", p.peer, p.last.Reason)
	case p.untilDirect:
		return failure(overlay.Failure, "see its path: overlay status", "%q answers, but not over a direct path yet", p.peer)
	}
	return nil
}

// ping is one numbered ping: a burst until the peer has answered once.
func (p *pinger) ping(ctx context.Context) (overlay.PingReply, error) {
	if p.answered {
		return p.client.Ping(ctx, p.peer)
	}
	ctx, cancel := context.WithTimeout(ctx, burstWait)
	defer cancel()
	b := &burst{best: overlay.PingReply{Name: p.peer}}
	g, ctx := errgroup.WithContext(ctx)
	for i := range burstCount {
		g.Go(func() error {
			if !pause(ctx, time.Duration(i)*burstInterval) {
				return nil
			}
			r, err := p.client.Ping(ctx, p.peer)
			if ctx.Err() != nil {
				return nil // another one was answered, or nobody waits any more
			}
			if err == nil && b.offer(r) {
				cancel()
			}
			return err
		})
	}
	err := g.Wait()
	return b.best, err
}

// burst collects the replies to several echoes at once.
type burst struct {
	mu   sync.Mutex
	best overlay.PingReply
}

// offer keeps the first good reply and says whether r was good.
func (b *burst) offer(r overlay.PingReply) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.best.OK {
		b.best = r
	}
	return r.OK
}
