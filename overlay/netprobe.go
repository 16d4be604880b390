package overlay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
)

const (
	// spareSockets ask every server, so that 16 mappings and more are seen where
	// every destination has its own; maxAsked bounds the servers of a family.
	spareSockets = 6
	maxAsked     = 6
	// A question is repeated after probeGap, twice and four times that; answers are
	// waited for as long again.
	probeGap    = 150 * time.Millisecond
	probeTries  = 3
	maxDatagram = 1500
)

// spare is a UDP socket of its own, for looking at the network.
type spare struct {
	conn *net.UDPConn
	port uint16
}

func openSpare(network string) (*spare, error) {
	c, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	return &spare{c, c.LocalAddr().(*net.UDPAddr).AddrPort().Port()}, nil
}

func closeAll(list []*spare) {
	for _, s := range list {
		_ = s.conn.Close() // nothing is buffered that we could lose
	}
}

// reply is a server's answer to a question.
type reply struct {
	server, from, mapped netip.AddrPort
	sent                 time.Time
	rtt                  time.Duration // 0: the question was repeated
}

// pending is a question that waits.
type pending struct {
	punch.Question
	to   netip.AddrPort
	sent time.Time
	got  bool
}

// ask sends a question to every server and collects the answers until all came,
// or none is to be expected any more.
func (s *spare) ask(ctx context.Context, servers []punch.Server, how punch.Ask) ([]reply, error) {
	list := make([]*pending, 0, len(servers))
	for _, server := range servers {
		q, err := punch.NewQuestion(server, how)
		if err != nil {
			return nil, err
		}
		list = append(list, &pending{Question: q, to: server.Addr})
	}
	return s.askAll(ctx, list)
}

// askAll is ask for questions that are made.
func (s *spare) askAll(ctx context.Context, list []*pending) ([]reply, error) {
	var all []reply
	for try := range probeTries {
		s.send(list)
		got, err := s.collect(ctx, list, probeGap<<try)
		if err != nil {
			return nil, err
		}
		for _, r := range got {
			if try > 0 {
				r.rtt = 0
			}
			all = append(all, r)
		}
		if len(all) == len(list) || ctx.Err() != nil {
			break
		}
	}
	return all, nil
}

// send sends what is not answered yet. What the system refuses to send stays
// unanswered.
func (s *spare) send(list []*pending) {
	for _, p := range list {
		if !p.got {
			p.sent = time.Now()
			_, _ = s.conn.WriteToUDPAddrPort(p.Raw, p.to)
		}
	}
}

// collect reads answers for a while, or until the last one came.
func (s *spare) collect(ctx context.Context, list []*pending, wait time.Duration) ([]reply, error) {
	var all []reply
	until := time.Now().Add(wait)
	for slices.ContainsFunc(list, func(p *pending) bool { return !p.got }) {
		b, from, err := s.read(ctx, until)
		if err != nil || b == nil {
			return all, err
		}
		for _, p := range list {
			mapped, ok := p.Answered(b)
			if !ok || p.got {
				continue
			}
			p.got = true
			all = append(all, reply{p.to, from, mapped, p.sent, time.Since(p.sent)})
		}
	}
	return all, nil
}

// read waits for one datagram; nil: none came in time.
func (s *spare) read(ctx context.Context, until time.Time) ([]byte, netip.AddrPort, error) {
	if err := s.conn.SetReadDeadline(until); err != nil {
		return nil, netip.AddrPort{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, maxDatagram)
	n, from, err := s.conn.ReadFromUDPAddrPort(buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, netip.AddrPort{}, nil
	}
	return buf[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), err
}

// look is what spare sockets saw of one family.
type look struct {
	asked    int            // servers
	answered []punch.Server // of them
	replies  []reply        // first those of the first socket
	samples  []punch.Sample
	nat      NATStatus
}

// lookAround asks servers of one family from fresh sockets, and finds out how the
// network treats them.
func lookAround(ctx context.Context, network string, servers []punch.Server, own []netip.Addr) (look, error) {
	var l look
	servers = servers[:min(len(servers), maxAsked)]
	if l.asked = len(servers); l.asked == 0 {
		return l, nil
	}
	list, err := openSpares(network, spareSockets)
	defer closeAll(list)
	if err != nil {
		return l, err
	}
	if err := l.sample(ctx, list, servers); err != nil || len(l.samples) == 0 {
		return l, err
	}
	l.nat = natStatus(l.samples, own)
	if l.nat.Mapping == endpointIndependent {
		if err := l.hairpin(ctx, list[:2]); err != nil {
			return l, err
		}
	}
	filtering, err := filteringOf(ctx, network, l.answered)
	l.nat.Filtering = filtering
	return l, err
}

func openSpares(network string, count int) ([]*spare, error) {
	var list []*spare
	for range count {
		s, err := openSpare(network)
		if err != nil {
			return list, err
		}
		list = append(list, s)
	}
	return list, nil
}

// sample has every socket ask every server, one shortly after the other.
func (l *look) sample(ctx context.Context, list []*spare, servers []punch.Server) error {
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	got := make([][]reply, len(list))
	for i, s := range list {
		g.Go(func() error {
			replies, err := s.ask(ctx, servers, punch.Ask{})
			mu.Lock()
			defer mu.Unlock()
			got[i] = replies
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, replies := range got {
		for _, r := range replies {
			l.replies = append(l.replies, r)
			l.samples = append(l.samples, punch.Sample{Local: list[i].port, Server: r.server, Mapped: r.mapped, At: r.sent})
		}
	}
	l.answered = slices.DeleteFunc(slices.Clone(servers), func(s punch.Server) bool {
		return !slices.ContainsFunc(l.replies, func(r reply) bool { return r.server == s.Addr })
	})
	return nil
}

// hairpin has two sockets send to each other's mapping, both ways because each NAT
// may want to be asked first.
func (l *look) hairpin(ctx context.Context, two []*spare) error {
	mapped := func(port uint16) netip.AddrPort {
		for _, s := range l.samples {
			if s.Local == port {
				return s.Mapped
			}
		}
		return netip.AddrPort{}
	}
	to := [2]netip.AddrPort{mapped(two[1].port), mapped(two[0].port)}
	if !to[0].IsValid() || !to[1].IsValid() {
		return nil
	}
	q, err := punch.NewQuestion(punch.Server{}, punch.Ask{})
	if err != nil {
		return err
	}
	passes := false
	for try := 0; try < probeTries && !passes; try++ {
		for i, s := range two {
			_, _ = s.conn.WriteToUDPAddrPort(q.Raw, to[i])
		}
		for _, s := range two {
			b, _, err := s.read(ctx, time.Now().Add(probeGap/2))
			if err != nil {
				return err
			}
			passes = passes || slices.Equal(b, q.Raw)
		}
	}
	l.nat.Hairpin = &passes
	return nil
}

// origin says where an answer came from that was wanted from elsewhere.
type origin int

const (
	nowhere   origin = iota // none came
	asked                   // the server cannot
	elsewhere               // as wanted
)

// filteringOf has packets come from where a socket has sent nothing to: from
// another address of a server, or from another server, then from another port.
// The servers are some that answer. Empty: none of them can do that.
func filteringOf(ctx context.Context, network string, servers []punch.Server) (string, error) {
	server := servers[0]
	far, err := originOf(ctx, network, server, punch.Change{Address: true, Port: true})
	if err != nil || far == elsewhere {
		return endpointIndependent, err
	}
	other, err := otherReaches(ctx, network, servers)
	if err != nil || other == elsewhere {
		return endpointIndependent, err
	}
	near, err := originOf(ctx, network, server, punch.Change{Port: true})
	switch {
	case err != nil || near == asked:
		return "", err
	case near == nowhere:
		return addressPortDependent, nil
	case other == nowhere:
		return addressDependent, nil
	}
	return atMostAddressDependent, nil // nobody with another address could be asked
}

// otherReaches asks the first server, from another socket, to answer to the mapping
// of one that has sent to a server with another address only. asked: there is no
// such server, or the first one does not do that.
func otherReaches(ctx context.Context, network string, servers []punch.Server) (origin, error) {
	at := slices.IndexFunc(servers, func(s punch.Server) bool { return s.Addr.Addr() != servers[0].Addr.Addr() })
	if at < 0 {
		return asked, nil
	}
	list, err := openSpares(network, 2)
	defer closeAll(list)
	if err != nil {
		return nowhere, err
	}
	one, err := list[0].ask(ctx, servers[at:at+1], punch.Ask{})
	if err != nil || len(one) == 0 {
		return asked, err
	}
	two, err := list[1].ask(ctx, servers[:1], punch.Ask{})
	if err != nil || len(two) == 0 || two[0].mapped.Addr() != one[0].mapped.Addr() {
		return asked, err // it does not answer at all, or would answer to somebody else
	}
	test := lifetimeTest{network: network, server: servers[0]}
	alive, can, err := test.reaches(ctx, mappedSocket{list[0], one[0].mapped.Port()})
	switch {
	case err != nil || !can:
		return asked, err
	case alive:
		return elsewhere, nil
	}
	return nowhere, nil
}

// originOf asks from a socket that has sent to nobody else.
func originOf(ctx context.Context, network string, server punch.Server, how punch.Change) (origin, error) {
	s, err := openSpare(network)
	if err != nil {
		return nowhere, err
	}
	defer closeAll([]*spare{s})
	replies, err := s.ask(ctx, []punch.Server{server}, punch.Ask{Change: how})
	switch {
	case err != nil || len(replies) == 0:
		return nowhere, err
	case replies[0].from == server.Addr, how.Address && replies[0].from.Addr() == server.Addr.Addr():
		return asked, nil
	}
	return elsewhere, nil
}
