package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"overlay/punch"
)

const (
	// udpSilence is how long UDP is asked without an answer, while TLS answers, before
	// it is said to be blocked: the first packets may be lost, or slower than TLS.
	udpSilence = 500 * time.Millisecond
	// udpOverdue is when the next answer is overdue: servers are asked every 75 s at
	// the least, for up to 4 s.
	udpOverdue = 80 * time.Second
)

// udpNow is all that is known now of UDP on this network: passes, blocked, or empty,
// and when an answer came last; zero: never, or not known.
type udpNow struct {
	state string
	last  time.Time
}

// udpOf judges by what servers saw of the UDP port, how relays are reached, and when a
// peer was last heard over a direct path. What answered before the relays fell silent
// tells nothing of now.
func udpOf(n punch.Network, r reach, heard, now time.Time) udpNow {
	u := udpNow{last: heard}
	for _, server := range n.Servers {
		if server.Fresh && server.Mapped.IsValid() && server.At.After(u.last) {
			u.last = server.At
		}
	}
	switch {
	case r.udp > 0, u.last.After(r.mute) && now.Sub(u.last) < udpOverdue:
		u.state = udpPasses
	case r.noUDP() && now.Sub(r.mute) >= udpSilence:
		u.state = udpBlocked
	}
	return u
}

// udp is what is known now of UDP on this network, without what peers answer.
func (s *session) udp() udpNow {
	return udpOf(s.agent.Network(), s.links.reach(), time.Time{}, time.Now())
}

// silentFor says for how long no answer came; empty: it is not known, or not long.
func silentFor(last *time.Time, now time.Time) string {
	if last == nil || now.Sub(*last) < time.Second {
		return ""
	}
	return fmt.Sprintf("no answer for %d s", int(now.Sub(*last).Seconds()))
}

// networkText says how this network looks from outside; empty: it is not known yet.
func (s *session) networkText() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.outside.IsValid() && s.udp().state == udpBlocked:
		return "this network passes no UDP; going over TLS"
	case !s.outside.IsValid():
		return ""
	case slices.ContainsFunc(s.local, func(p netip.Prefix) bool { return p.Addr() == s.outside.Addr() }):
		return fmt.Sprintf("public address %s", s.outside)
	}
	return fmt.Sprintf("behind a NAT, seen as %s", s.outside)
}
