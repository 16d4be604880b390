package tun

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// testDatagrams is how many datagrams a message of each level has here.
func testDatagrams(level int) int { return min(level, 45) }

// line sends messages at a rate to a peer that reports what it got.
type line struct {
	leveler
	random *rand.Rand
	rate   int     // messages per second
	loss   float64 // of a datagram
	rtt    time.Duration

	now               time.Duration
	received, missing uint32
	delayed           []evidence // reports on their way
	last              int        // level
	moves             int
	at                map[int]time.Duration // time spent at each level
}

func newLine(rate int, loss float64) *line {
	return &line{
		random: rand.New(rand.NewPCG(3, uint64(rate))), rate: rate, loss: loss, rtt: 100 * time.Millisecond,
		last: levelPlain, at: make(map[int]time.Duration),
	}
}

// run lets time pass, in steps of a report.
func (l *line) run(d time.Duration) {
	for end := l.now + d; l.now < end; {
		level := l.segments()
		arrives := 1.0
		for range testDatagrams(level) {
			arrives *= 1 - l.loss
		}
		for range int(time.Duration(l.rate) * reportInterval / time.Second) {
			if l.random.Float64() < arrives {
				l.received++
			} else {
				l.missing++
			}
		}
		l.now += reportInterval
		l.at[level] += reportInterval
		l.delayed = append(l.delayed, evidence{received: l.received, missing: l.missing, since: l.now + l.rtt})
		for len(l.delayed) > 0 && l.delayed[0].since <= l.now {
			r := l.delayed[0]
			l.delayed = l.delayed[1:]
			l.report(r.received, r.missing, l.now)
		}
		if l.segments() != l.last {
			l.last = l.segments()
			l.moves++
		}
	}
}

// Where the level settles in ten minutes, and how restless it is.
func TestLevelSettles(t *testing.T) {
	for _, c := range []struct {
		rate  int
		loss  float64 // of a datagram
		level int     // where most of the time is spent
		share float64 // at least
		moves int     // at most
		whole float64 // share of the time at levelWhole, at most
		plain float64 // and at levelPlain
	}{
		{20_000, 0, levelWhole, 0.99, 2, 1, 0.01},
		{20_000, 0.0001, levelSome, 0.9, 12, 0.02, 0.05},
		{20_000, 0.0005, levelSome, 0.97, 5, 0.01, 0.03},
		{20_000, 0.001, levelSome, 0.99, 1, 0, 0.01}, // 0.4 % of the messages
		{20_000, 0.005, levelPlain, 0.99, 1, 0, 1},
		{20_000, 0.01, levelPlain, 0.99, 1, 0, 1},
		{100, 0, levelWhole, 0.99, 2, 1, 0.01},
		{1000, 0.0001, levelSome, 0.9, 16, 0.1, 0.05},
		{1000, 0.001, levelSome, 0.9, 7, 0.01, 0.1},
		{1000, 0.005, levelPlain, 0.98, 5, 0, 1},
		{100, 0.0001, levelSome, 0.8, 18, 0.2, 0.1},
		{100, 0.0005, levelSome, 0.7, 14, 0.02, 0.3},
		{100, 0.001, levelSome, 0.7, 14, 0.02, 0.3},
		{100, 0.005, levelPlain, 0.98, 7, 0, 1},
		{100, 0.01, levelPlain, 0.99, 5, 0, 1},
	} {
		t.Run(fmt.Sprintf("%d/s %g%%", c.rate, c.loss*100), func(t *testing.T) {
			l := newLine(c.rate, c.loss)
			l.run(10 * time.Minute)
			share := func(level int) float64 { return l.at[level].Minutes() / 10 }
			t.Logf("%.3f plain, %.3f some, %.3f whole, %d moves", share(levelPlain), share(levelSome), share(levelWhole), l.moves)
			if share(c.level) < c.share || share(levelWhole) > c.whole || share(levelPlain) > c.plain || l.moves > c.moves {
				t.Fatal("settles elsewhere")
			}
		})
	}
}

// expect lets time pass and says which levels are seen, and when.
func (l *line) expect(t *testing.T, level int, least, most time.Duration) {
	t.Helper()
	begin, before := l.now, l.segments()
	for l.segments() == before && l.now-begin < most {
		l.run(reportInterval)
	}
	if d := l.now - begin; l.segments() != level || d < least {
		t.Fatalf("level %d after %v; want %d between %v and %v", l.segments(), d, level, least, most)
	}
}

// The first rise is quick, later ones wait, and longer after every mistake.
func TestLevelPatience(t *testing.T) {
	const slack = evidenceTime + levelQuiet + time.Second
	l := newLine(5000, 0)
	l.expect(t, levelSome, firstPatience, firstPatience+slack)
	l.expect(t, levelWhole, firstPatience, firstPatience+slack)
	l.loss = 0.0005 // of a whole message over 2 %
	l.expect(t, levelPlain, 0, slack)
	l.loss = 0
	l.expect(t, levelSome, leastPatience, leastPatience+slack)
	wait := leastPatience
	for range 6 {
		l.expect(t, levelWhole, wait, wait+slack)
		l.loss = 0.0005
		l.expect(t, levelPlain, 0, slack)
		l.loss = 0
		wait = min(2*wait, mostPatience)
		l.expect(t, levelSome, wait, wait+slack)
	}
	l.expect(t, levelWhole, mostPatience, mostPatience+slack)
	l.run(mostPatience + slack) // a fall now is no mistake of the rise
	l.loss = 0.0005
	l.expect(t, levelPlain, 0, slack)
	l.loss = 0
	l.expect(t, levelSome, leastPatience, leastPatience+slack)
}

// Two falls after one rise are one mistake.
func TestLevelFallsTwice(t *testing.T) {
	l := newLine(20_000, 0)
	l.expect(t, levelSome, 0, 4*time.Second)
	l.expect(t, levelWhole, 0, 4*time.Second)
	l.loss = 0.01
	l.expect(t, levelPlain, 0, 4*time.Second)
	l.loss = 0
	l.expect(t, levelSome, leastPatience, leastPatience+4*time.Second)
	l.expect(t, levelWhole, leastPatience, leastPatience+4*time.Second)
	l.loss = 0.00006
	l.expect(t, levelSome, 0, 4*time.Second)
	l.loss = 0.01
	l.expect(t, levelPlain, 0, 4*time.Second)
	l.loss = 0
	l.expect(t, levelSome, 2*leastPatience, 2*leastPatience+4*time.Second)
}

// Little loss halts at levelSome, and what is about larger messages does not
// count there.
func TestLevelFallsToSome(t *testing.T) {
	l := newLine(20_000, 0)
	l.expect(t, levelSome, 0, 4*time.Second)
	l.expect(t, levelWhole, 0, 4*time.Second)
	l.loss = 0.00006 // 0.27 % of whole messages, 0.024 % of some
	l.expect(t, levelSome, 0, 4*time.Second)
	l.run(8 * time.Second)
	if l.segments() != levelSome || l.moves != 3 {
		t.Fatalf("level %d after %d moves", l.segments(), l.moves)
	}
}

// feed reports without any loss, once per interval.
func (l *line) feed(from, to time.Duration, rate uint32) {
	for now := from; now <= to; now += reportInterval {
		l.received += rate
		l.report(l.received, l.missing, now)
	}
}

func TestLevelNeedsEvidence(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(l *line)
		want int
	}{
		"nothing":      {func(*line) {}, levelPlain},
		"one report":   {func(l *line) { l.report(1<<20, 1<<19, time.Hour) }, levelPlain},
		"few messages": {func(l *line) { l.feed(0, 2*time.Second, 19) }, levelPlain},
		"enough":       {func(l *line) { l.feed(0, 2*time.Second, 40) }, levelSome},
		"too short":    {func(l *line) { l.feed(0, firstPatience-1, 1000) }, levelPlain},
		"counters go round": {func(l *line) {
			l.received, l.missing = 1<<32-1000, 1<<32-1
			l.feed(0, 2*time.Second, 300)
		}, levelWhole},
		"one missing": {func(l *line) {
			l.feed(0, 0, 1)
			l.missing++
			l.feed(reportInterval, evidenceTime, 20)
		}, levelPlain},
		"two missing": {func(l *line) {
			l.feed(0, 0, 1)
			l.missing += 2
			l.feed(reportInterval, evidenceTime, 20)
		}, levelPlain},
		"many missing": {func(l *line) {
			l.feed(0, 0, 1)
			l.missing += 6
			l.feed(reportInterval, evidenceTime, 20)
		}, levelPlain},
		"few missing, long": {func(l *line) {
			l.feed(0, 0, 1)
			for now := reportInterval; now < evidenceLongest; now += evidenceTime {
				l.missing += 3
				l.feed(now, now+evidenceTime-reportInterval, 20)
			}
		}, levelPlain},
		"peer restarts": {func(l *line) {
			l.received, l.missing = 5000, 10
			l.feed(0, 200*time.Millisecond, 190)
			l.received, l.missing = 0, 0
			l.feed(400*time.Millisecond, 600*time.Millisecond, 190)
		}, levelPlain},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLine(0, 0)
			if c.do(l); l.segments() != c.want {
				t.Fatalf("level %d, want %d", l.segments(), c.want)
			}
		})
	}
}

// Chance takes a message now and then; that alone neither makes messages plain
// nor keeps them so.
func TestLevelRisesWithLoss(t *testing.T) {
	for _, c := range []struct {
		missing uint32 // of 10,000 in leastPatience
		level   int
	}{{0, levelSome}, {12, levelSome}, {13, levelPlain}, {50, levelPlain}} {
		l := newLine(1000, 0)
		l.leveler.now.Store(levelPlain)
		l.patience = leastPatience
		l.feed(0, 0, 0)
		for now := reportInterval; now <= leastPatience; now += reportInterval {
			lost := c.missing*uint32(now/reportInterval)/uint32(leastPatience/reportInterval) - l.missing
			l.missing += lost
			l.feed(now, now, 200-lost)
		}
		if l.segments() != c.level {
			t.Errorf("%d missing: level %d, want %d", c.missing, l.segments(), c.level)
		}
	}
}

// A new path begins anew, and reports about the old one do not count.
func TestLevelReset(t *testing.T) {
	l := newLine(20_000, 0)
	l.run(5 * time.Second)
	l.loss = 0.02
	l.expect(t, levelPlain, 0, 4*time.Second)
	l.run(200 * time.Millisecond)
	l.reset()
	l.last, l.loss, l.rtt = levelPlain, 0, 0
	if l.segments() != levelPlain {
		t.Fatalf("level %d", l.segments())
	}
	l.missing += 1000
	l.expect(t, levelSome, firstPatience, firstPatience+levelQuiet+2*reportInterval)
}
