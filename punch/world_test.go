package punch

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun/v2"
)

// oneWay is the delay between any two, for datagrams and for signals.
const oneWay = 20 * time.Millisecond

// world is a network in which every node has an outer address; packets with a low
// TTL die on the way. It keeps a record of what was sent.
type world struct {
	t *testing.T

	mu         sync.Mutex
	nodes      []*node
	wires      []wire
	drop       func(wire) bool
	fail       func(wire) error // nil: the system sends everything
	delay      func(wire) time.Duration
	nearServer time.Duration              // by how much sooner its answers come
	carry      func(from, to *node) error // nil: signals arrive
	spare      bool                       // nodes have spare sockets
	speechless bool                       // nodes that join have no way to carry signals
	fathoms    bool                       // nodes that join search the MTUs of their paths
	signals    int
}

type wire struct {
	at       time.Time
	from, to netip.AddrPort
	ttl      int
	b        []byte
}

func (w wire) request() bool { return w.b[0] == 0 && w.b[1] == 1 }

type node struct {
	*Agent
	w      *world
	key    Key
	nonce  Nonce
	outer  netip.AddrPort
	other  netip.AddrPort // a second address
	online bool
	stop   func()

	// Guarded by the world's mutex.
	paths    []Path
	pathAt   []time.Time
	told     [][]Candidate
	activity Activity
	spare    int // sockets that are open
	looks    int
	doubts   []netip.AddrPort
	lost     []time.Time // when a peer said that it has no session
	mtus     []told      // MTUs of paths
	messages []string    // of SendMessage
}

// told is when something was told.
type told struct {
	at  time.Time
	mtu int
}

var (
	errNoCarrier = errors.New("no carrier")
	errLost      = errors.New("lost on the way") // which the sender does not learn
)

// stunAddr is the server; it answers with the sender's outer address. To requests
// to its next port it answers as if a NAT had given them the next port, too.
func stunAddr() netip.AddrPort { return netip.MustParseAddrPort("198.51.100.1:3478") }

func nextPort(addr netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(addr.Addr(), addr.Port()+1)
}

func inWorld(t *testing.T, f func(*world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t}
		defer func() {
			for _, n := range w.nodes {
				n.stop()
			}
		}()
		f(w)
	})
}

// join starts a node with the given key byte.
func (w *world) join(b byte, outer string, forbidden ...netip.AddrPort) *node {
	n := &node{w: w, nonce: Nonce{b}, outer: netip.MustParseAddrPort(outer), online: true}
	private, key := keyPair(w.t, b)
	n.key = key
	var onMTU func(Path)
	if w.fathoms {
		onMTU = n.onMTU
	}
	config := Config{
		PrivateKey:   [32]byte(private.Bytes()),
		Nonces:       [2]Nonce{n.nonce, {b, 1}},
		OnMTU:        onMTU,
		Send:         n.send,
		Signal:       n.signal,
		OnPath:       n.onPath,
		OnCandidates: n.onCandidates,
		Activity:     n.count,
		OnDoubt: func(addr netip.AddrPort) {
			w.mu.Lock()
			defer w.mu.Unlock()
			n.doubts = append(n.doubts, addr)
		},
		OnSessionLost: func(Key) {
			w.mu.Lock()
			defer w.mu.Unlock()
			n.lost = append(n.lost, time.Now())
		},
		OnMessage: func(_ Key, b []byte) {
			w.mu.Lock()
			defer w.mu.Unlock()
			n.messages = append(n.messages, string(b))
		},
		Forbidden: func(a netip.AddrPort) bool { return a == stunAddr() || overRelay(a) || slices.Contains(forbidden, a) },
	}
	if w.speechless {
		config.Signal = nil
	}
	if w.spare {
		config.OpenSockets, config.CloseSockets = n.openSockets, n.closeSockets
	}
	a, err := New(config)
	if err != nil {
		w.t.Fatal(err)
	}
	n.Agent = a
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := a.Run(ctx); err != nil {
			w.t.Error(err)
		}
	})
	n.stop = func() { cancel(); running.Wait() }
	w.mu.Lock()
	w.nodes = append(w.nodes, n)
	w.mu.Unlock()
	return n
}

// gathered is join with a STUN server that has answered.
func (w *world) gathered(b byte, outer string) *node {
	n := w.join(b, outer)
	n.SetServers([]Server{{Addr: stunAddr(), Username: []byte{b}, Key: []byte("secret")}})
	rest(100 * time.Millisecond)
	return n
}

// info is what the netmap says of n.
func (n *node) info() Peer {
	return Peer{Key: n.key, Nonce: n.nonce, Online: n.online, Candidates: []Candidate{{Addr: n.outer, Type: ServerReflexive}}}
}

// rest sleeps, and lets what is due then happen.
func rest(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// meet tells two nodes of each other.
func meet(a, b *node) {
	a.SetPeer(b.info())
	b.SetPeer(a.info())
}

func (n *node) send(b []byte, to, from netip.AddrPort, ttl int) error {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	x := wire{at: time.Now(), from: n.outer, to: to, ttl: ttl, b: bytes.Clone(b)}
	if from.Addr().IsValid() && from.Addr() == n.other.Addr() {
		x.from = n.other
	}
	if from.Port() != 0 {
		x.from = netip.AddrPortFrom(n.outer.Addr(), from.Port())
	}
	if overRelay(to) {
		x.from = n.handle(int(to.Port()) - firstHandle)
	}
	if w.fail != nil {
		if err := w.fail(x); err != nil {
			return err
		}
	}
	w.wires = append(w.wires, x)
	if ttl != 0 || w.drop != nil && w.drop(x) {
		return nil
	}
	delay := oneWay
	if w.delay != nil {
		delay = w.delay(x)
	}
	time.AfterFunc(delay, func() { w.arrive(n, x) })
	return nil
}

func (w *world) arrive(from *node, x wire) {
	if x.to.Addr() == stunAddr().Addr() {
		reply := serverAnswer(w.t, x)
		at := netip.AddrPortFrom(x.from.Addr(), 0)
		if x.from != from.outer && x.from != from.other {
			at = x.from // a spare socket
		}
		time.AfterFunc(oneWay-w.nearServer, func() { from.Receive(reply, x.to, at) })
		return
	}
	w.mu.Lock()
	i := slices.IndexFunc(w.nodes, func(n *node) bool {
		return x.to == n.outer || x.to == n.other || overRelay(x.to) && x.to.Addr() == n.handle(0).Addr()
	})
	w.mu.Unlock()
	if i >= 0 {
		w.nodes[i].Receive(x.b, x.from, netip.AddrPortFrom(x.to.Addr(), 0))
	}
}

// move gives n another address.
func (n *node) move(addr string) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.outer = netip.MustParseAddrPort(addr)
}

// alias gives n a second address, which its system never chooses by itself.
func (n *node) alias(addr netip.AddrPort) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.other = addr
}

// serverAnswer is what the coordination server does.
func serverAnswer(t *testing.T, x wire) []byte {
	m, err := decodeServer(x.b)
	if err != nil {
		t.Errorf("request: %v", err)
	}
	if err := stun.MessageIntegrity("secret").Check(m); err != nil {
		t.Errorf("request: %v", err)
	}
	mapped := x.from
	if x.to == nextPort(stunAddr()) {
		mapped = nextPort(mapped)
	}
	reply, err := stun.Build(m, stun.BindingSuccess,
		&stun.XORMappedAddress{IP: mapped.Addr().AsSlice(), Port: int(mapped.Port())},
		stun.RawAttribute{Type: AttrToken, Value: []byte(x.from.String())},
		stun.MessageIntegrity("secret"))
	if err != nil {
		t.Error(err)
	}
	if len(reply.Raw) > len(x.b) {
		t.Errorf("an answer of %d bytes to a request of %d", len(reply.Raw), len(x.b))
	}
	return reply.Raw
}

func decodeServer(b []byte) (*stun.Message, error) {
	m := &stun.Message{Raw: bytes.Clone(b)}
	return m, m.Decode()
}

func (n *node) signal(to Key, sealed []byte) error {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.signals++
	i := slices.IndexFunc(w.nodes, func(n *node) bool { return n.key == to })
	if i < 0 {
		return errNoCarrier
	}
	peer := w.nodes[i]
	if w.carry != nil {
		if err := w.carry(n, peer); errors.Is(err, errLost) {
			return nil
		} else if err != nil {
			return err
		}
	}
	time.AfterFunc(oneWay, func() {
		if err := peer.HandleSignal(n.key, sealed); err != nil && !errors.Is(err, errSignalStale) && !errors.Is(err, errUnknownPeer) {
			w.t.Error(err)
		}
	})
	return nil
}

// signalTo has a node, hostile or not, say something to another one by itself.
func (n *node) signalTo(to *node, s signal) {
	n.mu.Lock()
	p := n.peers[to.key]
	p.counter++
	s.boot, s.counter, s.nonce = n.boot, p.counter, n.nonce
	sealed := p.secrets.seal(s.marshal())
	n.mu.Unlock()
	if err := to.HandleSignal(n.key, sealed); err != nil && !errors.Is(err, errSignalStale) {
		n.w.t.Error(err)
	}
}

func (n *node) onPath(p Path) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.paths = append(n.paths, p)
	n.pathAt = append(n.pathAt, time.Now())
}

func (n *node) onMTU(p Path) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.mtus = append(n.mtus, told{time.Now(), p.MTU})
}

// toldMTUs returns what was told since a time.
func (n *node) toldMTUs(since time.Time) []told {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(n.mtus), func(x told) bool { return x.at.Before(since) })
}

func (n *node) onCandidates(list []Candidate) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.told = append(n.told, list)
}

func (n *node) count(Key) Activity {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.looks++
	return n.activity
}

// talk counts data for d: what flows out of n, and what comes in.
func (n *node) talk(to *node, d time.Duration, heard bool) {
	n.Demand(to.key)
	for end := time.Now().Add(d); time.Now().Before(end); rest(20 * time.Millisecond) {
		n.w.mu.Lock()
		n.activity.Sent++
		if heard {
			n.activity.Received++
		}
		n.w.mu.Unlock()
	}
}

// between returns what went from one address to another since a time.
func (w *world) between(from, to netip.AddrPort, since time.Time) []wire {
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []wire
	for _, x := range w.wires {
		if x.from == from && x.to == to && !x.at.Before(since) {
			found = append(found, x)
		}
	}
	return found
}

// all returns everything that was sent.
func (w *world) all() []wire {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.wires)
}

// talked returns how many signals were sent.
func (w *world) talked() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.signals
}

func (n *node) toldPaths() []Path {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return slices.Clone(n.paths)
}

// toldAt returns when the i-th path was told.
func (n *node) toldAt(i int) time.Time {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.pathAt[i]
}

func (n *node) toldLists() [][]Candidate {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return slices.Clone(n.told)
}

func (w *world) setDrop(drop func(wire) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop = drop
}

// setFail has the system of every node refuse to send.
func (w *world) setFail(fail func(wire) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail = fail
}

func (w *world) setCarry(carry func(from, to *node) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.carry = carry
}

// wantOpenedFirst wants b to send at full TTL only after a has opened its NAT.
func (w *world) wantOpenedFirst(a, b *node, since time.Time) {
	w.t.Helper()
	opened := w.between(a.outer, b.outer, since)[0].at
	for _, x := range w.between(b.outer, a.outer, since) {
		if x.ttl == 0 && x.at.Before(opened) {
			w.t.Errorf("full TTL at %v, opened at %v", x.at.Sub(since), opened.Sub(since))
		}
	}
}

// wantPath wants the path of n to peer to lead to an address.
func (n *node) wantPath(peer *node, addr netip.AddrPort) {
	n.w.t.Helper()
	if path, ok := n.Path(peer.key); path.Addr != addr || ok != addr.IsValid() {
		n.w.t.Errorf("path leads to %v, want %v", path.Addr, addr)
	}
}
