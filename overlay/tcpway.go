package overlay

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"overlay/coord"
	"overlay/punch"
	"overlay/punch/direct"
	"overlay/punch/relay"
	"overlay/tun"
)

// tlsCost is what a relay is worth less than a TCP connection to the peer: one
// side's way to it is over TLS, and it is a detour.
const tlsCost = 10 * time.Millisecond

// newTCPLinks connects the direct TCP connections with the rest of the session.
func (s *session) newTCPLinks() *tcpLinks {
	return newTCPLinks(tcpConfig{
		blocked: func() bool { return s.links.reach().noUDP() },
		looking: s.lookingFor,
		sent:    func(k punch.Key) uint64 { return s.activity(k).Sent },
		dial:    s.dialPeer,
		carry:   s.links.setTCP,
		deliver: func(id uint16, run []byte) { s.dev.Load().Deliver(id, run) },
		log:     s.log,
	})
}

// lookingFor tells whether a peer is reached over a relay, and how long something
// better was looked for.
func (s *session) lookingFor(k punch.Key) (time.Duration, bool) {
	e, ok := s.agent.Explain(k)
	if !ok || e.Path.Type != punch.Relayed || e.Attempt.Since.IsZero() || e.Attempt.Mapped {
		return 0, false
	}
	return time.Since(e.Attempt.Since), true
}

// dialPeer connects to a peer that does the same.
func (s *session) dialPeer(ctx context.Context, k punch.Key, signals <-chan []byte) (net.Conn, error) {
	return direct.DialTCP(ctx, direct.TCPConfig{
		PrivateKey: s.keys.WireGuard, Group: s.hash, Peer: k,
		Mapped: s.mappedTCP, Allowed: s.agent.MayProbe,
		Send:    func(b []byte) error { return s.agent.SendMessage(k, b) },
		Signals: signals, Log: s.log.With("peer", tun.Key(k)),
	})
}

// mappedTCP has the server tell how it sees connections from a local port. A
// proxy would show its own address, so none is asked.
func (s *session) mappedTCP(ctx context.Context, port uint16) (netip.AddrPort, io.Closer, error) {
	d := coord.Dialer{
		Servers: s.control.servers(), Device: s.keys.Device, Verify: s.control.verify, Log: s.log,
		Connect: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) { return direct.DialFrom(ctx, port, to) },
	}
	conn, err := d.Dial(ctx)
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	a, err := conn.Address(ctx)
	if err != nil {
		_ = conn.Close() // what it was for has failed
		return a, nil, err
	}
	return a, conn, nil
}

// tcpWay is the link of a peer over TCP. It stays, with its number, when the
// connection ends.
type tcpWay struct {
	id     uint16
	stream tcpStream
}

// setTCP notes the TCP connection to a peer.
func (l *links) setTCP(k punch.Key, id uint16, s tcpStream) {
	l.mu.Lock()
	if _, member := l.peers[k]; member {
		l.tcp[k] = tcpWay{id, s}
	} else {
		delete(l.tcp, k)
	}
	l.mu.Unlock()
	l.poke()
	l.cfg.changed()
}

// direct tells the far end of the TCP connection that a handle stands for.
func (l *links) direct(handle netip.AddrPort) (netip.AddrPort, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w, ok := l.ways[handle]
	if t := l.tcp[w.peer]; ok && w.link == t.id {
		return t.stream.remote, true
	}
	return netip.AddrPort{}, false
}

// setTCP tells the device of TCP connections that began or ended.
func (s *spread) setTCP() {
	dev := s.links.cfg.device()
	now := map[uint16]*relay.Stream{}
	s.links.mu.Lock()
	for k, w := range s.links.tcp {
		if _, member := s.links.peers[k]; !member {
			delete(s.links.tcp, k)
			continue
		}
		now[w.id] = w.stream.Stream
	}
	s.links.mu.Unlock()
	for id, stream := range now {
		switch {
		case stream == s.streams[id]:
		case stream == nil:
			dev.SetLink(id, tun.Link{})
		default:
			dev.SetLink(id, tun.Link{Send: stream.Offer})
		}
	}
	for id, stream := range s.streams {
		if _, there := now[id]; !there && stream != nil {
			dev.SetLink(id, tun.Link{})
		}
	}
	s.streams = now
}

// withTCP adds the link of a peer over TCP, if it has one, to those of all. mu is
// held.
func (l *links) withTCP(k punch.Key, ids []uint16) []uint16 {
	w, ok := l.tcp[k]
	if !ok {
		return ids
	}
	return slices.Concat([]uint16{w.id}, ids[:min(len(ids), punch.MaxRelays-1)])
}

// preferTCP puts a peer's TCP connection before its relays. mu is held.
func (l *links) preferTCP(k punch.Key, list []punch.Relay) []punch.Relay {
	w := l.tcp[k]
	handle := l.handles[k][w.id]
	if w.stream.Stream == nil || !handle.IsValid() {
		return list
	}
	for i := range list {
		list[i].Cost = max(tlsCost, list[i].RTT/4)
	}
	return slices.Concat([]punch.Relay{{Addr: handle, Here: true}}, list)
}
