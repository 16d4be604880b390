package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"overlay/punch"
)

const (
	raceAfter    = 150 * time.Millisecond  // TLS starts so long after the first HELLO
	minPatience  = 300 * time.Millisecond  // and so long after one on a way that worked
	minDead      = 1500 * time.Millisecond // UDP without answer for so long is no way
	doubtPause   = 250 * time.Millisecond
	helloEvery   = 10 * time.Second // over UDP: a relay that started anew finds out by it
	pingEvery    = 20 * time.Second // over TLS
	trialEvery   = 30 * time.Second // of UDP, while TLS carries
	trialHellos  = 6
	choiceHolds  = 300 * time.Millisecond // no other address is tried meanwhile
	admitPause   = 20 * time.Millisecond  // and two round trips between admissions with one cookie
	admitRate    = 5                      // admissions a second
	admitBurst   = 10
	minRefused   = 500 * time.Millisecond
	maxRefused   = 30 * time.Second
	maxSent      = 64               // requests that can still be answered
	maxAge       = 10 * time.Second // of those
	maxChallenge = 3                // answers to challenges of one request
	maxHops      = 3                // challenges that follow from each other
)

var (
	errNoAnswer = errors.New("no answer over UDP")
	errStranger = errors.New("the relay does not know this device as a member")
	errFull     = errors.New("the relay is full")
	errLong     = errors.New("the certificate of this device is too long for UDP")
)

// gaps are the pauses between HELLOs that get no answer.
func gap(asked int) time.Duration {
	gaps := [...]time.Duration{100, 150, 250, 500, 1000, 2000, 5000}
	d := gaps[min(asked, len(gaps))-1] * time.Millisecond
	if d < time.Second {
		return d
	}
	return jitter(d)
}

// patience is how long a way that worked may be silent before the other is
// tried.
func patience(rtt time.Duration) time.Duration { return max(3*rtt, minPatience) }

// udpSide is what is known of the way over UDP.
type udpSide struct {
	addr     netip.AddrPort // answered last
	observed netip.AddrPort
	rtt      time.Duration
	counter  uint64        // of the newest request answered
	settled  uint64        // of the newest HELLO to addr alone
	asked    int           // HELLOs in a row without answer
	first    time.Time     // when the first of them left
	next     time.Time     // when the next one leaves
	patience time.Duration // from first until TLS is tried
	refusals int
	err      error                  // why there is no answer
	tried    map[netip.AddrPort]int // HELLOs to each of the addresses since an answer

	admitted bool // the relay knows the session, as far as we know
	choice   netip.AddrPort
	chosen   time.Time
	cookie   cookie // of the newest ADMIT
	admit    time.Time
}

// restart begins to ask at once.
func (u *udpSide) restart(now time.Time, patience time.Duration) {
	u.asked, u.next, u.patience = 0, now, patience
}

// unanswered says when there has been no answer for a time; zero: there is no
// question.
func (u *udpSide) unanswered(d time.Duration) time.Time {
	if u.asked == 0 {
		return time.Time{}
	}
	return u.first.Add(d)
}

// request is a message that awaits an answer.
type request struct {
	counter    uint64
	kind       kind
	at         time.Time
	to         netip.AddrPort // over UDP
	link       *framed        // over TLS
	trial      bool
	cookied    bool
	hops       uint8 // challenges it follows from
	challenged uint8 // challenges it got
	peers      []punch.Key
}

// stepUDP asks when it is time, and gives up what does not answer.
func (c *Client) stepUDP() {
	u := &c.udp
	if c.due(u.next) {
		c.hello()
	}
	if c.due(u.unanswered(u.patience)) {
		if u.err == nil {
			u.err = errNoAnswer
		}
		if c.active == UDP && c.tls.link != nil { // it has not been closed since UDP came back
			c.toTLS()
		}
	}
	if c.active == UDP && c.due(u.unanswered(max(5*u.rtt, minDead))) {
		c.active = None
	}
}

// hello asks the relay over UDP: at the address in use, and when it does not
// answer at all.
func (c *Client) hello() {
	u := &c.udp
	targets := c.targets()
	if len(targets) == 0 {
		u.next = time.Time{}
		return
	}
	for _, to := range targets {
		u.tried[to]++
		c.sendHello(request{to: to, trial: c.active == TLS}, cookie{})
	}
	if u.asked++; u.asked == 1 {
		u.first = c.now
		if c.active == UDP {
			u.settled = c.counter
		}
	}
	u.next = c.now.Add(gap(u.asked))
	if c.active == TLS && u.asked >= trialHellos {
		u.asked, u.next = 0, c.now.Add(jitter(trialEvery))
	}
}

// targets are the addresses to ask now: of them none that let too many HELLOs go
// without an answer. It may be a stranger's.
func (c *Client) targets() []netip.AddrPort {
	u, list := &c.udp, c.addrs
	if c.active == UDP && u.asked == 0 {
		list = []netip.AddrPort{u.addr}
	}
	if c.cfg.Tries == 0 {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), func(a netip.AddrPort) bool { return u.tried[a] >= c.cfg.Tries })
}

func (c *Client) sendHello(r request, k cookie) {
	r.kind, r.cookied = kindHello, k != cookie{}
	h := hello{trial: r.trial, id: c.session.id, seq: c.record(&r), cookie: k}
	c.send(&r, h.build(&c.session))
}

func (c *Client) sendAdmit(r request, k cookie) {
	r.kind = kindAdmit
	a := admission{
		hello:       hello{trial: r.trial, id: c.session.id, seq: c.record(&r), cookie: k},
		node:        c.public,
		credentials: c.cfg.Credentials,
	}
	b, err := a.build(&c.session, c.cfg.Relay, c.cfg.Device)
	if err != nil {
		c.cfg.Log.Error("build admission", "err", err) // their length was checked
		return
	}
	c.send(&r, b)
}

// record makes a request one that can be answered, and gives its sequence.
func (c *Client) record(r *request) sequence {
	c.counter++
	r.counter, r.at = c.counter, c.now
	c.sent = slices.DeleteFunc(c.sent, func(o request) bool { return c.now.Sub(o.at) > maxAge })
	if len(c.sent) == maxSent {
		c.sent = slices.Delete(c.sent, 0, 1)
	}
	c.sent = append(c.sent, *r)
	return newSequence(c.cfg.Boot, r.counter)
}

func (c *Client) send(r *request, b []byte) {
	if r.link != nil {
		if !r.trial && r.kind != kindOpen {
			c.tls.claim = r.counter
		}
		link := r.link
		c.actions = append(c.actions, func() { link.control(b) })
		return
	}
	to := r.to
	c.actions = append(c.actions, func() {
		if err := c.cfg.Send(b, to); err != nil {
			c.cfg.Log.Debug("send to relay", "addr", to, "err", err)
			c.notSent(err)
		}
	})
}

func (c *Client) notSent(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.udp.err == nil {
		c.udp.err = fmt.Errorf("udp to the relay: %w", err)
	}
}

// Receive takes a control datagram that came to the node's UDP port, and says
// whether it answers a request of this client.
func (c *Client) Receive(b []byte, from netip.AddrPort) bool {
	if !c.enter() {
		return false
	}
	defer c.mu.Unlock()
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if !c.answer(b, from, nil) {
		return false
	}
	c.poke()
	return true
}

// answer takes a control message. It has an effect only when it answers a request
// that went the same way.
func (c *Client) answer(b []byte, from netip.AddrPort, link *framed) bool {
	find := func(s sequence, kinds ...kind) *request {
		for i := range c.sent {
			r := &c.sent[i]
			if r.to == from && r.link == link && newSequence(c.cfg.Boot, r.counter) == s && slices.Contains(kinds, r.kind) {
				return r
			}
		}
		return nil
	}
	switch kindOf(b) {
	case kindChallenge:
		if m, ok := parseChallenge(b); ok {
			return c.challenged(find(m.seq, kindHello, kindAdmit), m.cookie)
		}
	case kindPong:
		if m, ok := parsePong(b); ok && c.session.sealed(b) {
			return c.ponged(find(m.seq, kindHello, kindAdmit), m.observed)
		}
	case kindRefused:
		if m, ok := parseRefused(b); ok && c.session.sealed(b) {
			return c.refused(find(m.seq, kindAdmit), m.reason)
		}
	case kindOpened:
		if m, ok := parseOpened(b); ok && c.session.sealed(b) {
			return c.opened(find(m.seq, kindOpen), m)
		}
	}
	return false
}

// challenged answers a CHALLENGE. Anybody on the way can forge one, so it changes
// nothing but what is sent next, and several of one request are answered: the
// true one is among them.
func (c *Client) challenged(r *request, k cookie) bool {
	if r == nil || r.link != nil {
		return false
	}
	u, limit := &c.udp, rate{admitRate, admitBurst * int64(time.Second) / admitRate}
	if r.challenged == maxChallenge || r.hops == maxHops {
		return true
	}
	r.challenged++
	if u.choice != r.to {
		if c.now.Sub(u.chosen) < choiceHolds {
			return true
		}
		u.choice, u.chosen = r.to, c.now
	}
	next := request{to: r.to, trial: c.active == TLS, hops: r.hops + 1}
	if r.kind == kindHello && !r.cookied && u.admitted {
		c.sendHello(next, k)
		return true
	}
	if (k == u.cookie && c.now.Sub(u.admit) < 2*c.now.Sub(r.at)+admitPause) || !c.admits.take(&limit, int64(c.now.Sub(c.start)), 1) {
		return true
	}
	u.cookie, u.admit = k, c.now
	c.sendAdmit(next, k)
	return true
}

// ponged takes a PONG: the relay knows us, at the address it was asked from.
func (c *Client) ponged(r *request, observed netip.AddrPort) bool {
	if r == nil {
		return false
	}
	q := *r
	c.forget(r)
	c.udp.admitted = true
	c.udp.refusals, c.refusal = 0, nil
	if q.link != nil {
		c.pongedTLS(q)
		return true
	}
	// The relay moved with the newest it got; after one to the address in use,
	// older answers from others mean nothing.
	if u := &c.udp; q.counter > u.counter && (q.to == u.addr || q.counter > u.settled) {
		c.pongedUDP(q, observed)
	}
	return true
}

func (c *Client) pongedUDP(q request, observed netip.AddrPort) {
	u := &c.udp
	if u.addr != q.to || u.observed != observed {
		u.rtt = 0
	}
	delete(u.tried, q.to)
	u.counter, u.addr, u.observed, u.err = q.counter, q.to, observed, nil
	u.rtt = smooth(u.rtt, c.now.Sub(q.at))
	u.restart(c.now.Add(jitter(helloEvery)), patience(u.rtt))
	c.cancelDial()
	switch {
	case q.trial || q.counter < c.tls.claim:
		u.next = c.now // the relay still sends over TLS
	case c.elsewhere(q):
		u.next = c.now // the relay may send from there
	case c.tls.link != nil && c.tls.linger.IsZero():
		c.tls.linger = c.now.Add(lingers)
	}
	if q.kind == kindAdmit || c.active == None {
		c.reopen()
	}
	c.active = UDP
}

// elsewhere reports whether a newer request than q went to another address, and
// may have made the relay send from there.
func (c *Client) elsewhere(q request) bool {
	return slices.ContainsFunc(c.sent, func(r request) bool {
		return r.counter > q.counter && r.link == nil && r.to != q.to && !r.trial && r.kind != kindOpen
	})
}

func (c *Client) forget(r *request) {
	counter := r.counter
	c.sent = slices.DeleteFunc(c.sent, func(o request) bool { return o.counter == counter })
}

// refused takes a REFUSED: asking again makes sense only after a while, as the
// relay may learn of a new member later than the member.
func (c *Client) refused(r *request, reason uint8) bool {
	if r == nil {
		return false
	}
	link := r.link
	delete(c.udp.tried, r.to)
	c.forget(r)
	u := &c.udp
	c.refusal = errFull
	if reason == refusedStranger {
		c.refusal = errStranger
	}
	pause := jitter(min(minRefused<<min(u.refusals, 16), maxRefused))
	u.refusals++
	u.restart(c.now.Add(pause), raceAfter)
	u.admitted = false
	c.tls.next = c.now.Add(pause)
	c.cancelDial()
	if link == nil && c.active == UDP {
		c.active = None
	}
	if link != nil {
		link.close()
	}
	return true
}
