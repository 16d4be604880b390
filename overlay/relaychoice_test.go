package overlay

import (
	"slices"
	"testing"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
)

const ms = time.Millisecond

func relayKey(n byte) punch.Key { return punch.Key{n} }

func chosen(list []candidate) []byte {
	var got []byte
	for _, k := range chooseRelays(list) {
		got = append(got, k[0])
	}
	slices.Sort(got)
	return got
}

func TestChooseRelays(t *testing.T) {
	server := candidate{key: relayKey(1), own: true, online: true}
	up := func(n byte, trip time.Duration) candidate {
		return candidate{key: relayKey(n), online: true, linked: true, up: true, trip: trip}
	}
	fresh := func(n byte) candidate { return candidate{key: relayKey(n), online: true} }
	known := func(n byte, trip time.Duration) candidate {
		return candidate{key: relayKey(n), online: true, trip: trip}
	}
	failed := func(n byte) candidate {
		return candidate{key: relayKey(n), online: true, linked: true, failed: true, trip: ms}
	}
	home := func(c candidate) candidate { c.home = true; return c }
	offline := func(c candidate) candidate { c.online = false; return c }
	far := server
	far.linked, far.failed = true, true
	for name, x := range map[string]struct {
		list []candidate
		want []byte
	}{
		"the server's alone":             {[]candidate{server}, []byte{1}},
		"a silent server's stays":        {[]candidate{far, up(2, ms), up(3, ms), up(4, ms)}, []byte{1, 2, 3, 4}},
		"three nearest":                  {[]candidate{server, up(2, 90*ms), up(3, 10*ms), up(4, 20*ms), up(5, 30*ms)}, []byte{1, 3, 4, 5}},
		"one in use stays":               {[]candidate{server, up(2, 30*ms), up(3, 10*ms), up(4, 20*ms), known(5, 26*ms)}, []byte{1, 2, 3, 4}},
		"unless much farther":            {[]candidate{server, up(2, 60*ms), up(3, 10*ms), up(4, 20*ms), known(5, 26*ms)}, []byte{1, 3, 4, 5}},
		"unknown ones are tried":         {[]candidate{server, up(2, 9*ms), up(3, 9*ms), up(4, 9*ms), fresh(5), fresh(6)}, []byte{1, 2, 3, 4, 5, 6}},
		"at most eight":                  {[]candidate{fresh(2), fresh(3), fresh(4), fresh(5), fresh(6), fresh(7), fresh(8), fresh(9), server}, []byte{1, 2, 3, 4, 5, 6, 7, 8}},
		"a home before unknown ones":     {[]candidate{server, fresh(2), fresh(3), fresh(4), fresh(5), fresh(6), fresh(7), fresh(8), home(fresh(9))}, []byte{1, 2, 3, 4, 5, 6, 7, 9}},
		"silent ones while too few":      {[]candidate{server, failed(2), up(3, ms)}, []byte{1, 2, 3}},
		"one silent one stays":           {[]candidate{server, failed(2), up(3, ms), up(4, ms), known(5, ms)}, []byte{1, 2, 3, 4, 5}},
		"offline, silent for a moment":   {[]candidate{server, offline(candidate{key: relayKey(2), linked: true, trip: ms}), up(3, 2*ms), up(4, 2*ms), up(5, 9*ms)}, []byte{1, 2, 3, 4}},
		"offline, far, but answering":    {[]candidate{server, offline(up(2, 99*ms)), up(3, ms), up(4, ms), up(5, ms)}, []byte{1, 2, 3, 4, 5}},
		"silent ones give way":           {[]candidate{server, failed(2), up(3, ms), up(4, ms), up(5, ms)}, []byte{1, 3, 4, 5}},
		"offline ones last, but tried":   {[]candidate{server, offline(known(2, ms)), up(3, ms)}, []byte{1, 2, 3}},
		"offline, but answering":         {[]candidate{server, offline(up(2, ms)), up(3, 2*ms), up(4, 2*ms), up(5, 9*ms)}, []byte{1, 2, 3, 4}},
		"offline ones not when not need": {[]candidate{server, offline(known(2, ms)), up(3, ms), up(4, ms), up(5, ms)}, []byte{1, 3, 4, 5}},
	} {
		if got := chosen(x.list); !slices.Equal(got, x.want) {
			t.Errorf("%s: %v, want %v", name, got, x.want)
		}
	}
}

func TestHomeStays(t *testing.T) {
	now := time.Now()
	var h home
	a, b := relayKey(1), relayKey(2)
	trips := func(x, y time.Duration) map[punch.Key]time.Duration {
		m := map[punch.Key]time.Duration{}
		if x > 0 {
			m[a] = x
		}
		if y > 0 {
			m[b] = y
		}
		return m
	}
	for i, step := range []struct {
		by    punch.Key
		x, y  time.Duration
		moved bool
		home  punch.Key
	}{
		{a, 0, 0, false, punch.Key{}},
		{a, 50 * ms, 0, true, a},
		{b, 50 * ms, 49 * ms, false, a}, // not 20 %
		{b, 20 * ms, 15 * ms, false, a}, // not more than 5 ms
		{b, 50 * ms, 30 * ms, false, a},
		{b, 50 * ms, 30 * ms, false, a},
		{b, 50 * ms, 48 * ms, false, a}, // begins anew
		{b, 50 * ms, 30 * ms, false, a},
		{b, 50 * ms, 30 * ms, false, a},
		{a, 50 * ms, 30 * ms, false, a}, // no measurement of b
		{b, 50 * ms, 30 * ms, true, b},
		{a, 10 * ms, 30 * ms, false, b},
		{b, 10 * ms, 0, true, a}, // b is down
		{a, 0, 0, false, a},      // all are: the last one is the best guess
		{b, 0, 90 * ms, true, b},
	} {
		if moved := h.measured(step.by, trips(step.x, step.y), now); moved != step.moved || h.key != step.home {
			t.Fatalf("step %d: moved %v to %v, want %v %v", i, moved, h.key[0], step.moved, step.home[0])
		}
	}
}

func TestNearestHomeWinsAtFirst(t *testing.T) {
	now := time.Now()
	var h home
	h.settle(now)
	up := map[punch.Key]time.Duration{relayKey(1): 50 * ms}
	h.measured(relayKey(1), up, now)
	up[relayKey(2)] = 49 * ms
	if !h.measured(relayKey(2), up, now.Add(homeSettle/2)) || h.key != relayKey(2) {
		t.Fatal("the nearest did not win while nothing was settled")
	}
	up[relayKey(1)] = 40 * ms
	if h.measured(relayKey(1), up, now.Add(homeSettle)) {
		t.Fatal("moved by one measurement")
	}
}

func TestTripList(t *testing.T) {
	up := map[punch.Key]time.Duration{}
	for i := range byte(10) {
		up[relayKey(i+1)] = time.Duration(i)*10*ms + 100*time.Microsecond
	}
	up[relayKey(11)] = time.Hour
	list := tripList(relayKey(7), up)
	if len(list) != maxLinks || list[0] != (trust.RelayTrip{Relay: trust.Key(relayKey(7)), Trip: 61}) ||
		list[1] != (trust.RelayTrip{Relay: trust.Key(relayKey(1)), Trip: 1}) {
		t.Fatalf("list %v", list)
	}
	if far := tripList(relayKey(11), up)[0]; far.Trip != 65535 {
		t.Fatalf("an hour is %d", far.Trip)
	}
}

func TestSameTrips(t *testing.T) {
	list := func(trips ...uint16) (l []trust.RelayTrip) {
		for i, ms := range trips {
			l = append(l, trust.RelayTrip{Relay: trust.Key{byte(i + 1)}, Trip: ms})
		}
		return l
	}
	reverse := list(30, 30)
	slices.Reverse(reverse)
	for _, x := range []struct {
		a, b []trust.RelayTrip
		same bool
	}{
		{nil, nil, true},
		{nil, list(3), false},
		{list(30), list(31), true},
		{list(30), list(40), false},
		{list(40), list(30), false},
		{list(5), list(9), true},
		{list(30, 30), list(30), false},
		{list(30, 30), reverse, false},
	} {
		if got := sameTrips(x.a, x.b); got != x.same {
			t.Errorf("%v and %v: %v", x.a, x.b, got)
		}
	}
}
