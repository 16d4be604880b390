package overlay

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord"
	"overlay/punch"
	"overlay/punch/relay"
)

// whyWorld is alice's session, whose UDP a server answers as long as it passes; bob is
// a peer.
type whyWorld struct {
	*linksWorld
	s   *session
	bob testNode
	cut atomic.Bool
}

func newWhyWorld(t *testing.T) *whyWorld {
	m := newTestMesh(t)
	alice := m.node("alice", m.signer)
	w := &whyWorld{linksWorld: newLinksWorld(t), bob: m.node("bob", m.signer)}
	s := &session{
		roster: m.roster(alice), self: alice.cert, settings: &settings{}, links: w.links, online: true,
		log: slog.New(slog.DiscardHandler), change: make(chan struct{}),
	}
	w.s = s
	s.roster.apply(&coord.Netmap{Nodes: []coord.Node{w.bob.node}}, true)
	s.agent = must[*punch.Agent](t)(punch.New(punch.Config{
		PrivateKey: alice.w, Mesh: m.hash,
		Signal: func(punch.Key, []byte) error { return nil },
		Send: func(b []byte, to, _ netip.AddrPort, _ int) error {
			seen := netip.MustParseAddrPort("203.0.113.1:41641")
			answer := punch.AnswerBinding(b, seen, func([]byte) (key, token []byte, ok bool) { return nil, nil, true })
			if answer != nil && to == relayAddr("server0") && !w.cut.Load() {
				go s.agent.Receive(answer, to, netip.AddrPort{})
			}
			return nil
		},
	}))
	go func() { _ = s.agent.Run(t.Context()) }()
	s.agent.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.1.2/24")}, 41641)
	s.agent.SetPeer(punch.Peer{Key: w.key(), Online: true})
	w.members(nil, linkPeer{key: w.key(), online: true})
	w.server()
	synctest.Wait()
	return w
}

func (w *whyWorld) key() punch.Key { return punch.Key(w.bob.w.PublicKey()) }

// ask has the server asked for our address.
func (w *whyWorld) ask() {
	w.s.agent.SetServers([]punch.Server{{Addr: relayAddr("server0")}})
	time.Sleep(50 * ms)
	synctest.Wait()
}

func (w *whyWorld) tls() {
	w.state("server0", relay.State{Transport: relay.TLS, RTT: 12 * ms, Err: errors.New("no answer")})
}

// explain is what why says, and its steps by name.
func (w *whyWorld) explain() (Why, map[string]WhyStep) {
	w.t.Helper()
	why := must[Why](w.t)(w.s.why("bob", true))
	steps := map[string]WhyStep{}
	for _, s := range why.Steps {
		steps[s.Name] = s
	}
	return why, steps
}

// wantStep wants one step to be in a state, with words in it.
func (w *whyWorld) wantStep(name, state, text string) {
	w.t.Helper()
	_, steps := w.explain()
	if s := steps[name]; s.State != state || !strings.Contains(s.Text, text) {
		w.t.Errorf("step %s: %q %q, want %q %q", name, s.State, s.Text, state, text)
	}
}

func inWhyWorld(t *testing.T, do func(*whyWorld)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWhyWorld(t)
		defer w.end()
		do(w)
	})
}

// What a server answered before UDP was cut tells nothing of now.
func TestWhyAfterUDPIsCut(t *testing.T) {
	inWhyWorld(t, func(w *whyWorld) {
		w.up("server0", 10*ms)
		w.ask()
		w.wantStep(stepUDPHere, stepOK, "answer over UDP")
		w.cut.Store(true)
		time.Sleep(2 * time.Second)
		w.tls()
		for _, wait := range []time.Duration{5 * time.Second, 95 * time.Second} {
			time.Sleep(wait)
			why, _ := w.explain()
			if why.Here.UDP != udpBlocked || why.Failed != stepUDPHere {
				t.Errorf("after %s: UDP here %q, failed %q", wait, why.Here.UDP, why.Failed)
			}
			w.wantStep(stepUDPHere, stepFailed, "no server answers over UDP: no answer for ")
		}
	})
}

// TLS that answers first does not mean that UDP is blocked.
func TestTLSMayBeFirst(t *testing.T) {
	inWhyWorld(t, func(w *whyWorld) {
		time.Sleep(200 * ms)
		w.tls()
		why, _ := w.explain()
		if why.Here.UDP != "" || strings.Contains(why.Verdict, "passes no UDP") || w.s.networkText() != "" {
			t.Errorf("at once: %q, %q, %q", why.Here.UDP, why.Verdict, w.s.networkText())
		}
		time.Sleep(udpSilence)
		if why, _ := w.explain(); why.Here.UDP != udpBlocked || !strings.Contains(w.s.networkText(), "passes no UDP") {
			t.Errorf("later: %q, %q", why.Here.UDP, w.s.networkText())
		}
		w.ask() // a server answers, whatever the relay does
		if why, _ := w.explain(); why.Here.UDP != udpPasses {
			t.Errorf("answered: %q", why.Here.UDP)
		}
	})
}

// What the server said before it was lost is said to be old.
func TestWhyAfterTheServerDied(t *testing.T) {
	inWhyWorld(t, func(w *whyWorld) {
		w.up("server0", 10*ms)
		w.ask()
		w.wantStep(stepPeer, stepOK, "bob is connected to the server")
		w.cut.Store(true)
		time.Sleep(2 * time.Second)
		w.state("server0", relay.State{Err: errors.New("no answer")})
		w.s.connection(errors.New("no answer"))
		time.Sleep(30 * time.Second)
		w.wantStep(stepServer, stepFailed, "not connected")
		w.wantStep(stepPeer, "", "bob was connected, as the server said last")
		w.wantStep(stepUDPHere, "", "not known: no answer for 32 s")
	})
}

// A direct path over TCP is shown as what it is.
func TestWhyOverTCP(t *testing.T) {
	inWhyWorld(t, func(w *whyWorld) {
		time.Sleep(200 * ms)
		w.tls()
		time.Sleep(udpSilence)
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		stream := tcpStream{relay.NewStream(near, w.s.log), netip.MustParseAddrPort("192.168.1.2:5000"), netip.MustParseAddrPort("198.51.100.2:38823")}
		w.links.setTCP(w.key(), maxLinkID, stream)
		synctest.Wait()
		w.s.agent.SetRelays(w.key(), []punch.Relay{{Addr: handle(w.key(), maxLinkID), Here: true}})
		w.s.agent.Demand(w.key())
		synctest.Wait()
		why, _ := w.explain()
		if why.Path.Via != viaTCP || why.Path.Endpoint != "198.51.100.2:38823" || why.Failed != "" {
			t.Errorf("path %+v, failed %q", why.Path, why.Failed)
		}
		if len(why.Pairs) != 1 || why.Pairs[0].Kind != viaTCP || why.Pairs[0].Remote != "198.51.100.2:38823" || why.Pairs[0].Relay != "" {
			t.Errorf("pairs %+v", why.Pairs)
		}
		w.wantStep(stepTCP, stepOK, "carries all")
		for _, name := range []string{stepCandidates, stepChecks} {
			w.wantStep(name, "", "over UDP: ")
		}
		for _, p := range must[Why](t)(w.s.why("bob", false)).Pairs {
			if p.Remote != "" || p.Kind != viaTCP {
				t.Errorf("told to others: %+v", p)
			}
		}
	})
}

// pathKind is what status shows of the path to bob.
func (w *whyWorld) pathKind() string {
	m := must[*member](w.t)(w.s.find("bob"))
	e, _ := w.s.agent.Explain(w.key())
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.s.describe(m, e.Path, false).Kind
}

// A peer that the server calls offline is not shown at a relay, unless it answers there.
func TestStatusOfAPeerThatWent(t *testing.T) {
	inWhyWorld(t, func(w *whyWorld) {
		w.up("server0", 10*ms)
		w.links.onPeer(w.fake("server0").link, w.key(), true)
		synctest.Wait()
		at := handle(w.key(), 1)
		w.s.agent.SetRelays(w.key(), []punch.Relay{{Addr: at, Here: true}})
		synctest.Wait()
		if got := w.pathKind(); got != "relay" {
			t.Errorf("online: %q", got)
		}
		gone := w.bob.node
		gone.Online = false
		w.s.roster.apply(&coord.Netmap{Nodes: []coord.Node{gone}}, false)
		if got := w.pathKind(); got != "none" {
			t.Errorf("offline: %q", got)
		}
		if why, _ := w.explain(); why.Path.Kind != "none" || !strings.Contains(why.Verdict, "bob is not connected") {
			t.Errorf("offline: %+v, %q", why.Path, why.Verdict)
		}
	})
	now := time.Now()
	for _, x := range []struct {
		pair punch.PairReport
		want bool
	}{
		{punch.PairReport{Type: punch.Relayed, LastHeard: now.Add(-30 * time.Second)}, true},
		{punch.PairReport{Type: punch.Relayed, LastAnswer: now.Add(-50 * time.Second)}, false},
		{punch.PairReport{Type: punch.Relayed, LastAnswer: now, State: punch.PairBarred, Obstacle: punch.NotAtRelay}, false},
		{punch.PairReport{Type: punch.Host, State: punch.PairValid}, true},
		{punch.PairReport{Type: punch.Host, State: punch.PairSuspect}, false},
	} {
		x.pair.Selected = true
		if got := alive(false, punch.Explanation{Pairs: []punch.PairReport{x.pair}}, now); got != x.want {
			t.Errorf("%+v: alive %v", x.pair, got)
		}
	}
}
