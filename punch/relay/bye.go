package relay

const (
	// byeSize is the size of BYE in bytes.
	byeSize = headSize + 8 + sequenceSize + macSize
	// byes is how many of them leave: nobody waits to repeat one that was lost.
	byes = 3
)

// bye ends a node's stay at the relay; it has no answer. What the relay went on
// sending to the node's address would, after a restart of the node's router, reach
// the router itself, and could take the very port that the node is about to need.
//
//	 0      4         12         28    44
//	+------+---------+----------+-----+
//	| head | session | sequence | MAC |
//	+------+---------+----------+-----+
type bye struct {
	id  sessionID
	seq sequence
}

func (e *bye) build(s *session) []byte {
	b := appendHead(make([]byte, 0, byeSize), kindBye, 0)
	b = append(b, e.id[:]...)
	return s.seal(append(b, e.seq[:]...))
}

// parseBye reads what session.sealed has yet to prove.
func parseBye(b []byte) (e bye, ok bool) {
	if !shaped(b, kindBye, byeSize) || b[3] != 0 {
		return e, false
	}
	b = b[headSize:]
	b = b[copy(e.id[:], b):]
	copy(e.seq[:], b)
	return e, true
}

// bye forgets a node and its flows at once, when it says so from where it was
// validated. Its sequence numbers stay known, as those of a silent node do.
func (s *Server) bye(n *node, msg []byte, e *bye, t *transport) {
	k := s.known(n, e.id, msg)
	if k == nil || !k.uses(t) {
		s.count.forged.Add(1)
		return
	}
	now := s.clock()
	if !s.heard(k, t, e.seq, true, now) {
		return
	}
	s.mu.Lock()
	conn := k.prune(now)
	s.lose(k)
	s.sweepFlows()
	s.mu.Unlock()
	if conn != nil {
		conn.close()
	}
}

// goodbye tells the relay that the node is going. Over TLS the end of the
// connection says so; a way over UDP from before is ended in any case.
func (c *Client) goodbye() {
	for range byes {
		c.mu.Lock()
		to := c.udp.addr
		c.counter++
		e := bye{id: c.session.id, seq: newSequence(c.cfg.Boot, c.counter)}
		c.mu.Unlock()
		if !to.IsValid() {
			return
		}
		if err := c.cfg.Send(e.build(&c.session), to); err != nil {
			c.cfg.Log.Debug("goodbye not sent", "addr", to, "err", err)
		}
	}
}
