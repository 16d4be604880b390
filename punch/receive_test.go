package punch

import (
	"bytes"
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pion/stun/v2"
)

// TestGather looks at requests, retransmissions, tokens and what is told.
func TestGather(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.join(1, outerA)
		w.setDrop(func(x wire) bool { return len(w.wires) < 3 })
		begin := time.Now()
		a.SetServers([]Server{{Addr: stunAddr(), Username: []byte{1}, Key: []byte("secret")}})
		rest(time.Second)
		var offsets []time.Duration
		for _, x := range w.between(a.outer, stunAddr(), begin) {
			offsets = append(offsets, x.at.Sub(begin))
		}
		if want := []time.Duration{0, 100 * time.Millisecond, 300 * time.Millisecond}; !slices.Equal(offsets, want) {
			t.Errorf("requests after %v, want %v", offsets, want)
		}
		if len(a.toldLists()) != 1 || len(a.toldLists()[0]) != 1 {
			t.Fatalf("told %v", a.toldLists())
		}
		if c := a.toldLists()[0][0]; c.Addr != a.outer || c.Type != ServerReflexive || string(c.Token) != outerA {
			t.Errorf("told %v", c)
		}
		begin = time.Now()
		rest(time.Hour)
		if n := len(w.between(a.outer, stunAddr(), begin)); n < 48 || n > 60 {
			t.Errorf("%d requests in an idle hour", n)
		}
		if len(a.toldLists()) != 1 {
			t.Errorf("told %d times", len(a.toldLists()))
		}
		a.move("203.0.113.8:8")
		a.NetworkChanged()
		rest(100 * time.Millisecond)
		if last := a.toldLists()[len(a.toldLists())-1]; len(last) != 1 || last[0].Addr != a.outer {
			t.Errorf("told %v", last)
		}
		a.SetServers(nil)
		rest(100 * time.Millisecond)
		if last := a.toldLists()[len(a.toldLists())-1]; len(last) != 0 {
			t.Errorf("told %v without servers", last)
		}
	})
}

// TestRestlessNetwork reports changes without end: requests stay within the rate,
// and the last change is not forgotten.
func TestRestlessNetwork(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.gathered(1, outerA)
		w.setDrop(func(wire) bool { return true })
		for range 500 {
			a.NetworkChanged()
			rest(10 * time.Millisecond)
		}
		w.setDrop(nil)
		a.move("203.0.113.8:8")
		a.NetworkChanged()
		rest(time.Second)
		if got := a.Candidates(); len(got) != 1 || got[0].Addr != a.outer {
			t.Errorf("candidates %v", got)
		}
		var at []time.Time
		for _, x := range w.all() {
			at = append(at, x.at)
		}
		if n := most(at); n > pairRate {
			t.Errorf("%d requests in a second", n)
		}
	})
}

// TestForgedMapping sends answers that are not the server's.
func TestForgedMapping(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.join(1, outerA)
		w.setDrop(func(wire) bool { return true })
		a.SetServers([]Server{{Addr: stunAddr(), Username: []byte{1}, Key: []byte("secret")}})
		rest(time.Millisecond)
		request := w.all()[0]
		good := serverAnswer(t, request)
		a.Receive(good, netip.MustParseAddrPort("198.51.100.9:3478"), netip.AddrPort{})
		a.Receive(mutate(good, 8), stunAddr(), netip.AddrPort{})           // transaction id
		a.Receive(mutate(good, len(good)-1), stunAddr(), netip.AddrPort{}) // integrity
		a.Receive(good[:len(good)-24], stunAddr(), netip.AddrPort{})
		m, err := stun.Build(stun.NewTransactionIDSetter(transactionID(request.b[8:20])), stun.BindingSuccess,
			&stun.XORMappedAddress{IP: []byte{203, 0, 113, 9}, Port: 9})
		if err != nil {
			t.Fatal(err)
		}
		a.Receive(m.Raw, stunAddr(), netip.AddrPort{}) // no integrity
		if got := a.Candidates(); len(got) > 0 {
			t.Fatalf("candidates %v", got)
		}
		a.Receive(good, stunAddr(), netip.AddrPort{})
		if got := a.Candidates(); len(got) != 1 {
			t.Errorf("candidates %v after the answer", got)
		}
		a.Receive(good, stunAddr(), netip.AddrPort{})
		rest(time.Second) // the round is over
		if n := len(w.all()); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

func mutate(b []byte, i int) []byte {
	b = bytes.Clone(b)
	b[i] ^= 1
	return b
}

// TestUnverifiedAddress lets a check of the peer arrive from an address that never
// answers: it gets one answer and one check; a copy of it gets nothing.
func TestUnverifiedAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		victim := netip.MustParseAddrPort("203.0.113.66:6666")
		fresh := b.checkFor(t, a)
		a.Receive(mutate(fresh, len(fresh)-1), victim, netip.AddrPort{})
		a.Receive(mutate(fresh, 26), victim, netip.AddrPort{}) // user name
		if n := len(w.between(a.outer, victim, time.Time{})); n > 0 {
			t.Fatalf("%d packets in reply to forgeries", n)
		}
		for range 3 {
			a.Receive(fresh, victim, netip.AddrPort{})
		}
		rest(3 * time.Second)
		sent := w.between(a.outer, victim, time.Time{})
		if len(sent) != 2 || requests(sent) != 1 {
			t.Errorf("%d packets, %d of them checks", len(sent), requests(sent))
		}
		for _, x := range sent {
			if len(x.b) > len(fresh) {
				t.Errorf("%d bytes in reply to %d", len(x.b), len(fresh))
			}
		}
		a.wantPath(b, b.outer)
	})
}

// TestAddressLimits floods an agent with fresh checks of a peer from one address
// and many ports.
func TestAddressLimits(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		victim := netip.MustParseAddr("203.0.113.66")
		var at []time.Time
		for i := range 3000 {
			a.Receive(b.checkFor(t, a), netip.AddrPortFrom(victim, uint16(1+i%40)), netip.AddrPort{})
			rest(time.Millisecond)
		}
		perPort := map[netip.AddrPort][]time.Time{}
		for _, x := range w.all() {
			if x.to.Addr() == victim {
				at = append(at, x.at)
				perPort[x.to] = append(perPort[x.to], x.at)
			}
		}
		if n := most(at); n > addressRate || n < addressRate/2 {
			t.Errorf("%d packets to an address in a second", n)
		}
		for to, at := range perPort {
			if n := most(at); n > pairRate {
				t.Errorf("%d packets to %v in a second", n, to)
			}
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if n := len(a.peers[b.key].pairs); n > MaxCandidates {
			t.Errorf("%d candidates", n)
		}
	})
}

// most returns the largest number of events in a second.
func most(at []time.Time) int {
	best, first := 0, 0
	for i := range at {
		for at[i].Sub(at[first]) >= time.Second {
			first++
		}
		best = max(best, i-first+1)
	}
	return best
}

// checkFor builds a fresh check of n for another node.
func (n *node) checkFor(t testing.TB, to *node) []byte {
	t.Helper()
	n.Agent.mu.Lock()
	defer n.Agent.mu.Unlock()
	p := n.peers[to.key]
	p.counter++
	c := check{id: stun.NewTransactionID(), user: p.name, boot: n.boot, counter: p.counter}
	b, err := c.marshal(p.secrets.check)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSignalsRefused(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := connected(w)
		b.Agent.mu.Lock()
		p := b.peers[a.key]
		seal := func(s signal) []byte { return p.secrets.seal(s.marshal()) }
		fresh := seal(signal{kind: signalOpened, boot: b.boot, counter: p.counter + 100})
		older := seal(signal{kind: signalOpened, boot: b.boot, counter: p.counter + 99})
		b.Agent.mu.Unlock()
		for name, sealed := range map[string][]byte{
			"empty": nil, "short": make([]byte, 23), "long": make([]byte, MaxSignal+1), "damaged": mutate(fresh, 30),
		} {
			if err := a.HandleSignal(b.key, sealed); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
		if err := a.HandleSignal(Key{9}, fresh); err == nil {
			t.Error("unknown peer: accepted")
		}
		if err := a.HandleSignal(b.key, fresh); err != nil {
			t.Errorf("fresh: %v", err)
		}
		for name, sealed := range map[string][]byte{"repeated": fresh, "overtaken": older} {
			if err := a.HandleSignal(b.key, sealed); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	})
}

// fuzzAgents returns two agents that know each other and do not run.
func fuzzAgents(f *testing.F) (a, b *node, sends *int) {
	f.Helper()
	sends = new(int)
	nodes := make([]*node, 2)
	for i := range nodes {
		private, key := keyPair(f, byte(i+1))
		agent, err := New(Config{
			PrivateKey: [32]byte(private.Bytes()),
			Nonces:     [2]Nonce{{byte(i + 1)}, {byte(i + 1), 1}},
			Send:       func([]byte, netip.AddrPort, netip.AddrPort, int) error { *sends++; return nil },
		})
		if err != nil {
			f.Fatal(err)
		}
		nodes[i] = &node{Agent: agent, key: key, nonce: Nonce{byte(i + 1)}}
	}
	a, b = nodes[0], nodes[1]
	a.outer, b.outer = netip.MustParseAddrPort(outerA), netip.MustParseAddrPort(outerB)
	a.SetPeer(b.info())
	b.SetPeer(a.info())
	return a, b, sends
}

// FuzzReceive wants nothing sent and no state for bytes that are not the peer's.
func FuzzReceive(f *testing.F) {
	a, b, sends := fuzzAgents(f)
	known := b.checkFor(f, a)
	f.Add(known)
	f.Add(mutate(known, 30))
	if reply, err := answer(transactionID{1}, a.outer, []byte("key")); err == nil {
		f.Add(reply)
	}
	request, err := Server{Username: []byte{1}, Key: []byte("k")}.marshal(transactionID{2})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(request)
	padded := check{user: b.peers[a.key].name, boot: b.boot, counter: 1 << 40, size: 1432}
	if long, err := padded.marshal(b.peers[a.key].secrets.check); err == nil {
		f.Add(long)
		f.Add(mutate(long, stunHeader+3))
		f.Add(long[:1000])
	}
	f.Fuzz(func(t *testing.T, x []byte) {
		before := *sends
		from := netip.MustParseAddrPort("203.0.113.66:6666")
		a.Receive(x, from, netip.AddrPort{})
		if *sends != before && !authentic(a, b, x) {
			t.Fatal("a reply to what the peer did not send")
		}
	})
}

// authentic reports whether b made a check for a.
func authentic(a, b *node, x []byte) bool {
	m, err := decode(x)
	if err != nil {
		return false
	}
	c, err := checkOf(m)
	p := b.peers[a.key]
	return err == nil && c.user == p.name && stun.MessageIntegrity(p.secrets.check).Check(m) == nil
}

// FuzzHandleSignal feeds sealed and unsealed bytes.
func FuzzHandleSignal(f *testing.F) {
	a, b, _ := fuzzAgents(f)
	f.Add(exampleSignal().marshal(), uint64(1))
	f.Add([]byte{1, 2, 3}, uint64(2))
	f.Fuzz(func(t *testing.T, x []byte, counter uint64) {
		if a.HandleSignal(b.key, x) == nil {
			t.Fatal("unsealed bytes accepted")
		}
		if len(x) > MaxSignal-64 {
			return
		}
		// An error is as good as none: the peer may write what it likes.
		_ = a.HandleSignal(b.key, b.peers[a.key].secrets.seal(x))
		if s, err := parseSignal(x); err == nil {
			s.boot, s.counter = b.boot, counter
			_ = a.HandleSignal(b.key, b.peers[a.key].secrets.seal(s.marshal()))
		}
		a.turn(time.Now())
		p := a.peers[b.key]
		if len(p.pairs) > MaxCandidates {
			t.Fatalf("%d candidates", len(p.pairs))
		}
		for _, q := range p.pairs {
			if !probeable(q.addr) {
				t.Fatalf("candidate %v", q.addr)
			}
		}
	})
}

func TestRunEnds(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.join(1, outerA)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := a.Run(ctx); err != nil {
			t.Error(err)
		}
	})
}
