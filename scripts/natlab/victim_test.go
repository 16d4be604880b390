package natlab

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pion/stun/v2"
	"golang.org/x/sys/unix"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
)

// The limits of design §10, per node that is made to send.
const (
	lawPerPort    = 20  // packets per second to an address and port that does not answer
	lawPerAddress = 100 // and to an address
	lawHardRate   = 200 // of a hard round

	victimPort  = 5000
	victimCalls = 100 * time.Millisecond
	victimWait  = 40 * time.Second // for so long it is named again and again
	victimTCP   = 1                // what goes on by TCP is one more flow
)

// TestVictims has a member name addresses of somebody who has nothing to do with
// the mesh as its own, in every way there is, and counts what arrives there.
func TestVictims(t *testing.T) {
	needLab(t)
	if testing.Short() {
		t.Skip("punch (hard, fresh, newcomer, hostile) and punch/direct have the short form")
	}
	// A delay line would bunch packets, when the machine is busy.
	m := newMeshIn(t, Options{Delay: -1})
	honest := [2]*member{m.join(t, m.laptopAt(t, "a", Masquerade)), m.join(t, m.laptopAt(t, "b", Masquerade))}
	liar := m.join(t, mustServer(t, m.Lab, "liar"))
	v := mustVictim(t, m.Lab)
	i := mustImpostor(t, m, liar)
	s := &slander{i: i, v: v, honest: honest, server: m.server}
	t.Run("signalled", s.signalled)
	t.Run("proposed", s.proposed)
	t.Run("offered by TCP", s.offered)
	t.Run("signalled anew", s.rotated)
	t.Run("published", s.published)
	t.Run("spoofed", s.spoofed)
	t.Run("published with a token", s.proven)
}

// slander is the member's doing.
type slander struct {
	i      *impostor
	v      *victim
	honest [2]*member
	server *Host
}

func (s *slander) keys(t *testing.T) (keys [2]punch.Key) {
	t.Helper()
	for n, h := range s.honest {
		keys[n] = keyOf(t, h)
	}
	return keys
}

// ports are 16 addresses at the victim.
func (s *slander) ports(first int) (list []netip.AddrPort) {
	for n := range punch.MaxCandidates {
		list = append(list, netip.AddrPortFrom(s.v.addr, uint16(first+n)))
	}
	return list
}

// repeat tells both honest nodes something again and again.
func (s *slander) repeat(t *testing.T, what func(n int) signalled) {
	t.Helper()
	keys := s.keys(t)
	s.v.forget()
	for n := range int(victimWait / victimCalls) {
		for _, k := range keys {
			s.i.tell(t, k, what(n))
		}
		time.Sleep(victimCalls)
	}
}

func (s *slander) signalled(t *testing.T) {
	s.repeat(t, func(int) signalled { return signalled{kind: kindCall, candidates: s.ports(victimPort)} })
	s.some(t)
	s.lawful(t, isNamed)
	s.state(t, punch.MaxCandidates)
}

// rotated names other ports every time.
func (s *slander) rotated(t *testing.T) {
	const first = 10_000
	const end = first + uint16(victimWait/victimCalls)*punch.MaxCandidates
	s.repeat(t, func(n int) signalled {
		return signalled{kind: kindCall, candidates: s.ports(first + n*punch.MaxCandidates)}
	})
	s.lawful(t, func(p uint16) bool { return p >= first && p < end || isNamed(p) })
	s.state(t, maxNamed)
}

// isNamed says that a port is one of those that every signal names but of rotated.
func isNamed(p uint16) bool { return p >= victimPort && p < victimPort+punch.MaxCandidates }

// maxNamed is how many addresses that never answered a peer makes a node send to
// while a router remembers them.
const maxNamed = 5 * punch.MaxCandidates

// hardSignals rotate through what a round needs on either side.
func (s *slander) hardSignals(n int) signalled {
	at := s.ports(victimPort)
	what := signalled{kind: []byte{kindCall, kindPropose, kindAgree, kindGo}[n%4], candidates: at}
	if what.kind != kindCall {
		what.side = randomNAT(at[0])
	}
	return what
}

// proposed says that any port of the victim may be ours, which no server has seen.
func (s *slander) proposed(t *testing.T) {
	s.repeat(t, s.hardSignals)
	s.some(t)
	s.lawful(t, isNamed)
}

// offered has the nodes connect by TCP.
func (s *slander) offered(t *testing.T) {
	s.v.forget()
	for _, k := range s.keys(t) {
		s.offer(t, k)
	}
	s.lawful(t, isNamed)
	count := s.v.count(func(a arrival) bool { return a.protocol == unix.IPPROTO_TCP })
	if t.Logf("%d packets by TCP", count); count == 0 {
		t.Error("nothing came by TCP: this proves nothing")
	}
}

// offer answers the offers of a node with addresses of the victim.
func (s *slander) offer(t *testing.T, peer punch.Key) {
	t.Helper()
	key, err := punch.SharedKey(s.i.private, s.i.mesh, peer, "overlay/v1/tcp-offer")
	if err != nil {
		t.Fatal(err)
	}
	var seen [16]byte
	end := time.Now().Add(10 * time.Second)
	for time.Now().Before(end) {
		b := append([]byte{1, 7}, make([]byte, 15)...) // version, our attempt
		b = append(append(b, seen[:]...), lawTCP, lawTCP)
		for _, a := range s.ports(victimPort)[:lawTCP] {
			raw, err := a.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			b = append(append(b, byte(len(raw))), raw...)
		}
		s.i.tell(t, peer, signalled{kind: kindMessage, message: sealed(key, b, s.i.self[:])})
		select {
		case box := <-s.i.messages:
			if b := opened(key, box, peer[:]); len(b) > 17 {
				copy(seen[:], b[1:17])
			}
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// published hands in records that name the victim.
func (s *slander) published(t *testing.T) {
	at := s.ports(victimPort)
	own := netip.AddrPortFrom(s.i.host.Addr(), victimPort)
	mine := s.ask(t, own)
	reflexive, mapped := uint8(punch.ServerReflexive), uint8(punch.PortMapped)
	for name, p := range map[string]struct {
		list   []trust.Endpoint
		tokens [][]byte
	}{
		"no token":              {[]trust.Endpoint{{Addr: at[0], Type: reflexive}}, nil},
		"a token of another":    {[]trust.Endpoint{{Addr: at[0], Type: reflexive}}, [][]byte{mine}},
		"a token that is wrong": {[]trust.Endpoint{{Addr: at[0], Type: reflexive}}, [][]byte{make([]byte, len(mine))}},
		"mapped there":          {[]trust.Endpoint{{Addr: own, Type: reflexive}, {Addr: at[0], Type: mapped}}, [][]byte{mine}},
		"a host there":          {[]trust.Endpoint{{Addr: at[0], Type: typeHost}}, nil},
	} {
		if e := s.i.publish(t, p.list, p.tokens...); e == nil || e.Code != coord.CodeBadCandidates {
			t.Errorf("%s: %v", name, e)
		}
	}
	if e := s.i.publish(t, []trust.Endpoint{{Addr: own, Type: reflexive}}, mine); e != nil {
		t.Errorf("its own address is refused: %v", e)
	}
}

// request is a Binding request of the member's session to the server.
func (s *slander) request(t *testing.T) []byte {
	t.Helper()
	pad := punch.ServerAnswerSize // a little more than is needed
	m, err := stun.Build(stun.TransactionID, stun.BindingRequest, stun.Username(s.i.welcome.Session),
		stun.RawAttribute{Type: punch.AttrPadding, Value: make([]byte, pad/4*4)}, stun.MessageIntegrity(s.i.stream.STUNKey()))
	if err != nil {
		t.Fatal(err)
	}
	return m.Raw
}

// ask gets the token of an own address.
func (s *slander) ask(t *testing.T, own netip.AddrPort) []byte {
	t.Helper()
	var c *net.UDPConn
	err := s.i.host.inside(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(own))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.WriteToUDPAddrPort(s.request(t), netip.AddrPortFrom(s.server.Addr(), stunPort)); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1500)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return tokenIn(b[:n])
}

func tokenIn(b []byte) []byte {
	m := &stun.Message{Raw: slices.Clone(b)}
	if m.Decode() != nil {
		return nil
	}
	token, err := m.Get(punch.AttrToken)
	if err != nil {
		return nil
	}
	return token
}

// spoofed asks the server in the name of the victim: each request of a session is
// answered once and no longer than it is, plain ones at a limited rate.
func (s *slander) spoofed(t *testing.T) {
	const sent, plainBurst, plainRate = 500, 200, 50
	from, to := netip.AddrPortFrom(s.v.addr, victimPort), netip.AddrPortFrom(s.server.Addr(), stunPort)
	forge := s.forger(t, from, to)
	s.v.forget()
	var size int
	for range sent {
		b := s.request(t)
		size = ipHeader + udpHeader + len(b)
		forge(b)
	}
	time.Sleep(500 * time.Millisecond)
	answers := s.answers()
	for _, a := range answers {
		if a.size > size {
			t.Errorf("%d bytes for a request of %d", a.size, size)
		}
	}
	t.Logf("%d requests of a session, %d answers", sent, len(answers))
	if len(answers) == 0 || len(answers) > sent {
		t.Errorf("%d answers to %d requests", len(answers), sent)
	}
	s.v.forget()
	plain, err := stun.Build(stun.TransactionID, stun.BindingRequest)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for range 2 * sent {
		forge(plain.Raw)
	}
	time.Sleep(500 * time.Millisecond)
	got, most := len(s.answers()), plainBurst+int(time.Since(began).Seconds()*plainRate)
	t.Logf("%d plain requests, %d answers", 2*sent, got)
	if got == 0 || got > most {
		t.Errorf("%d answers to plain requests in the name of the victim, at most %d may be", got, most)
	}
}

// answers are what came from the server.
func (s *slander) answers() []arrival {
	return slices.DeleteFunc(s.v.all(), func(a arrival) bool { return a.from != s.server.Addr() })
}

// stolen is the token that the victim gets when the server is asked in its name.
func (s *slander) stolen(t *testing.T, at netip.AddrPort) []byte {
	t.Helper()
	forge := s.forger(t, at, netip.AddrPortFrom(s.server.Addr(), stunPort))
	s.v.forget()
	for range probeResend {
		forge(s.request(t))
		time.Sleep(500 * time.Millisecond)
		for _, a := range s.answers() {
			if token := tokenIn(a.payload); token != nil {
				return token
			}
		}
	}
	t.Fatal("the victim got no token")
	return nil
}

// forger sends datagrams with a source that is not the member's.
func (s *slander) forger(t *testing.T, from, to netip.AddrPort) func(payload []byte) {
	t.Helper()
	fd := -1
	err := s.i.host.inside(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	})
	return func(payload []byte) {
		t.Helper()
		if err := unix.Sendto(fd, userPacket(from, to, string(payload)), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()}); err != nil {
			t.Fatal(err)
		}
	}
}

// proven publishes the victim with the token that it got, which takes somebody who
// sees what arrives there. Then it counts as observed, and a hard round may go there.
func (s *slander) proven(t *testing.T) {
	for _, n := range s.honest { // what they remember of earlier proposals is gone
		if err := errors.Join(n.down(t.Context()), n.up(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	at := s.ports(victimPort)
	if e := s.i.publish(t, []trust.Endpoint{{Addr: at[0], Type: uint8(punch.ServerReflexive)}}, s.stolen(t, at[0])); e != nil {
		t.Fatalf("the token that the victim got is refused: %v", e)
	}
	s.repeat(t, s.hardSignals)
	tried := 0
	for _, n := range s.honest {
		in := func(a arrival) bool { return a.from == n.outside() && !isNamed(a.port) }
		count, rate := s.v.count(in), s.v.rate(in)
		t.Logf("%s: a hard round of %d packets, at most %d in a second", n.nodeName, count, rate)
		if count > lawPackets || rate > lawHardRate {
			t.Errorf("%s: %d packets of a hard round, %d in a second", n.nodeName, count, rate)
		}
		tried += count
	}
	if tried == 0 {
		t.Error("there was no hard round: this proves nothing")
	}
	s.v.drop(func(a arrival) bool { return !isNamed(a.port) })
	s.lawful(t, isNamed)
	s.state(t, punch.MaxCandidates+lawPackets+victimTCP)
}

// lawful holds what came to the victim against the law. Only some ports may be hit.
func (s *slander) lawful(t *testing.T, named func(uint16) bool) {
	t.Helper()
	for _, n := range s.honest {
		mine := func(a arrival) bool { return a.from == n.outside() }
		perAddress, perPort := s.v.rate(mine), 0
		for port := range s.v.ports(mine) {
			perPort = max(perPort, s.v.rate(func(a arrival) bool { return mine(a) && a.port == port }))
			if !named(port) {
				t.Errorf("%s sends to port %d, which nobody named", n.nodeName, port)
			}
		}
		t.Logf("%s: %d packets, at most %d in a second, %d to one port, %d ports", n.nodeName, s.v.count(mine), perAddress, perPort, len(s.v.ports(mine)))
		if perAddress > lawPerAddress || perPort > lawPerPort {
			t.Errorf("%s: %d packets in a second, %d to one port", n.nodeName, perAddress, perPort)
		}
	}
}

// some wants both nodes to have sent anything at all.
func (s *slander) some(t *testing.T) {
	t.Helper()
	for _, n := range s.honest {
		if s.v.count(func(a arrival) bool { return a.from == n.outside() }) == 0 {
			t.Errorf("nothing of %s reached the victim: this proves nothing", n.nodeName)
		}
	}
}

// state holds how many flows towards the victim the routers have against a limit.
func (s *slander) state(t *testing.T, limit int) {
	t.Helper()
	for _, n := range s.honest {
		flows, err := n.home.flows()
		if err != nil {
			t.Fatal(err)
		}
		count := 0
		for _, f := range flows {
			if f.to.Addr() == s.v.addr {
				count++
			}
		}
		t.Logf("router of %s: %d flows towards the victim", n.nodeName, count)
		if count == 0 || count > limit {
			t.Errorf("the router of %s has %d flows towards the victim, the limit is %d", n.nodeName, count, limit)
		}
	}
}
