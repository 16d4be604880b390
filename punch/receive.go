package punch

import (
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

// Receive takes a datagram that looks like STUN. It arrived at the local address
// at, if that is known; the port is 0 on the node's UDP port and names one of
// Config.OpenSockets otherwise. b is used only during the call. Answers leave from
// within the call, and from that address; nothing else is called back. Whatever is
// not authentic is dropped without a trace.
func (a *Agent) Receive(b []byte, from, at netip.AddrPort) {
	m, err := decode(b)
	if err != nil {
		return
	}
	from = plain(from)
	now := time.Now()
	a.mu.Lock()
	switch m.Type {
	case stun.BindingRequest:
		a.receiveCheck(m, from, at, now)
	case stun.BindingSuccess:
		a.receiveAnswer(m, from, at, now)
	}
	sends := a.take()
	a.mu.Unlock()
	a.perform(sends)
}

func (a *Agent) receiveCheck(m *stun.Message, from, at netip.AddrPort, now time.Time) {
	c, err := checkOf(m)
	if err != nil {
		return
	}
	p := a.users[c.user]
	if p == nil || stun.MessageIntegrity(p.secrets.check).Check(m) != nil {
		return
	}
	fresh, restarted := p.checks.accept(c.boot, c.counter, now)
	if !fresh {
		return
	}
	if c.lost {
		a.sessionLost(p, now)
	}
	q := a.learn(p, from, at.Port())
	if q == nil {
		return
	}
	p.hear(q, now)
	q.tally.heard++
	if q.relayed() {
		at = netip.AddrPort{}
	} else { // over a relay it says nothing about the peer's NAT
		p.released[family(from)] = true
		a.release(p, now)
	}
	p.wantProbe = p.wantProbe || restarted
	if q == p.selected {
		p.receive(now)
	}
	a.reply(p, q, c.id, outgoing{now: now, from: at})
	enough := consentExpiry
	if p.active(now) {
		enough = consentInterval
	}
	if !q.valid || q.suspect || now.Sub(q.answered) > enough {
		source := q.from()
		if !source.Addr().IsValid() {
			source = at // where the peer can reach us, it may expect us from
		}
		a.sendCheck(p, q, outgoing{now: now, from: source})
	}
	a.schedule(p, now)
}

func (a *Agent) reply(p *peer, q *pair, id transactionID, how outgoing) {
	if !a.mayProbe(p, q, how.now) {
		return
	}
	b, err := answer(id, q.addr, p.secrets.check)
	if err != nil {
		a.log.Error("answer not built", "err", err)
		return
	}
	a.post(p, q, datagram{b: b, to: q.addr, from: how.from}, how.now)
}

func (a *Agent) receiveAnswer(m *stun.Message, from, at netip.AddrPort, now time.Time) {
	t, ok := a.sent[m.TransactionID]
	if !ok {
		a.hardAnswered(m, from, at, now)
		return
	}
	if t.server != nil {
		if from == t.server.Addr && at.Port() == 0 {
			a.mapping(t.server, m, now)
		}
		return
	}
	if from != t.pair.addr || at.Port() != t.pair.local.Port() || stun.MessageIntegrity(t.peer.secrets.check).Check(m) != nil {
		return
	}
	delete(a.sent, m.TransactionID)
	t.pair.waiting = slices.DeleteFunc(t.pair.waiting, func(id transactionID) bool {
		return id == m.TransactionID
	})
	a.seen(t, m, now)
	a.accept(t, at, now)
	a.schedule(t.peer, now)
}
