package natlab

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	shortRuns, fullRuns   = 1, 20
	shortJoins, fullJoins = 1, 5

	fastPing = 50 * time.Millisecond

	upMedian    = 1 * time.Second
	replyMedian = 400 * time.Millisecond
	replyWorst  = 2 * time.Second
)

// What is measured of every run. The first counts from the start of the
// command, the others from the return of the later `overlay up`.
const (
	whatUp     = "overlay up"
	whatReply  = "first reply"
	whatDirect = "direct"
)

// drained is how long the Internet may still deliver what was sent to a laptop
// that is down. A router that accepts input and has just forgotten everything
// would give it the port that the laptop is about to need.
const drained = 100 * time.Millisecond

func kinds() []NAT { return []NAT{Public, Masquerade, FullCone, OpenInput} }

func runs(short, full int) int {
	if testing.Short() {
		return short
	}
	return full
}

// TestMatrix connects laptops behind every pair of routers, again and again.
// The routers forget everything between runs.
func TestMatrix(t *testing.T) {
	needLab(t)
	var all figures
	var cells []matrixCell
	for i, one := range kinds() {
		for _, two := range kinds()[i:] {
			cells = append(cells, matrixCell{all: &all, one: one, two: two, number: len(cells)})
		}
	}
	aside(t, cells, matrixCell.name, func(t *testing.T, c matrixCell) { c.run(t) })
	all.report(t)
	all.of(whatUp).atMost(t, slack(upMedian), 0)
	all.of(whatReply).atMost(t, slack(replyMedian), slack(replyWorst))
	for _, g := range all.list {
		switch {
		case len(g.Seconds) < fullJoins:
		case g.What == whatUp:
			g.atMost(t, upMedian, 0)
		case g.What == whatReply:
			g.atMost(t, replyMedian, replyWorst)
		}
	}
}

// matrixCell is a pair of routers.
type matrixCell struct {
	all      *figures
	one, two NAT
	number   int
}

func (c matrixCell) name() string { return fmt.Sprintf("%s,%s", c.one, c.two) }

// run has the one begin in every other run of a cell, and of every other cell in the
// first, for a cell of the short form has no more.
func (c matrixCell) run(t *testing.T) {
	m, a, b := pair(t, c.one, c.two)
	r := &race{t: t, all: c.all, a: a, b: b}
	for _, skew := range []time.Duration{0, 200 * time.Millisecond} {
		r.cell = fmt.Sprintf("%s, skew %v", c.name(), skew)
		for i := range runs(shortRuns, fullRuns) {
			r.again(skew, c.number+i)
		}
	}
	r.cell = c.name() + ", join"
	for i := range runs(shortJoins, fullJoins) {
		r.rejoin(m, i)
	}
}

// race measures two nodes that meet.
type race struct {
	t    *testing.T
	all  *figures
	cell string
	a, b *member
}

// again takes both nodes down and up, the second after the first by skew, and
// has them meet.
func (r *race) again(skew time.Duration, run int) {
	r.t.Helper()
	r.restart(skew)
	r.meet(run)
}

// restart takes both nodes down and up; their routers forget everything in
// between.
func (r *race) restart(skew time.Duration) {
	r.t.Helper()
	ctx := r.t.Context()
	if err := both(r.a, r.b, func(n *member) error { return n.down(ctx) }); err != nil {
		r.t.Fatal(err)
	}
	time.Sleep(drained)
	if err := both(r.a, r.b, func(n *member) error { return n.home.Reboot(ctx) }); err != nil {
		r.t.Fatal(err)
	}
	var g errgroup.Group
	g.Go(func() error { return r.a.up(ctx) })
	time.Sleep(skew)
	g.Go(func() error { return r.b.up(ctx) })
	if err := g.Wait(); err != nil {
		r.t.Fatal(err)
	}
}

// rejoin has the second laptop leave the mesh and join it anew.
func (r *race) rejoin(m *mesh, run int) {
	r.t.Helper()
	ctx := r.t.Context()
	if _, err := r.b.run(ctx, "leave"); err != nil {
		r.t.Fatal(err)
	}
	time.Sleep(drained)
	if err := r.b.home.Reboot(ctx); err != nil {
		r.t.Fatal(err)
	}
	r.b.nodeName = fmt.Sprintf("b%d", run)
	if err := r.b.up(ctx, "--name", r.b.nodeName, m.members[0].newInvite(r.t)); err != nil {
		r.t.Fatal(err)
	}
	r.meet(1) // nobody knows the new address of b
	r.b.addr = r.b.status(r.t).Self.IPv4
}

// meet measures from now until the nodes have met; every other run it is the
// second node that pings.
func (r *race) meet(run int) {
	r.t.Helper()
	from, to := r.a, r.b
	if run%2 == 1 {
		from, to = to, from
	}
	ping := startPing(r.t, from.Host, to.addr, fastPing)
	direct, err := awaitDirect(r.t.Context(), r.a, r.b)
	if err != nil {
		r.t.Errorf("%s, run %d: %v", r.cell, run, err)
	}
	reply, err := ping.firstReply(directWait)
	ping.stop(r.t)
	if err != nil {
		r.t.Errorf("%s, run %d: %v", r.cell, run, err)
		reply = directWait
	}
	for _, n := range []*member{r.a, r.b} {
		r.all.add(r.cell, whatUp, n.took)
	}
	r.all.add(r.cell, whatReply, reply)
	r.all.add(r.cell, whatDirect, direct)
	if testing.Verbose() {
		r.t.Logf("%s, run %d: up %v %v, reply %v, direct %v", r.cell, run, r.a.took, r.b.took, reply, direct)
	}
}

func both(a, b *member, do func(*member) error) error {
	var g errgroup.Group
	for _, n := range []*member{a, b} {
		g.Go(func() error { return do(n) })
	}
	return g.Wait()
}
