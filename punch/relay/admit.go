package relay

import (
	"crypto/sha256"

	"overlay/punch"
)

// verifyTries is how often an admission is verified when devices are withdrawn
// meanwhile.
const verifyTries = 3

// admit judges an ADMIT that came on a transport. valid says whether its cookie
// shows that the sender is at the other end. The reply, nil for silence, is
// never longer than the message; n is nil unless the node is admitted. It may
// take some milliseconds, and does not keep msg.
func (s *Server) admit(msg []byte, valid func(cookie) bool, t *transport) (reply []byte, n *node) {
	limit := MaxAdmission
	if t.conn != nil {
		limit = maxAdmissionTLS
	}
	a, ok := parseAdmit(msg, limit)
	if !ok {
		s.count.malformed.Add(1)
		return nil, nil
	}
	if reply, ok = s.screen(&a, valid, t); !ok {
		return reply, nil
	}
	return s.enrol(&a, msg, t)
}

// screen does what is cheap and keeps strangers out: the cookie, then the limit
// of the source's network.
func (s *Server) screen(a *admission, valid func(cookie) bool, t *transport) (reply []byte, ok bool) {
	if !valid(a.cookie) {
		s.count.forged.Add(1)
		return s.challenge(nil, a.seq, t), false
	}
	if !s.admissions.spend(t.addr.Addr(), s.clock()) {
		s.count.limited.Add(1)
		return nil, false
	}
	return nil, true
}

// enrol does what is expensive: keys, signature, credentials.
func (s *Server) enrol(a *admission, msg []byte, t *transport) (reply []byte, n *node) {
	shared, ok := s.agree(a.node)
	if !ok || shared.id != a.id || !shared.sealed(msg) {
		s.count.forged.Add(1)
		return nil, nil
	}
	hash := sha256.Sum256(a.credentials)
	for range verifyTries {
		s.mu.RLock()
		retention := s.retention
		s.mu.RUnlock()
		who, err := s.identify(hash, a.credentials)
		if err != nil || who.WireGuard != a.node || !a.by(who.Device, s.public) {
			if s.refusals.take(&s.refusalRate, s.clock(), 1) {
				s.log.Info("node refused", "from", t.addr, "err", err)
			}
			return (&refused{refusedStranger, a.seq}).build(&shared), nil
		}
		if n, reply, ok = s.enter(&entry{a, &shared, who, hash, retention}, t); ok {
			return reply, n
		}
	}
	return nil, nil
}

// agree gives the session with a node, remembered or derived.
func (s *Server) agree(w punch.Key) (session, bool) {
	s.mu.RLock()
	n := s.nodes[w]
	s.mu.RUnlock()
	if n != nil {
		return n.session, true
	}
	shared, err := relaySession(s.private, w)
	return shared, err == nil
}

func (s *Server) identify(hash [32]byte, credentials []byte) (Identity, error) {
	if who, ok := s.verified.get(hash, s.clock()); ok {
		return who, nil
	}
	return s.cfg.Verify(credentials)
}

// entry is a node that has shown who it is.
type entry struct {
	*admission
	shared    *session
	who       Identity
	hash      [32]byte
	retention uint64 // when that was shown
}

// enter puts a node into the tables. It says false when devices were withdrawn
// since the node was verified.
func (s *Server) enter(e *entry, t *transport) (n *node, reply []byte, ok bool) {
	now := s.clock()
	s.mu.Lock()
	if s.retention != e.retention {
		s.mu.Unlock()
		return nil, nil, false
	}
	s.verified.put(e.hash, e.who, now)
	n = s.nodes[e.node]
	switch {
	case n != nil && !e.seq.after(n.last[t.kind()]):
		s.mu.Unlock()
		s.count.replayed.Add(1)
		return nil, nil, true
	case !s.room(n, e.id):
		s.mu.Unlock()
		return nil, (&refused{refusedFull, e.seq}).build(e.shared), true
	case n == nil:
		n = &node{key: e.node, session: *e.shared, gone: true}
		s.nodes[e.node], s.sessions[e.id] = n, n
	}
	if n.gone {
		s.present++
	}
	n.device, n.gone = e.who.Device, false
	old := n.settle(t, e.seq, e.trial, now)
	s.mu.Unlock()
	if old != nil {
		old.close()
	}
	return n, (&pong{e.seq, t.observed()}).build(e.shared), true
}

// room says whether a node, nil for a new one, has a place. Those that are gone
// need none, only memory. The caller holds s.mu.
func (s *Server) room(n *node, id sessionID) bool {
	switch {
	case n != nil && !n.gone:
		return true
	case n == nil && (len(s.nodes) >= maxNodes || s.sessions[id] != nil):
		return false
	}
	return s.present < s.cfg.MaxNodes
}

// challenge gives a cookie to an address, as often as its network may have one.
// A node that is known, and moved, has some of its own, so that floods from
// forged sources do not keep it from going on.
func (s *Server) challenge(known *node, seq sequence, t *transport) []byte {
	now := s.clock()
	if t.conn != nil {
		return nil
	}
	own := known != nil && known.moves.take(&s.moveRate, now, 1)
	if !own && (!s.challenges.spend(t.addr.Addr(), now) || !s.challenged.take(&s.challengeRate, now, 1)) {
		s.count.limited.Add(1)
		return nil
	}
	return (&challenge{seq, s.cookies.make(t.addr, now)}).build()
}

// control handles a control message other than ADMIT that came on a transport.
// n is the node of a connection; nil over UDP, where the message names it. The
// reply, nil for silence, is never longer than the message. It is quick and does
// not keep msg.
func (s *Server) control(n *node, msg []byte, t *transport) (reply []byte) {
	switch kindOf(msg) {
	case kindHello:
		if h, ok := parseHello(msg); ok {
			return s.hello(n, msg, &h, t)
		}
	case kindOpen:
		if o, ok := parseOpen(msg); ok {
			return s.open(n, msg, &o, t)
		}
	case kindBye:
		if e, ok := parseBye(msg); ok {
			s.bye(n, msg, &e, t)
			return nil
		}
	}
	s.count.malformed.Add(1)
	return nil
}

// known gives the node that made a message: the one of the session, if the MAC
// is right and it is the one of the connection.
func (s *Server) known(n *node, id sessionID, msg []byte) *node {
	k := s.bySession(id)
	if k == nil || n != nil && n != k || !k.session.sealed(msg) {
		return nil
	}
	return k
}

func (s *Server) hello(n *node, msg []byte, h *hello, t *transport) []byte {
	now := s.clock()
	k := s.known(n, h.id, msg)
	if k == nil || !k.uses(t) && (t.conn != nil || !s.cookies.valid(h.cookie, t.addr, now)) {
		return s.challenge(k, h.seq, t)
	}
	if !s.heard(k, t, h.seq, h.trial, now) {
		return nil
	}
	return (&pong{h.seq, t.observed()}).build(&k.session)
}

// heard takes an authenticated message on a validated transport into account.
// It says false when the message is not to be followed.
func (s *Server) heard(n *node, t *transport, seq sequence, trial bool, now int64) bool {
	if !n.asked.take(&s.controlRate, now, 1) {
		s.count.limited.Add(1)
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n.gone || t.conn != nil && n.tls.Load() != t {
		return false
	}
	if !seq.after(n.last[t.kind()]) {
		s.count.replayed.Add(1)
		return false
	}
	n.settle(t, seq, trial, now)
	return true
}

// open opens flows. It changes nothing about where the node is reached.
func (s *Server) open(n *node, msg []byte, o *open, t *transport) []byte {
	k := s.known(n, o.id, msg)
	if k == nil || !k.uses(t) {
		s.count.forged.Add(1)
		return nil
	}
	now := s.clock()
	if !s.heard(k, t, o.seq, true, now) {
		return nil
	}
	answer := opened{seq: o.seq, count: len(o.peers)}
	var headers [maxOpen]uint64
	for i, peer := range o.peers {
		headers[i] = FlowOf(k.key, peer).number()
	}
	s.mu.Lock()
	for i, peer := range o.peers {
		if !k.gone && s.openFlow(k, peer, headers[i], now) {
			answer.bitmap |= 1 << i
		}
	}
	s.mu.Unlock()
	return answer.build(&k.session)
}
