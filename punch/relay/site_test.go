package relay

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlay/punch"
)

// site is a server with a clock of its own, and who its members are.
type site struct {
	t testing.TB
	s *Server

	mu       sync.Mutex
	now      time.Time
	members  map[string]Identity
	looks    int    // calls of Verify
	onVerify func() // in Verify, after the look-up
}

func newSite(t testing.TB, cfg ServerConfig) *site {
	t.Helper()
	w := &site{t: t, now: time.Unix(1_000_000, 0), members: map[string]Identity{}}
	cfg.PrivateKey, cfg.Verify = [32]byte{9}, w.verify
	s, err := newServer(cfg, w.time)
	if err != nil {
		t.Fatal(err)
	}
	w.s = s
	return w
}

func (w *site) time() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *site) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

func (w *site) verify(credentials []byte) (Identity, error) {
	w.mu.Lock()
	id, ok := w.members[string(credentials)]
	w.looks++
	hook := w.onVerify
	w.mu.Unlock()
	if hook != nil {
		hook()
	}
	if !ok {
		return id, errors.New("nobody's credentials")
	}
	return id, nil
}

// remove makes a member a stranger.
func (w *site) remove(m *guest) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.members, m.credentials)
}

// guest is a node as the relay should see it.
type guest struct {
	w           *site
	key         punch.Key
	device      ed25519.PrivateKey
	credentials string
	session     session
	boot        uint64
	counter     uint64
	cookie      cookie
}

// stranger makes a node whose credentials nobody knows.
func (w *site) stranger(number int) *guest {
	w.t.Helper()
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], uint64(number)+1)
	private, err := ecdh.X25519().NewPrivateKey(seed[:])
	if err != nil {
		w.t.Fatal(err)
	}
	m := &guest{
		w: w, key: punch.Key(private.PublicKey().Bytes()), device: ed25519.NewKeyFromSeed(seed[:]),
		credentials: fmt.Sprintf("credentials of %d", number), boot: 1,
	}
	if m.session, err = nodeSession(private, w.s.PublicKey()); err != nil {
		w.t.Fatal(err)
	}
	return m
}

func (w *site) guest(number int) *guest {
	w.t.Helper()
	m := w.stranger(number)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.members[m.credentials] = Identity{m.public(), m.key}
	return m
}

func (m *guest) public() [32]byte { return [32]byte(m.device.Public().(ed25519.PublicKey)) }

func (m *guest) next() sequence {
	m.counter++
	return newSequence(m.boot, m.counter)
}

func (m *guest) hello() []byte { return (&hello{seq: m.next(), cookie: m.cookie}).build(&m.session) }

func (m *guest) trial() []byte {
	return (&hello{seq: m.next(), cookie: m.cookie, trial: true}).build(&m.session)
}

func (m *guest) open(peers ...*guest) []byte {
	o := open{seq: m.next()}
	for _, p := range peers {
		o.peers = append(o.peers, p.key)
	}
	return o.build(&m.session)
}

func (m *guest) admission() *admission {
	return &admission{hello: hello{seq: m.next(), cookie: m.cookie}, node: m.key, credentials: []byte(m.credentials)}
}

func (m *guest) admit() []byte { return m.build(m.admission()) }

func (m *guest) build(a *admission) []byte {
	b, err := a.build(&m.session, m.w.s.PublicKey(), m.device)
	if err != nil {
		m.w.t.Fatal(err)
	}
	return b
}

// place is the transport of an address.
func place(addr string) *transport {
	t := &transport{addr: netip.MustParseAddrPort(addr), size: unix.SizeofSockaddrInet4}
	binary.NativeEndian.PutUint16(t.name[:], unix.AF_INET)
	binary.BigEndian.PutUint16(t.name[sockaddrPort:], t.addr.Port())
	ip := t.addr.Addr().As4()
	copy(t.name[sockaddrAddr4:], ip[:])
	return t
}

// say hands the server a message from a place, as its loops do, and returns the
// reply, of which it makes sure that it amplifies nothing.
func (w *site) say(msg []byte, t *transport) (reply []byte) {
	w.t.Helper()
	if kindOf(msg) == kindAdmit {
		reply, _ = w.s.admit(msg, func(k cookie) bool { return w.s.cookies.valid(k, t.addr, w.s.clock()) }, t)
	} else {
		reply = w.s.control(nil, msg, t)
	}
	if len(reply) > len(msg) {
		w.t.Errorf("%d bytes answer %d", len(reply), len(msg))
	}
	return reply
}

// join admits a member at a place.
func (w *site) join(m *guest, t *transport) {
	w.t.Helper()
	c, ok := parseChallenge(w.say(m.hello(), t))
	if !ok {
		w.t.Fatal("no challenge")
	}
	m.cookie = c.cookie
	w.mustPong(m, m.admit(), t)
}

func (w *site) mustPong(m *guest, msg []byte, t *transport) {
	w.t.Helper()
	reply := w.say(msg, t)
	if p, ok := parsePong(reply); !ok || !m.session.sealed(reply) || p.observed != t.observed() {
		w.t.Fatalf("no pong, but % x", reply)
	}
}

// mustOpen opens flows and returns the bitmap.
func (w *site) mustOpen(m *guest, t *transport, peers ...*guest) uint32 {
	w.t.Helper()
	reply := w.say(m.open(peers...), t)
	o, ok := parseOpened(reply)
	if !ok || !m.session.sealed(reply) || o.count != len(peers) {
		w.t.Fatalf("not opened, but % x", reply)
	}
	return o.bitmap
}

func (w *site) node(m *guest) *node {
	w.s.mu.RLock()
	defer w.s.mu.RUnlock()
	return w.s.nodes[m.key]
}

func (w *site) active(m *guest) *transport { return w.node(m).active.Load() }

// line is a connection that remembers what was offered.
type line struct {
	frames [][]byte
	closed bool
}

func (l *line) offer(run []byte) {
	for datagram, rest, ok := cutFrame(run); ok; datagram, rest, ok = cutFrame(rest) {
		l.frames = append(l.frames, append([]byte(nil), datagram...))
	}
}

func (l *line) offerTrain(train []byte, stride int) {
	for ; len(train) > 0; train = train[min(stride, len(train)):] {
		l.frames = append(l.frames, append([]byte(nil), train[:min(stride, len(train))]...))
	}
}

func (l *line) close() { l.closed = true }

// connect admits a member over a connection.
func (w *site) connect(m *guest, addr string) (*line, *transport, *node) {
	w.t.Helper()
	l := &line{}
	t := streamTransport(l, netip.MustParseAddrPort(addr))
	a := m.admission()
	a.cookie = cookie{1, 2, 3}
	reply, n := w.s.admit(m.build(a), func(k cookie) bool { return k == cookie{1, 2, 3} }, t)
	if p, ok := parsePong(reply); !ok || n == nil || p.observed.IsValid() {
		w.t.Fatalf("not admitted: % x", reply)
	}
	return l, t, n
}
