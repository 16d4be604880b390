package overlay

import (
	"fmt"
	"strings"
	"time"

	"overlay/punch"
)

// lookFor is how long a direct path is looked for before its absence means
// something.
const lookFor = 3 * time.Second

// The steps to a direct path, in order.
const (
	stepServer     = "server"
	stepPeer       = "peer"
	stepUDPHere    = "udp here"
	stepSignals    = "signals"
	stepUDPThere   = "udp there"
	stepCandidates = "candidates"
	stepChecks     = "checks"
	stepRounds     = "hard rounds"
	stepTCP        = "tcp"
	stepPath       = "path"
)

// hurdles are what stands between this node and a peer. Of what is not known the
// fields are zero.
type hurdles struct {
	peer    string // its name
	online  bool   // as the server said last
	server  bool   // which is connected
	reached bool   // there is a path, by a relay
	reach   reach  // of this node to relays
	udp     string // here, as udpOf judges
	attempt punch.Attempt
	now     time.Time

	here, there NATStatus
	totals      totals
	deaf        bool   // the peer told that no server answers it over UDP
	mute        bool   // no server ever saw anybody who is online now
	ports       string // UDP ports of the server, for people
	port        uint16 // our own; 0 to those who may not know it
}

// diagnosis says why there is no direct path, in one clause, which step failed
// first, and what would help.
type diagnosis struct {
	step, reason string
	help         []string
}

// reason says in plain words why there is no direct path.
func (h hurdles) reason() string { return h.diagnose().reason }

func (h hurdles) diagnose() diagnosis {
	looking := h.attempt.Calls == 0 || h.now.Sub(h.attempt.Since) < lookFor
	switch {
	case !h.online && !h.reached:
		return diagnosis{stepPeer, h.absent(), []string{
			fmt.Sprintf("switch %s on, and run there: sudo overlay up", h.peer),
		}}
	case h.udp == udpBlocked && !h.attempt.Mapped:
		return h.noUDP()
	case h.reach.none() && !h.attempt.Mapped && !looking:
		return diagnosis{stepServer, "nothing answers: no relay, and no server over UDP", []string{
			"see whether this machine is connected to a network at all",
		}}
	case looking:
		return diagnosis{stepChecks, "still looking for a direct path", []string{"ask again in a few seconds"}}
	case h.reach.none():
		return diagnosis{stepServer, "no relay is reached, and no direct path answers", []string{
			"see whether the server runs: overlay status says what is wrong with it",
		}}
	case h.udp == udpBlocked:
		return diagnosis{stepUDPHere, "no relay answers over UDP: this network may pass none now", letUDPOut("this network")}
	case !h.attempt.Public || h.deaf:
		return diagnosis{stepUDPThere, h.peer + "'s network passes no UDP", letUDPOut(h.peer + "'s network")}
	case !h.attempt.Answered:
		return diagnosis{stepSignals, h.peer + " has answered no call yet", []string{
			"see whether it is connected to the server: overlay status, there",
		}}
	}
	return h.unanswered()
}

// absent says that a peer is not connected, as far as the server could tell.
func (h hurdles) absent() string {
	if !h.server {
		return h.peer + " was not connected, as the server said last"
	}
	return h.peer + " is not connected"
}

func letUDPOut(network string) []string {
	return []string{
		"let UDP packets out of " + network + ", to any address and port, and their answers in",
		"until then paths go over relays, or over TCP where the NATs allow it; a nearer relay makes them faster: overlay relay",
	}
}

// noUDP is when relays are reached over TLS only, and no server ever answered over
// UDP. When that is so everywhere, the server is the likelier cause.
func (h hurdles) noUDP() diagnosis {
	if !h.mute {
		return diagnosis{stepUDPHere, "this network passes no UDP", letUDPOut("this network")}
	}
	return diagnosis{
		stepUDPHere,
		fmt.Sprintf("the server answers neither this machine nor %s over UDP: its UDP ports are closed, or both networks pass no UDP", h.peer),
		[]string{
			fmt.Sprintf("let UDP ports %s in on the server's firewall", h.ports),
			"if they are open, let UDP packets out of both networks",
		},
	}
}

// unanswered is when both sides have UDP and called each other, and no direct path
// answers.
func (h hurdles) unanswered() diagnosis {
	t := h.totals
	switch {
	case t.direct > 0 && t.direct == t.family:
		return diagnosis{stepCandidates, h.peer + " has only addresses of an IP version that this machine has not", []string{
			"give both networks IPv6, or both IPv4",
		}}
	case t.direct > 0 && t.direct == t.barred:
		return diagnosis{stepCandidates, fmt.Sprintf("none of %s's addresses can be tried from here", h.peer), []string{
			"the table of candidates says why for each",
		}}
	case t.err != nil && t.direct == t.barred+t.refused:
		return diagnosis{stepChecks, fmt.Sprintf("this machine cannot send to %s: %s", h.peer, sendError(t.err)), []string{
			"see its routes and its own firewall: ip route, nft list ruleset",
		}}
	case t.answers > 0:
		return diagnosis{stepPath, "the direct path stopped answering, and no other does", []string{
			"wait: it is looked for again at every change of a network, and every minute",
		}}
	case t.heard > 0:
		return diagnosis{stepChecks, fmt.Sprintf("%s's packets arrive here, but ours do not arrive there", h.peer), h.open()}
	case h.here.hard() && h.there.hard():
		return diagnosis{stepChecks, "both NATs choose another port for every destination" + h.guess(), h.open()}
	case h.here.hard():
		return diagnosis{stepChecks, fmt.Sprintf("the NAT here chooses another port for every destination, and %s's lets in no port that it did not send to", h.peer), h.open()}
	case h.there.hard():
		return diagnosis{stepChecks, h.peer + "'s NAT chooses another port for every destination, and the one here lets in no port that it did not send to", h.open()}
	}
	return diagnosis{stepChecks, "no answer on any direct path: a NAT or firewall on one side or both refuses", h.open()}
}

// guess says whether the ports of both sides could be guessed.
func (h hurdles) guess() string {
	random := punch.Random.String()
	if h.here.Allocation == random || h.there.Allocation == random {
		return ", at random, so that neither side can guess the other's"
	}
	return ""
}

// open is what opens a way through NATs that do not let themselves be opened.
func (h hurdles) open() []string {
	forward := fmt.Sprintf("forward a UDP port to this machine on the router here, or one to %s on its router; one side is enough", h.peer)
	if h.port != 0 {
		forward = fmt.Sprintf("forward UDP port %d to this machine on the router here, or %s's port on its router; one side is enough", h.port, h.peer)
	}
	return []string{
		"switch PCP, NAT-PMP or UPnP on, on either router",
		forward,
		"give both networks IPv6, which needs no NAT",
	}
}

// sendError is the system's part of an error, without addresses.
func sendError(err error) string {
	text := err.Error()
	return strings.TrimSpace(text[strings.LastIndex(text, ":")+1:])
}
