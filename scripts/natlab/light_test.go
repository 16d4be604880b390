package natlab

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// envLight makes this test program join a mesh by itself, as members without a
// daemon, and do with relays what its value, a lightTask, says. It runs so
// inside a machine of a lab.
const envLight = "NATLAB_TEST_LIGHT"

const (
	lightWait    = 60 * time.Second
	lightRefused = 3 * time.Second // how long one tries that must not get in
	lightJoins   = 4               // at a time
)

// lightTask is what the program is to do. It prints a line of JSON after each
// step and goes on at a line of input.
type lightTask struct {
	Mesh, Foreign string // invites; of a crowd, Mesh serves the TLS clients
	UDPMesh       string // and this one those over UDP
	TLS, UDP      int    // how many; 0 of both is not a crowd
}

func runLight(text string) error {
	var task lightTask
	if err := json.Unmarshal([]byte(text), &task); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	if task.TLS+task.UDP > 0 {
		return task.crowd(ctx)
	}
	return task.intrude(ctx)
}

// light is a member without a daemon.
type light struct {
	device      ed25519.PrivateKey
	private     [32]byte
	public      punch.Key
	server      string // host:port
	credentials []byte
}

func joinLight(ctx context.Context, invite, name string) (*light, error) {
	inv, err := coord.ParseInvite(invite)
	if err != nil {
		return nil, err
	}
	l := &light{server: inv.Server}
	if _, l.device, err = ed25519.GenerateKey(nil); err != nil {
		return nil, err
	}
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	l.private, l.public = [32]byte(private.Bytes()), punch.Key(private.PublicKey().Bytes())
	m, err := coord.Join(ctx, coord.JoinConfig{Invite: inv, Device: l.device, WireGuard: l.private, Name: name}, nil)
	l.credentials = trust.Credentials(m.Cap, m.Cert)
	return l, err
}

// relay asks the server for its relay.
func (l *light) relay(ctx context.Context) (*target, error) {
	conn, err := (&coord.Dialer{Servers: []string{l.server}, Device: l.device}).Dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	s, err := conn.Stream(ctx, "")
	if err != nil {
		return nil, err
	}
	for {
		e, err := s.Next()
		if err != nil {
			return nil, err
		}
		if e.Welcome == nil {
			continue
		}
		if e.Welcome.Relay == nil {
			return nil, errors.New("the server has no relay")
		}
		t := &target{server: l.server, key: [32]byte(e.Welcome.Relay.Key)}
		host := netip.MustParseAddrPort(l.server).Addr()
		for _, port := range e.Welcome.Relay.Ports {
			t.addrs = append(t.addrs, netip.AddrPortFrom(host, port))
		}
		return t, nil
	}
}

// target is the relay of a server.
type target struct {
	server string
	key    [32]byte
	addrs  []netip.AddrPort
}

// lightLink is a member's link to a relay, over UDP or over TLS.
type lightLink struct {
	client *relay.Client
	conn   *net.UDPConn // nil: over TLS

	mu    sync.Mutex
	state relay.State
	here  map[punch.Key]bool
}

func newLightLink(to *target, who *light, udp bool) (*lightLink, error) {
	l := &lightLink{here: map[punch.Key]bool{}}
	cfg := relay.ClientConfig{
		Relay: to.key, PrivateKey: who.private, Device: who.device, Credentials: who.credentials,
		Boot: uint64(time.Now().UnixNano()), OnState: l.setState, OnPeer: l.setPeer,
		Deliver: func([]byte) {}, Send: func([]byte, netip.AddrPort) error { return net.ErrClosed },
	}
	if udp {
		var err error
		if l.conn, err = net.ListenUDP("udp4", nil); err != nil {
			return nil, err
		}
		cfg.Send = func(b []byte, to netip.AddrPort) error {
			_, err := l.conn.WriteToUDPAddrPort(b, to)
			return err
		}
	} else {
		cfg.Dial = func(ctx context.Context) (net.Conn, [16]byte, error) { return dialLight(ctx, to, who) }
	}
	var err error
	if l.client, err = relay.NewClient(cfg); err == nil && udp {
		l.client.SetAddrs(to.addrs)
	}
	return l, err
}

func dialLight(ctx context.Context, to *target, who *light) (net.Conn, [16]byte, error) {
	conn, err := (&coord.Dialer{Servers: []string{to.server}, Device: who.device}).Dial(ctx)
	if err != nil {
		return nil, [16]byte{}, err
	}
	key, err := conn.Export(coord.ExporterRelay)
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, conn.Close())
	}
	up, err := conn.Upgrade(ctx, coord.RelayPath, coord.RelayProtocol)
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, conn.Close())
	}
	return up, [16]byte(key), nil
}

func (l *lightLink) setState(s relay.State) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = s
}

func (l *lightLink) setPeer(k punch.Key, here bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.here[k] = here
}

// look is what the link is now, and how many of its peers are there.
func (l *lightLink) look() (s relay.State, here int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, is := range l.here {
		if is {
			here++
		}
	}
	return l.state, here
}

func (l *lightLink) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.client.Run(ctx) })
	if l.conn != nil {
		g.Go(func() error {
			defer l.conn.Close()
			<-ctx.Done()
			return nil
		})
		g.Go(func() error {
			b := make([]byte, relay.MaxFrame)
			for {
				n, from, err := l.conn.ReadFromUDPAddrPort(b)
				if err != nil {
					return nil
				}
				l.client.Receive(b[:n], from)
			}
		})
	}
	return g.Wait()
}

// intrusion is how far somebody got: the transport is empty when not in.
type intrusion struct{ Who, Transport, Err string }

// intrude tries to get into the relay of a mesh as its member, as a member of
// another mesh, and as that one with the member's credentials.
func (task lightTask) intrude(ctx context.Context) error {
	own, err := joinLight(ctx, task.Mesh, "own")
	if err != nil {
		return err
	}
	to, err := own.relay(ctx)
	if err != nil {
		return err
	}
	foreign, err := joinLight(ctx, task.Foreign, "foreign")
	if err != nil {
		return err
	}
	borrowed := *foreign
	borrowed.credentials = own.credentials
	var all []intrusion
	for _, udp := range []bool{true, false} {
		for name, who := range map[string]*light{"own": own, "foreign": foreign, "borrowed": &borrowed} {
			link, err := newLightLink(to, who, udp)
			if err != nil {
				return err
			}
			all = append(all, link.try(ctx, fmt.Sprintf("%s, udp %v", name, udp)))
		}
	}
	return json.NewEncoder(os.Stdout).Encode(all)
}

func (l *lightLink) try(ctx context.Context, who string) intrusion {
	ctx, cancel := context.WithTimeout(ctx, lightRefused)
	defer cancel()
	err := l.run(ctx)
	s, _ := l.look()
	return intrusion{who, s.Transport.String(), fmt.Sprint(errors.Join(err, s.Err))}
}

// crowd joins many members, then has some hold links over UDP with flows between
// all of them, and then others links over TLS.
func (task lightTask) crowd(ctx context.Context) error {
	overTLS, err := joinCrowd(ctx, task.Mesh, "t", task.TLS)
	if err != nil {
		return err
	}
	overUDP, err := joinCrowd(ctx, task.UDPMesh, "u", task.UDP)
	if err != nil {
		return err
	}
	to, err := overTLS[0].relay(ctx)
	if err != nil {
		return err
	}
	steps := bufio.NewReader(os.Stdin)
	if err := next(steps, "joined"); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, step := range []struct {
		who []*light
		udp bool
	}{{overUDP, true}, {overTLS, false}} {
		links, err := connectCrowd(ctx, g, to, step.who, step.udp)
		if err == nil {
			err = awaitCrowd(ctx, links, step.udp)
		}
		if err == nil {
			err = next(steps, fmt.Sprintf("udp %v", step.udp))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// next says what is done and waits.
func next(steps *bufio.Reader, done string) error {
	fmt.Println(done)
	_, err := steps.ReadString('\n')
	if errors.Is(err, io.EOF) {
		return errors.New("the test is gone")
	}
	return err
}

func joinCrowd(ctx context.Context, invite, name string, count int) ([]*light, error) {
	all := make([]*light, count)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(lightJoins)
	for i := range all {
		g.Go(func() (err error) {
			all[i], err = joinLight(ctx, invite, fmt.Sprintf("%s%d", name, i))
			return err
		})
	}
	return all, g.Wait()
}

// connectCrowd starts a link each; those over UDP want flows to all others.
func connectCrowd(ctx context.Context, g *errgroup.Group, to *target, who []*light, udp bool) ([]*lightLink, error) {
	var links []*lightLink
	for _, one := range who {
		link, err := newLightLink(to, one, udp)
		if err != nil {
			return nil, err
		}
		if udp {
			var peers []punch.Key
			for _, other := range who {
				if other != one {
					peers = append(peers, other.public)
				}
			}
			link.client.SetPeers(peers)
		}
		links = append(links, link)
		g.Go(func() error { return link.run(ctx) })
	}
	return links, nil
}

func awaitCrowd(ctx context.Context, links []*lightLink, udp bool) error {
	want, peers := relay.TLS, 0
	if udp {
		want, peers = relay.UDP, len(links)-1
	}
	for start := time.Now(); ; time.Sleep(statusPoll) {
		ready, flows := 0, 0
		var last error
		for _, l := range links {
			s, here := l.look()
			if s.Transport == want && here == peers {
				ready++
			} else {
				last = s.Err
			}
			flows += here
		}
		if ready == len(links) {
			return nil
		}
		if ctx.Err() != nil || time.Since(start) > lightWait {
			return fmt.Errorf("after %v %d of %d clients are there over %v, with %d ends of flows: %w", time.Since(start), ready, len(links), want, flows, last)
		}
	}
}

// startLight runs this program so in a machine.
func startLight(t *testing.T, h *Host, task lightTask) (say func(), heard func() string) {
	t.Helper()
	text, err := json.Marshal(task)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := h.Command(t.Context(), self)
	cmd.Env = append(cmd.Env, envLight+"="+string(text))
	var complaint strings.Builder
	cmd.Stderr = &complaint
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewReader(out)
	heard = func() string {
		t.Helper()
		line, err := lines.ReadString('\n')
		if err != nil {
			err = errors.Join(err, cmd.Wait())
			t.Fatalf("the light members end: %v: %s", err, complaint.String())
		}
		return strings.TrimSpace(line)
	}
	return func() { io.WriteString(in, "\n") }, heard
}
