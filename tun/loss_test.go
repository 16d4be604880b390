package tun

import (
	"encoding/binary"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// span are the counters from first to last.
func span(first, last uint64) []uint64 {
	var list []uint64
	for c := first; c <= last; c++ {
		list = append(list, c)
	}
	return list
}

func (m *meter) expect(t *testing.T, received, missing uint32) {
	t.Helper()
	if r, l := m.totals(); r != received || l != missing {
		t.Fatalf("%d received, %d missing; want %d and %d", r, l, received, missing)
	}
}

func TestMeterCounts(t *testing.T) {
	const w = meterWindow
	for name, c := range map[string]struct {
		counters          []uint64
		received, missing uint32
	}{
		"begins where it begins": {span(1_000_000, 1_000_009), 10, 0},
		"gap in the window":      {[]uint64{0, 2}, 2, 0},
		"gap that left it":       {append([]uint64{0}, span(2, w+1)...), w + 1, 1},
		"a little out of order":  {[]uint64{0, 2, 3, 4, 1, 5}, 6, 0},
		"late":                   {append(append([]uint64{0}, span(2, w)...), 1, w+1), w + 1, 1},
		"too late":               {append(append([]uint64{0}, span(2, w+1)...), 1), w + 1, 1},
		"before the first":       {[]uint64{5, 4}, 1, 0},
		"duplicates":             {[]uint64{5, 5, 6, 6, 5}, 2, 0},
		"longest gap":            {[]uint64{0, meterJump}, 2, meterJump - w},
		"jump":                   {[]uint64{0, meterJump + 1, meterJump + 2}, 3, 0},
		"jump to the last":       {[]uint64{0, counterLimit, counterLimit}, 2, 0},
		"beyond the last":        {[]uint64{counterLimit + 1, 1<<64 - 1, 7}, 1, 0},
		"one forged, then on":    {append([]uint64{0, 1 << 40}, span(1, w+4)...), 2 + 5, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var m meter
			m.note(1, c.counters, 0)
			m.expect(t, c.received, c.missing)
		})
	}
}

// Sessions have counters of their own; of more than are watched, the oldest
// begins anew.
func TestMeterSessions(t *testing.T) {
	var m meter
	for index := range uint32(meterSessions) {
		m.note(index, []uint64{uint64(index) * 1000}, 0)
	}
	for index := range uint32(meterSessions) {
		m.note(index, []uint64{uint64(index)*1000 + 2 + meterWindow}, 0)
	}
	m.expect(t, 2*meterSessions, 2*meterSessions)
	m.note(meterSessions, []uint64{0}, 0)
	m.note(0, []uint64{1, 9000}, 0) // forgotten: its first counter begins it
	m.expect(t, 2*meterSessions+3, 2*meterSessions+8998-meterWindow+1)
}

// What two intervals have not brought is missing, however slow the flow.
func TestMeterGivesUp(t *testing.T) {
	var m meter
	m.note(1, []uint64{0, 1, 3}, 0)
	now := reportInterval
	if m.due(now) {
		t.Fatal("due for a few messages")
	}
	m.note(1, []uint64{4, 6}, 0)
	m.expect(t, 5, 0)
	if !m.due(now + reportInterval) {
		t.Fatal("a loss is not told")
	}
	m.expect(t, 5, 1) // 2, but not yet 5
	m.note(1, []uint64{2, 5}, 0)
	m.expect(t, 6, 1)
	m.due(now + 2*reportInterval)
	m.expect(t, 6, 1)
}

func TestMeterDue(t *testing.T) {
	var m meter
	now, next := time.Minute, uint64(0)
	step := func(wait time.Duration, messages int, want bool) {
		t.Helper()
		if now += wait; messages > 0 {
			m.note(1, span(next, next+uint64(messages)-1), 0)
			next += uint64(messages)
		}
		if m.due(now) != want {
			t.Fatalf("after %v and %d messages: due is %v", wait, messages, !want)
		}
	}
	step(0, 100, true)
	step(reportInterval-1, 100, false)
	step(1, 0, true)
	step(time.Minute, 0, false)
	step(0, 1, false)
	step(reportInterval, reportLeast-2, false)
	step(reportInterval, 1, true)
	next++
	step(reportInterval, 1, false) // the gap is young
	step(reportInterval, 1, true)
}

// Two peers without traffic must not answer each other's reports for ever.
func TestMeterFallsSilent(t *testing.T) {
	var m [2]meter
	var counters [2]uint64
	m[0].note(0, span(0, 99), 0)
	reports := 0
	for now := time.Second; now < time.Hour; now += reportInterval {
		for i := range m {
			if m[i].due(now) {
				reports++
				counters[i]++
				m[1-i].note(uint32(9+i), []uint64{counters[i]}, 0)
			}
		}
	}
	if reports != 1 {
		t.Fatalf("%d reports of one burst", reports)
	}
}

// What the own sockets dropped was not lost on the path.
func TestMeterOverflow(t *testing.T) {
	var m meter
	m.note(1, span(0, 99), 7) // dropped before there was this peer
	m.expect(t, 0, 0)
	now := time.Second
	for range meterMute {
		m.due(now)
		now += reportInterval
	}
	m.note(1, []uint64{200, 202}, 7)
	m.note(1, []uint64{9000}, 8)
	m.due(now)
	m.note(1, []uint64{12_000, 15_000}, 8)
	m.due(now + reportInterval)
	m.expect(t, 2, 0)
	m.note(1, append([]uint64{20_000}, span(20_002, 20_001+meterWindow)...), 8)
	m.expect(t, 2+1+meterWindow, 1)
}

// model is what a meter of one session counts, simply.
type model struct {
	base, end, mark   uint64
	behind            int
	begun             bool
	seen              map[uint64]bool
	received, missing uint32
}

func (o *model) begin(c uint64) {
	*o = model{base: c, end: c, mark: c, begun: true, seen: make(map[uint64]bool), received: o.received, missing: o.missing}
}

func (o *model) retire(base uint64) {
	for ; o.base < base; o.base++ {
		if !o.seen[o.base] {
			o.missing++
		}
		delete(o.seen, o.base)
	}
}

func (o *model) note(c uint64) {
	switch {
	case c > counterLimit:
		return
	case !o.begun:
		o.begin(c)
	case c < o.base:
		if o.behind++; o.behind < meterWindow {
			return
		}
		o.begin(c)
	case c >= o.end && c-o.end >= meterJump:
		o.begin(c)
	case c >= meterWindow:
		o.retire(c - meterWindow + 1)
	}
	late := c+meterLate+1 < o.end
	o.behind, o.end = 0, max(o.end, c+1)
	switch {
	case o.seen[c]:
		return
	case late:
		o.missing++
	default:
		o.received++
	}
	o.seen[c] = true
}

func TestMeterAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var m meter
		var o model
		now, place := time.Second, rapid.Uint64().Draw(t, "place")
		step := rapid.OneOf(rapid.Int64Range(-3, 5), rapid.Int64Range(-1100, 1100), rapid.Int64Range(-1<<17, 1<<17), rapid.Int64())
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			if rapid.IntRange(0, 9).Draw(t, "tick") == 0 {
				now += reportInterval
				m.due(now)
				o.retire(o.mark)
				o.mark = o.end
			}
			place += uint64(step.Draw(t, "step"))
			run := rapid.SampledFrom([]int{1, 1, 2, 70, 1300}).Draw(t, "run")
			for range run {
				m.note(3, []uint64{place}, 0)
				o.note(place)
				place++
			}
			if r, l := m.totals(); r != o.received || l != o.missing {
				t.Fatalf("%d received, %d missing; the model has %d and %d", r, l, o.received, o.missing)
			}
		}
	})
}

// Whatever comes, every message counts once at most, and every missing one is
// within the reach of one that came.
func FuzzMeter(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x05\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var m meter
		now, notes := time.Duration(0), uint64(0)
		for ; len(data) >= 10; data = data[10:] {
			m.note(uint32(data[0]%8), []uint64{binary.LittleEndian.Uint64(data[2:])}, uint32(data[1]/128))
			notes++
			now += time.Duration(data[1]) * time.Millisecond
			m.due(now)
			received, missing := m.totals()
			if uint64(received) > notes || uint64(missing) > notes*(meterJump+meterWindow) {
				t.Fatalf("%d received, %d missing of %d", received, missing, notes)
			}
		}
	})
}

func BenchmarkMeter(b *testing.B) {
	var m meter
	list := span(0, batchSize-1)
	b.ReportAllocs()
	for b.Loop() {
		m.note(1, list, 0)
		for i := range list {
			list[i] += batchSize + 1
		}
	}
}
