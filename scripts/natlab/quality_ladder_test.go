package natlab

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlay/overlay"
)

const (
	// rungWait and rungMore: rung n has to be reached within rungWait + n·rungMore.
	rungWait, rungMore = 20 * time.Second, 10 * time.Second
	rungPing           = 200 * time.Millisecond
	rungPoll           = 50 * time.Millisecond
	rungLook           = 5 * time.Second // for how long it is looked at how it goes on

	// envRungs chooses rungs by their numbers, with commas between them.
	envRungs = "OVERLAY_LAB_RUNGS"
)

// rung is a line of one of two laptops, as bad as its number says.
type rung struct {
	name string
	line Line
	// relay says that a relay is good enough.
	relay bool
}

func (r rung) limit(number int) time.Duration { return rungWait + time.Duration(number)*rungMore }

// rungs are the nine qualities that iroh tests with, iroh/tests/patchbay/degrade.rs:
// the rate and the queue of the line, which is as long as the round trip, are those
// of either direction, and so are losses.
func rungs() []rung {
	line := func(kbit int, trip, jitter time.Duration, loss, burst float64) Line {
		return Line{
			Rate: kbit * 1000, Queue: trip * time.Millisecond, Delay: trip * time.Millisecond / 2,
			Jitter: jitter * time.Millisecond, Loss: loss / 100, Burst: burst,
		}
	}
	return []rung{
		{"good wifi", line(100_000, 16, 0, 0.1, 5), false},
		{"congested wifi", line(25_000, 40, 12, 1, 6), false},
		{"weak 4G", line(8_000, 90, 15, 2, 8), false},
		{"slow 3G", line(3_000, 200, 30, 3, 10), false},
		{"congested cellular", line(1_500, 300, 40, 5, 12), false},
		{"very bad cellular", line(800, 450, 60, 8, 20), false},
		{"satellite", line(25_000, 600, 40, 1.5, 6), false},
		{"barely usable", line(500, 450, 80, 12, 25), false},
		{"absurd", line(256, 800, 150, 25, 40), true},
	}
}

// TestQualityLadder has two laptops start and meet while the line of one of them is
// bad, the one's and the other's in turn, beginning with another on every rung.
func TestQualityLadder(t *testing.T) {
	needLab(t)
	list, err := chosenRungs(os.Getenv(envRungs), testing.Short())
	if err != nil {
		t.Fatal(err)
	}
	l := newQualityLadder(t)
	for _, n := range list {
		t.Run(fmt.Sprintf("%d %s", n, rungs()[n].name), func(t *testing.T) {
			for i := range runs(1, 6) {
				l.climb(t, n, i)
			}
		})
	}
	l.all.report(t)
}

// chosenRungs are those of a list, or all; the short form has one.
func chosenRungs(list string, short bool) (numbers []int, err error) {
	switch {
	case list == "" && short:
		list = "7"
	case list == "":
		list = "0,1,2,3,4,5,6,7,8"
	}
	for text := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 || n >= len(rungs()) {
			return nil, fmt.Errorf("%s: there is no rung %q", envRungs, text)
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

func TestChosenRungs(t *testing.T) {
	for list, want := range map[string]int{"": len(rungs()), "7": 1, "0,8": 2} {
		if got, err := chosenRungs(list, false); err != nil || len(got) != want {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
	if got, err := chosenRungs("", true); err != nil || len(got) != 1 {
		t.Errorf("short: %v, %v", got, err)
	}
	for _, list := range []string{"9", "-1", "x", "1,", "1,9"} {
		if got, err := chosenRungs(list, false); err == nil {
			t.Errorf("%q: %v", list, got)
		}
	}
}

// qualityLadder is a mesh of two whose homes hang on lines of their own.
type qualityLadder struct {
	all   figures
	ends  [2]*member
	lines [2]*AccessLine
}

func newQualityLadder(t *testing.T) *qualityLadder {
	t.Helper()
	m := newMeshIn(t, Options{Delay: time.Millisecond})
	l := &qualityLadder{}
	for i, name := range []string{"a", "b"} {
		laptop := m.laptopAt(t, name, Masquerade)
		l.lines[i] = mustAccess(t, m.Lab, laptop.home)
		l.ends[i] = m.join(t, laptop)
	}
	mustDirect(t, l.ends[0], l.ends[1])
	return l
}

func (l *qualityLadder) climb(t *testing.T, number, run int) {
	t.Helper()
	r, bad := rungs()[number], (number+run)%2
	cell := fmt.Sprintf("rung %d, %s", number, r.name)
	l.restart(t)
	line := r.line
	line.Seed = uint64(100*number + 10*run + 1)
	l.lines[bad].Set(line)
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), r.limit(number))
	defer cancel()
	if err := l.up(ctx); err != nil {
		t.Errorf("run %d: %v", run, err)
		return
	}
	up := time.Since(begin)
	ping := startPing(t, l.ends[0].Host, l.ends[1].addr, rungPing)
	reply, err := ping.firstReply(r.limit(number) - up)
	reply += up
	if err != nil {
		t.Errorf("run %d: not connected within %v", run, r.limit(number))
	} else {
		l.all.add(cell, whatReply, reply)
	}
	direct, ok := l.direct(ctx, begin)
	shares := l.look(t)
	some := sentBetween(ping.stop(t), ping.now()-rungLook, ping.now()-2*time.Second)
	t.Logf("run %d, line of %s: up %v, reply %v, direct %v %v, then in %.0f and %.0f %% of the time, %d of %d pings lost", run, l.ends[bad].nodeName,
		up.Round(time.Millisecond), reply.Round(time.Millisecond), ok, direct.Round(time.Millisecond), 100*shares[0], 100*shares[1], lost(some), len(some))
	if ok {
		l.all.add(cell, whatDirect, direct)
	} else if !r.relay {
		t.Errorf("run %d: not direct within %v: %+v, %+v", run, r.limit(number),
			pathTo(l.ends[0].status(t), l.ends[1].nodeName), pathTo(l.ends[1].status(t), l.ends[0].nodeName))
	}
}

// restart takes both nodes down while all lines are good, and has their routers
// forget everything.
func (l *qualityLadder) restart(t *testing.T) {
	t.Helper()
	for _, line := range l.lines {
		line.Set(Line{})
	}
	if err := both(l.ends[0], l.ends[1], func(n *member) error { return n.down(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	time.Sleep(drained)
	if err := both(l.ends[0], l.ends[1], func(n *member) error { return n.home.Reboot(t.Context()) }); err != nil {
		t.Fatal(err)
	}
}

func (l *qualityLadder) up(ctx context.Context) error {
	return both(l.ends[0], l.ends[1], func(n *member) error { return n.up(ctx) })
}

// directNow says of both nodes whether they say that their path is direct.
func (l *qualityLadder) directNow(ctx context.Context) (now [2]bool, err error) {
	for i, n := range l.ends {
		var st overlay.Status
		if st, err = n.client.Status(ctx); err != nil {
			return now, err
		}
		now[i] = pathTo(st, l.ends[1-i].nodeName).Kind == "direct"
	}
	return now, nil
}

// direct waits until both are.
func (l *qualityLadder) direct(ctx context.Context, begin time.Time) (time.Duration, bool) {
	for ctx.Err() == nil {
		now, err := l.directNow(ctx)
		if err == nil && now[0] && now[1] {
			return time.Since(begin), true
		}
		time.Sleep(rungPoll)
	}
	return 0, false
}

// look is for which share of the next seconds each is direct.
func (l *qualityLadder) look(t *testing.T) (shares [2]float64) {
	t.Helper()
	count := int(rungLook / rungPoll)
	for range count {
		now, err := l.directNow(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i, ok := range now {
			if ok {
				shares[i] += 1 / float64(count)
			}
		}
		time.Sleep(rungPoll)
	}
	return shares
}
