package overlay

import (
	"strings"
	"testing"
	"time"

	"overlay/punch"
)

func TestReasons(t *testing.T) {
	now := time.Now()
	tried := punch.Attempt{Calls: 2, Since: now.Add(-time.Minute), Answered: true, Public: true, Mapped: true}
	with := func(change func(*punch.Attempt)) punch.Attempt {
		a := tried
		change(&a)
		return a
	}
	udp, tls, none := reach{links: 1, udp: 1}, reach{links: 1, tls: 1}, reach{links: 1}
	for _, x := range []struct {
		h    hurdles
		want string
	}{
		{hurdles{online: true, reach: udp, attempt: tried}, "no answer on any direct path"},
		{hurdles{online: true, reach: tls, attempt: with(func(a *punch.Attempt) { a.Mapped = false })}, "this network passes no UDP"},
		{hurdles{online: true, reach: tls, attempt: punch.Attempt{}}, "this network passes no UDP"}, // known at once
		{hurdles{online: true, reach: tls, attempt: tried}, "no relay answers over UDP"},            // it passed once
		{hurdles{online: true, reach: none, attempt: tried}, "no relay is reached"},
		{hurdles{online: true, reach: udp, attempt: with(func(a *punch.Attempt) { a.Public = false })}, "bob's network passes no UDP"},
		{hurdles{online: true, reach: udp, attempt: with(func(a *punch.Attempt) { a.Since = now; a.Public = false })}, "still looking"},
		{hurdles{online: true, reach: udp}, "still looking"},
		{hurdles{online: true, reach: udp, attempt: with(func(a *punch.Attempt) { a.Answered = false })}, "bob has answered no call"},
		{hurdles{online: true, reach: none, attempt: with(func(a *punch.Attempt) { a.Mapped = false })}, "no relay"},
		{hurdles{online: true, reach: none}, "still looking"},
		{hurdles{reach: none}, "bob is not connected"},
		{hurdles{reach: udp}, "bob is not connected"},
		{hurdles{reach: udp, attempt: tried}, "bob is not connected"},                        // it was demanded
		{hurdles{reach: udp, reached: true, attempt: tried}, "no answer on any direct path"}, // only the server lost it
	} {
		x.h.peer, x.h.now = "bob", now
		if got := x.h.reason(); !strings.Contains(got, x.want) {
			t.Errorf("%+v: %q, want %q", x.h, got, x.want)
		}
	}
}
