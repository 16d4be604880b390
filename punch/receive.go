package punch

import (
	"net/netip"
	"slices"
	"time"

	"github.com/pion/stun/v2"
)

// Receive takes a datagram that looks like STUN from the node's UDP port. b is
// used only during the call. Answers leave from within the call; nothing else is
// called back. Whatever is not authentic is dropped without a trace.
func (a *Agent) Receive(b []byte, from netip.AddrPort) {
	m, err := decode(b)
	if err != nil {
		return
	}
	from = plain(from)
	now := time.Now()
	a.mu.Lock()
	switch m.Type {
	case stun.BindingRequest:
		a.receiveCheck(m, from, now)
	case stun.BindingSuccess:
		a.receiveAnswer(m, from, now)
	}
	sends := a.take()
	a.mu.Unlock()
	a.perform(sends)
}

func (a *Agent) receiveCheck(m *stun.Message, from netip.AddrPort, now time.Time) {
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
	q := a.learn(p, from)
	if q == nil {
		return
	}
	p.hear(q, now)
	p.released[family(from)] = true
	a.release(p, now)
	p.wantProbe = p.wantProbe || restarted
	if q == p.selected {
		p.receive(now)
	}
	a.reply(p, q, c.id, now)
	enough := consentExpiry
	if p.active(now) {
		enough = consentInterval
	}
	if !q.valid || q.suspect || now.Sub(q.answered) > enough {
		a.sendCheck(p, q, outgoing{now: now})
	}
	a.schedule(p, now)
}

func (a *Agent) reply(p *peer, q *pair, id transactionID, now time.Time) {
	if !a.mayProbe(p, q, now) {
		return
	}
	b, err := answer(id, q.addr, p.secrets.check)
	if err != nil {
		a.log.Error("answer not built", "err", err)
		return
	}
	a.post(p, q, datagram{b: b, to: q.addr}, now)
}

func (a *Agent) receiveAnswer(m *stun.Message, from netip.AddrPort, now time.Time) {
	t, ok := a.sent[m.TransactionID]
	if !ok {
		return
	}
	if t.server != nil {
		if from == t.server.Addr {
			a.mapping(t.server, m, now)
		}
		return
	}
	if from != t.pair.addr || stun.MessageIntegrity(t.peer.secrets.check).Check(m) != nil {
		return
	}
	delete(a.sent, m.TransactionID)
	t.pair.waiting = slices.DeleteFunc(t.pair.waiting, func(id transactionID) bool {
		return id == m.TransactionID
	})
	a.accept(t, now)
	a.schedule(t.peer, now)
}
