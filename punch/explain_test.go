package punch

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// reportOf is what n says of the pair with an address.
func (n *node) reportOf(peer *node, addr netip.AddrPort) PairReport {
	n.w.t.Helper()
	e, ok := n.Explain(peer.key)
	if !ok {
		n.w.t.Fatal("no such peer")
	}
	i := slices.IndexFunc(e.Pairs, func(r PairReport) bool { return r.Remote == addr })
	if i < 0 {
		n.w.t.Fatalf("no pair with %v in %+v", addr, e.Pairs)
	}
	return e.Pairs[i]
}

func TestExplainUnknownPeer(t *testing.T) {
	inWorld(t, func(w *world) {
		if e, ok := w.join(1, outerA).Explain(Key{7}); ok {
			t.Errorf("explains nobody: %+v", e)
		}
	})
}

// TestExplainDirect wants the path, since when, and what it beat.
func TestExplainDirect(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		relays(a, b, 1)
		meet(a, b)
		relays(a, b, 1)
		start := time.Now()
		rest(2 * time.Second)
		e, _ := a.Explain(b.key)
		if e.Path.Addr != b.outer || e.Before.Addr != b.handle(0) || e.Attempt != (Attempt{}) {
			t.Errorf("path %+v before it %+v, attempt %+v", e.Path, e.Before, e.Attempt)
		}
		if e.Since.Before(start) || time.Since(e.Since) < time.Second {
			t.Errorf("chosen %v ago", time.Since(e.Since))
		}
		if e.Signals.Sent == 0 || e.Signals.Heard == 0 || e.Signals.Err != nil {
			t.Errorf("signals %+v", e.Signals)
		}
		r := a.reportOf(b, b.outer)
		if r.State != PairValid || !r.Selected || r.Obstacle != "" || r.RTT != 2*oneWay || r.Type != ServerReflexive {
			t.Errorf("pair %+v", r)
		}
		if r.Openers != 1 || r.Checks < 3 || r.Answers < 3 || r.Heard == 0 || r.Answers > r.Checks {
			t.Errorf("counts %+v", r)
		}
		if r.First.Before(start) || r.Last.Before(r.First) || !slices.Equal(r.From, []Source{Published, Signalled, Learnt}) {
			t.Errorf("times and sources %+v", r)
		}
		if r := a.reportOf(b, b.handle(0)); r.State != PairUntried && r.State != PairValid || r.Type != Relayed {
			t.Errorf("relay %+v", r)
		}
	})
}

// TestExplainSilence wants what was sent when nothing comes back.
func TestExplainSilence(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		rest(2 * time.Second)
		e, _ := a.Explain(b.key)
		if e.Path.Type != Relayed || e.Attempt.Calls == 0 || e.Retry.IsZero() {
			t.Errorf("%+v", e)
		}
		r := a.reportOf(b, b.outer)
		if r.State != PairSilent || r.Openers == 0 || r.Checks < 6 || r.Answers+r.Heard != 0 || r.RTT != 0 || !r.LastAnswer.IsZero() {
			t.Errorf("pair %+v", r)
		}
	})
}

// TestExplainObstacles wants every reason why nothing is sent.
func TestExplainObstacles(t *testing.T) {
	inWorld(t, func(w *world) {
		banned := netip.MustParseAddrPort("203.0.113.99:9")
		a, b := w.join(1, outerA, banned), w.join(2, outerB)
		a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.1.2/24")}, 41641)
		for addr, want := range map[string]Obstacle{
			"192.168.7.2:1":     OtherSite,
			"[2001:db8::1]:1":   OtherFamily,
			"203.0.113.99:9":    Forbidden,
			"192.168.1.2:41641": Unusable,
			"127.0.0.1:1":       Unusable,
		} {
			cand := Candidate{Addr: netip.MustParseAddrPort(addr), Type: Host, Token: []byte{1}}
			a.SetPeer(Peer{Key: b.key, Nonce: b.nonce, Online: true, Candidates: []Candidate{cand}})
			rest(time.Second)
			e, _ := a.Explain(b.key)
			if len(e.Pairs)+len(e.Refused) != 1 {
				t.Fatalf("%s: %d pairs and %d refusals", addr, len(e.Pairs), len(e.Refused))
			}
			if len(e.Pairs) == 1 && (e.Pairs[0].State != PairBarred || e.Pairs[0].Obstacle != want) {
				t.Errorf("%s: %+v, want %s", addr, e.Pairs[0], want)
			}
			if len(e.Refused) == 1 && (e.Refused[0].Obstacle != want || e.Refused[0].From != Published || e.Refused[0].Token != nil) {
				t.Errorf("%s: %+v, want %s", addr, e.Refused[0], want)
			}
		}
	})
}

// TestExplainHeld wants checks that wait for the peer's NAT to be said to.
func TestExplainHeld(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setCarry(func(_, _ *node) error { return errLost })
		a.SetPeer(b.info())
		rest(500 * time.Millisecond)
		r := a.reportOf(b, b.outer)
		if r.State != PairHeld || r.Obstacle != WaitsForPeer || r.Openers != 1 || r.Checks != 0 {
			t.Errorf("%+v", r)
		}
	})
}

// TestExplainErrors wants the system's refusal to send, until it sends again, and
// signals that nobody carries.
func TestExplainErrors(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		refused := errors.New("network is unreachable")
		w.setFail(func(x wire) error {
			if x.to == b.outer {
				return refused
			}
			return nil
		})
		w.setCarry(func(_, _ *node) error { return errNoCarrier })
		a.SetPeer(b.info())
		rest(2 * time.Second)
		r := a.reportOf(b, b.outer)
		if r.State != PairBarred || r.Obstacle != Unsendable || !errors.Is(r.Err, refused) {
			t.Errorf("%+v", r)
		}
		if e, _ := a.Explain(b.key); e.Signals.Failed == 0 || !errors.Is(e.Signals.Err, errNoCarrier) {
			t.Errorf("signals %+v", e.Signals)
		}
		w.setFail(nil)
		b.SetPeer(a.info())
		a.NetworkChanged()
		rest(2 * time.Second)
		if r := a.reportOf(b, b.outer); r.State != PairValid || r.Err != nil {
			t.Errorf("%+v", r)
		}
	})
}

// TestExplainForgets wants counts to begin anew with the network.
func TestExplainForgets(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := isolated(w, 1)
		before := a.reportOf(b, b.outer)
		rest(time.Second)
		a.NetworkChanged()
		if r := a.reportOf(b, b.outer); r.Openers+r.Checks != 0 || !r.First.IsZero() {
			t.Errorf("%+v after %+v", r, before)
		}
	})
}

func TestNetworkReport(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.join(1, outerA)
		a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.1.2/24")}, 41641)
		list := []Server{{Addr: stunAddr(), Username: []byte{1}, Key: []byte("secret")}, {Addr: nextPort(stunAddr()), Username: []byte{1}, Key: []byte("secret")}}
		a.SetServers(list)
		if n := a.Network(); len(n.Servers) != 2 || n.Servers[0].Fresh || !n.Servers[0].Asking {
			t.Errorf("at once: %+v", n)
		}
		rest(time.Second)
		n := a.Network()
		if n.Port != 41641 || len(n.Local) != 1 || len(n.Servers) != 2 {
			t.Fatalf("%+v", n)
		}
		for i, s := range n.Servers {
			want := a.outer
			if i == 1 {
				want = nextPort(want)
			}
			if s.Mapped != want || !s.Fresh || s.Asking || s.At.IsZero() {
				t.Errorf("%+v, want %v", s, want)
			}
		}
	})
}
