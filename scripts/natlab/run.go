package natlab

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// Run is what became of a pair that was started anew.
type Run struct {
	// Connected says that packets passed, Direct that both nodes said they do so
	// without a relay, and After when the later of them did, from the first packet
	// on; zero when they were before that. Via is how. Reply is when the first
	// packet was answered, by whichever way.
	Connected bool          `json:"connected"`
	Direct    bool          `json:"direct"`
	After     time.Duration `json:"afterNs"`
	Via       string        `json:"via"`
	Reply     time.Duration `json:"replyNs"`
	// Spent is how many packets both nodes sent to find a path, until then or the
	// end; Routers what a router had in its table at most, and Excess says that this
	// was more than may be. Fits is how many flows of two routers led to each other at
	// most: without one there is no direct path where ports have to be guessed.
	Spent   int     `json:"packetsSpent"`
	Routers Tracked `json:"routers"`
	Excess  string  `json:"excess,omitempty"`
	Fits    int     `json:"fits"`
}

// replyGrace is how long a reply may take once both nodes are direct, or the run
// is over: a lost handshake of WireGuard is sent again after 5 s.
const replyGrace = 6 * time.Second

// skews is over how many runs the skew goes from nothing to its most.
const skews = 6

// Run starts both nodes anew, has one of them send at once, the other one in every
// other run, and looks until the path is direct, or its bar is long past.
func (p *Pair) Run(ctx context.Context, number int) (r Run, err error) {
	if err := p.stop(ctx); err != nil {
		return r, fmt.Errorf("run %d of %s: %w", number, p.cell.Name(), err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var g errgroup.Group
	g.Go(func() error { return p.watchRouters(ctx, &r) })
	g.Go(func() error { return p.churn(ctx) })
	g.Go(func() error {
		defer stop()
		return p.measure(ctx, number, &r)
	})
	if err := g.Wait(); err != nil {
		return r, fmt.Errorf("run %d of %s: %w", number, p.cell.Name(), err)
	}
	return r, nil
}

func (p *Pair) measure(ctx context.Context, number int, r *Run) error {
	skew := p.cell.Skew * time.Duration(number%skews) / (skews - 1)
	if err := p.start(ctx, skew); err != nil {
		return err
	}
	from, to := p.ends[number%2], p.ends[1-number%2]
	ping := from.Command(ctx, "ping", "-i", pingPace, to.addr.String())
	replies := &mark{text: []byte("bytes from"), found: make(chan struct{})}
	ping.Stdout = replies
	if err := ping.Start(); err != nil {
		return fmt.Errorf("start ping: %w", err)
	}
	start := time.Now()
	if err := p.await(ctx, start, r); err != nil {
		return err
	}
	if err := p.spent(ctx, r); err != nil {
		return err
	}
	select {
	case <-replies.found:
		r.Connected, r.Reply = true, replies.at.Sub(start)
	case <-time.After(replyGrace):
	}
	if err := ping.Process.Signal(os.Interrupt); err != nil {
		return fmt.Errorf("end ping: %w", err)
	}
	_ = ping.Wait() // its exit status tells of losses only
	return nil
}

// mark is a writer that waits for a text within what is written to it at once.
type mark struct {
	text  []byte
	found chan struct{}
	at    time.Time // when found was closed
}

// Write closes found at the first hit.
func (m *mark) Write(p []byte) (int, error) {
	if m.at.IsZero() && bytes.Contains(p, m.text) {
		m.at = time.Now()
		close(m.found)
	}
	return len(p), nil
}

// limit is when to give up.
func (b Bar) limit() time.Duration {
	if b.Relay {
		return relayWatch
	}
	return b.Worst + pairPast
}

// await looks at both nodes until both say that they are direct.
func (p *Pair) await(ctx context.Context, start time.Time, r *Run) error {
	for {
		via, direct := [2]string{}, 0
		for i, e := range p.ends {
			path, err := e.pathTo(ctx, p.ends[1-i])
			if err != nil {
				return err
			}
			via[i] = path.Via
			if path.Kind == "direct" {
				direct++
			}
		}
		r.After, r.Via = time.Since(start), via[0]
		if via[1] != via[0] {
			r.Via += "/" + via[1]
		}
		if r.Direct = direct == len(p.ends); r.Direct || r.After > p.cell.Bar.limit() {
			return nil
		}
		time.Sleep(pairPoll)
	}
}

// The packets that look for a path are STUN (RFC 8489), told by its cookie, and
// the first ones of TCP connections, to anybody but the servers and the core.
const spentRules = `nft -f - <<'RULES'
table inet spent
delete table inet spent
table inet spent {
	chain out {
		type filter hook output priority 0;
		oifname != "eth0" accept
		ip daddr 198.51.100.0/24 accept
		ip6 daddr 2001:db8:2::/48 accept
		meta l4proto udp @th,96,32 0x2112a442 counter
		tcp flags & (syn | ack) == syn counter
	}
}
RULES`

func (e *pairEnd) startCounting(ctx context.Context) error {
	var s script
	s.add(spentRules)
	return e.sh(ctx, s)
}

func (p *Pair) spent(ctx context.Context, r *Run) error {
	for _, e := range p.ends {
		out, err := e.Command(ctx, "nft", "list", "table", "inet", "spent").Output()
		if err != nil {
			return fmt.Errorf("count packets of %s: %w", e.name, err)
		}
		for _, found := range regexp.MustCompile(`counter packets (\d+)`).FindAllSubmatch(out, -1) {
			n, err := strconv.Atoi(string(found[1]))
			if err != nil {
				return fmt.Errorf("count packets of %s: %w", e.name, err)
			}
			r.Spent += n
		}
	}
	return nil
}

// churn makes the unrelated flows of a cell until the context ends.
func (p *Pair) churn(ctx context.Context) error {
	if p.cell.Churn == 0 {
		return nil
	}
	tick := time.NewTicker(churnPace)
	defer tick.Stop()
	for {
		for _, s := range p.strangers {
			if err := s.Churn(rand.IntN(p.cell.Churn + 1)); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
