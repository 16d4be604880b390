package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/stun/v2"
	"golang.org/x/sys/unix"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// patience is how long a test waits for what comes at once.
const patience = 5 * time.Second

// link is a node's link to the server's relay.
type link struct {
	t      testing.TB
	client *relay.Client
	socket *net.UDPConn
	to     netip.AddrPort // zero: over TLS only
	states chan relay.State
	peers  chan bool
	got    chan []byte
	stop   func()
}

// linkTo opens a link with credentials; ports empty: over TLS only.
func (n *node) linkTo(t testing.TB, server string, w coord.Welcome, ports []uint16) *link {
	t.Helper()
	l := &link{t: t, states: make(chan relay.State, 64), peers: make(chan bool, 64), got: make(chan []byte, 64)}
	var err error
	if l.socket, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	l.client, err = relay.NewClient(relay.ClientConfig{
		Relay: [32]byte(w.Relay.Key), PrivateKey: n.wireguard, Device: n.device,
		Credentials: trust.Credentials(n.member.Cap, n.member.Cert), Boot: uint64(time.Now().UnixNano()),
		Send:    func(b []byte, to netip.AddrPort) error { _, err := l.socket.WriteToUDPAddrPort(b, to); return err },
		Dial:    func(ctx context.Context) (net.Conn, [16]byte, error) { return dialRelay(ctx, n, server) },
		Deliver: l.deliver,
		OnState: func(s relay.State) { l.states <- s },
		OnPeer:  func(_ punch.Key, here bool) { l.peers <- here },
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(ports) > 0 {
		l.to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ports[0])
		l.client.SetAddrs([]netip.AddrPort{l.to})
	}
	l.run()
	return l
}

func dialRelay(ctx context.Context, n *node, server string) (conn net.Conn, binding [16]byte, err error) {
	d := coord.Dialer{Servers: []string{server}, Device: n.device}
	c, err := d.Dial(ctx)
	if err != nil {
		return nil, binding, err
	}
	key, err := c.Export(coord.ExporterRelay)
	if err == nil {
		conn, err = c.Upgrade(ctx, coord.RelayPath, coord.RelayProtocol)
	}
	if err != nil {
		_ = c.Close()
		return nil, binding, err
	}
	return conn, [16]byte(key), nil
}

func (l *link) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = l.client.Run(ctx) })
	wg.Go(l.receive)
	l.stop = sync.OnceFunc(func() { cancel(); _ = l.socket.Close(); wg.Wait() })
	l.t.Cleanup(l.stop)
}

func (l *link) receive() {
	b := make([]byte, relay.MaxFrame)
	for {
		n, from, err := l.socket.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if !l.client.Receive(b[:n], from) {
			l.got <- bytes.Clone(b[:n])
		}
	}
}

func (l *link) deliver(run []byte) {
	for len(run) > 0 {
		n := 2 + int(binary.BigEndian.Uint16(run))
		l.got <- bytes.Clone(run[2:n])
		run = run[n:]
	}
}

// until waits for a state.
func (l *link) until(want relay.Transport) relay.State {
	l.t.Helper()
	late := time.After(patience)
	for {
		select {
		case s := <-l.states:
			if s.Transport == want {
				return s
			}
		case <-late:
			l.t.Fatalf("no state %q", want)
		}
	}
}

// untilPeer waits until the flow to the peer is open.
func (l *link) untilPeer() {
	l.t.Helper()
	late := time.After(patience)
	for {
		select {
		case here := <-l.peers:
			if here {
				return
			}
		case <-late:
			l.t.Fatal("the peer is not at the relay")
		}
	}
}

// send sends one datagram into a flow.
func (l *link) send(h relay.Header, text string) {
	l.t.Helper()
	b := append(h[:len(h):len(h)], text...)
	if l.to.IsValid() {
		if _, err := l.socket.WriteToUDPAddrPort(b, l.to); err != nil {
			l.t.Error(err)
		}
		return
	}
	l.client.Offer(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
}

func (l *link) want(h relay.Header, text string) {
	l.t.Helper()
	select {
	case b := <-l.got:
		if string(b) != string(h[:])+text {
			l.t.Errorf("got %q, want %q in flow %x", b, text, h)
		}
	case <-time.After(patience):
		l.t.Errorf("%q did not come", text)
	}
}

func (n *node) key(t testing.TB) punch.Key { return punch.Key(n.cert(t).WireGuard) }

// meet links two members to the relay and opens the flow between them.
func meet(t testing.TB, s *running, a, b *node, over [2]bool) (la, lb *link, flow relay.Header) {
	t.Helper()
	server := s.Addr().String()
	w := a.welcomed(t, server)
	open := func(n, peer *node, udp bool) *link {
		want, ports := relay.TLS, []uint16(nil)
		if udp {
			want, ports = relay.UDP, w.Relay.Ports
		}
		l := n.linkTo(t, server, w, ports)
		l.client.SetPeers([]punch.Key{peer.key(t)})
		l.until(want)
		return l
	}
	la, lb = open(a, b, over[0]), open(b, a, over[1])
	la.untilPeer()
	lb.untilPeer()
	return la, lb, relay.FlowOf(a.key(t), b.key(t))
}

func (n *node) welcomed(t testing.TB, server string) coord.Welcome {
	t.Helper()
	e, _ := n.follow(t, server, "")
	if e.welcome.Relay == nil {
		t.Fatalf("no relay in %+v", e.welcome)
	}
	return e.welcome
}

func TestRelay(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	for name, over := range map[string][2]bool{"both over UDP": {true, true}, "both over TLS": {}, "one over each": {true, false}} {
		t.Run(name, func(t *testing.T) {
			a, b := o.joined(t, "a"), o.joined(t, "b")
			la, lb, flow := meet(t, s, a, b, over)
			la.send(flow, "there")
			lb.want(flow, "there")
			lb.send(flow, "and back")
			la.want(flow, "and back")
			la.send(relay.FlowOf(a.key(t), o.key(t)), "astray")
			la.send(flow, "the last")
			lb.want(flow, "the last")
		})
	}
}

// The relay's sockets answer STUN as well, with the token for a record.
func TestRelayAnswersSTUN(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	e, _ := o.follow(t, o.server, "")
	l := o.linkTo(t, o.server, e.welcome, e.welcome.Relay.Ports)
	l.until(relay.UDP)
	request := binding(t, stun.NewUsername(string(e.welcome.Session)), padding(), stun.MessageIntegrity(e.STUNKey()))
	if _, err := l.socket.WriteToUDPAddrPort(request, l.to); err != nil {
		t.Fatal(err)
	}
	select {
	case b := <-l.got:
		checkSocketAnswer(t, s.Server, o, b, l.socket.LocalAddr().(*net.UDPAddr).AddrPort())
	case <-time.After(patience):
		t.Error("no answer")
	}
}

// Who leaves is dropped at once, with both ways to the relay, and not let in
// again; the others stay.
func TestRelayDropsWhoLeaves(t *testing.T) {
	for name, udp := range map[string]bool{"UDP": true, "TLS": false} {
		t.Run(name, func(t *testing.T) {
			s := start(t, t.TempDir())
			o := found(t, s)
			a, b := o.joined(t, "a"), o.joined(t, "b")
			la, lb, flow := meet(t, s, a, b, [2]bool{true, udp})
			if err := o.dial(t, o.server).Revoke(t.Context(), b.revocation(t, public(b.device), o.signer)); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(patience); s.relay.Stats().Nodes > 1; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%+v", s.relay.Stats())
				}
			}
			before := s.relay.Stats().Datagrams
			la.send(flow, "to nobody")
			lb.send(flow, "from nobody")
			lb.client.NetworkChanged()
			lb.until(relay.None)
			if now := s.relay.Stats(); now.Datagrams != before || now.Nodes != 1 || now.Flows != 0 {
				t.Errorf("%+v", now)
			}
		})
	}
}

// Only nodes of the mesh are served, and only by the documents the server has.
func TestRelayVerify(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	got, err := s.hub.verify(trust.Credentials(b.member.Cap, b.member.Cert))
	if want := (relay.Identity{Device: public(b.device), WireGuard: b.key(t)}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	r := newNode(t)
	invite := o.invite(t, func(c *trust.InviteCap) { c.Tags = []string{trust.RelayTag} })
	if r.member, err = coord.Join(t.Context(), coord.JoinConfig{
		Invite: invite, Device: r.device, WireGuard: r.wireguard, Name: "fra", Role: trust.RoleRelay,
	}, nil); err != nil {
		t.Fatal(err)
	}
	other := start(t, t.TempDir())
	foreign := found(t, other)
	doc, at, _, err := trust.OpenCountersigned(b.member.Cert)
	if err != nil {
		t.Fatal(err)
	}
	later, err := trust.Countersign(doc, at.Add(time.Second), s.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][]byte{
		"nothing":              nil,
		"a relay":              trust.Credentials(r.member.Cap, r.member.Cert),
		"of another mesh":      trust.Credentials(foreign.member.Cap, foreign.member.Cert),
		"another's invite":     trust.Credentials(o.member.Cap, b.member.Cert),
		"seen at another time": trust.Credentials(b.member.Cap, later),
	} {
		if got, err := s.hub.verify(c); err == nil {
			t.Errorf("%s: taken for %+v", name, got)
		}
	}
}

// Nodes know the relay again after a restart, and strangers get no connection.
func TestRelayKeyAndUpgrade(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	o := found(t, s)
	w := o.welcomed(t, o.server)
	if !slices.Equal(w.Relay.Ports, w.STUN) || len(w.Relay.Ports) != 3 {
		t.Errorf("relay %+v beside STUN %v", w.Relay, w.STUN)
	}
	_, err := newNode(t).dial(t, o.server).Upgrade(t.Context(), coord.RelayPath, coord.RelayProtocol)
	wantCode(t, err, coord.CodeNotMember)
	_, err = o.dial(t, o.server).Upgrade(t.Context(), coord.RelayPath, "overlay")
	wantCode(t, err, coord.CodeBadRequest)
	s.stop()
	s = start(t, dir)
	if again := o.welcomed(t, s.Addr().String()); !bytes.Equal(again.Relay.Key, w.Relay.Key) {
		t.Error("the relay has another key after a restart")
	}
}

// The relay finds the socket under TLS and gate, and bounds what waits in it.
func TestRelayBoundsUnsent(t *testing.T) {
	s := start(t, t.TempDir())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gated := gatedListener{l, newGate()}
	defer func() { _ = gated.Close() }()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	near, err := gated.Accept()
	if err != nil {
		t.Fatal(err)
	}
	before := unsentBound(t, near.(*gatedConn).Conn)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.relay.ServeConn(ctx, tls.Server(near, &tls.Config{}), [16]byte{}) })
	defer func() { cancel(); wg.Wait() }()
	for deadline := time.Now().Add(patience); unsentBound(t, near.(*gatedConn).Conn) == before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the kernel keeps as much unsent as before")
		}
	}
}

func unsentBound(t *testing.T, c net.Conn) (n int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if ctl := raw.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT) }); ctl != nil || err != nil {
		t.Fatal(ctl, err)
	}
	return n
}

// Connections to the relay count among those of a member, like its streams.
func TestRelayConnectionsOfMember(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	open := 0
	for range maxOfMember + 1 {
		conn, _, err := dialRelay(t.Context(), o.node, o.server)
		if err != nil {
			wantCode(t, err, coord.CodeRateLimited)
			break
		}
		defer func() { _ = conn.Close() }()
		open++
	}
	if open > maxOfMember || open < maxOfMember-1 { // the one that founded may still be closing
		t.Errorf("%d connections of one member", open)
	}
}

// TestRelayLongCertificate: a node with long tags has credentials that fit no
// datagram. It is relayed all the same.
func TestRelayLongCertificate(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	a, b := newNode(t), o.joined(t, "b")
	tagged := func(c *trust.InviteCap) {
		for i := range trust.MaxTags {
			c.Tags = append(c.Tags, string(rune('a'+i))+strings.Repeat("t", 40))
		}
	}
	if err := a.join(t, o.invite(t, tagged), "a"); err != nil {
		t.Fatal(err)
	}
	w := a.welcomed(t, s.Addr().String())
	la, lb := a.linkTo(t, s.Addr().String(), w, w.Relay.Ports), b.linkTo(t, s.Addr().String(), w, w.Relay.Ports)
	la.client.SetPeers([]punch.Key{b.key(t)})
	lb.client.SetPeers([]punch.Key{a.key(t)})
	if state := la.until(relay.TLS); state.Err == nil {
		t.Error("nothing says why it is not UDP")
	}
	la.to = netip.AddrPort{}
	la.untilPeer()
	lb.untilPeer()
	flow := relay.FlowOf(a.key(t), b.key(t))
	la.send(flow, "there")
	lb.want(flow, "there")
	lb.send(flow, "and back")
	la.want(flow, "and back")
}
