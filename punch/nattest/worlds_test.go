package nattest_test

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

// go test ./punch/nattest -run TestWorlds -seed 7
var (
	worlds   = flag.Uint64("worlds", 300, "how many seeded worlds to run")
	onlySeed = flag.Uint64("seed", 0, "run only the world of this seed")
)

// kind is what a laptop can be attached to.
type kind struct {
	name string
	nat  *nattest.NAT // nil: a public address
	ipv6 bool
}

func (k kind) hard() bool { return k.nat != nil && k.nat.Mapping != eim }

// takesStrangers says that a peer gets in whose port nobody can know: it need
// only be the right address, or not even that.
func (k kind) takesStrangers() bool { return k.nat == nil || k.nat.Filtering != apdm }

func kinds() []kind {
	masquerade, open := nattest.Masquerade(), nattest.Masquerade()
	open.OpenInput = true
	return []kind{
		{name: "none"},
		{name: "masquerade", nat: &masquerade},
		{name: "masquerade with open input", nat: &open},
		{name: "EIM/EIF", nat: &nattest.NAT{Preserve: true}},
		{name: "EIM/ADF", nat: &nattest.NAT{Filtering: adm, Preserve: true}},
		{name: "EIM/APDF without preservation", nat: &nattest.NAT{Filtering: apdm}},
		{name: "IPv6", nat: &masquerade, ipv6: true},
		{name: "EDM", nat: &nattest.NAT{Mapping: apdm, Filtering: apdm}},
	}
}

// spec is a drawn world: two laptops and the Internet between them.
type spec struct {
	seed   uint64
	kinds  [2]kind
	links  [2]nattest.Link // to the Internet
	server nattest.Link
	skew   time.Duration
	lan    string // of the second laptop; equal prefixes overlap
}

func drawSpec(seed uint64) spec {
	r := rand.New(rand.NewPCG(seed, 1))
	all := kinds()
	s := spec{seed: seed, skew: time.Duration(r.IntN(501)) * time.Millisecond}
	s.kinds = [2]kind{all[r.IntN(len(all))], all[r.IntN(len(all))]}
	ms := func() time.Duration { // 1 to 300 ms, each magnitude as often as the others
		return time.Duration(math.Pow(300, r.Float64()) * float64(time.Millisecond))
	}
	var link nattest.Link
	if r.IntN(2) == 0 {
		link.Loss = 1 - math.Sqrt(1-0.3*r.Float64()) // a path crosses two links
	}
	if r.IntN(2) == 0 {
		link.Duplicate = 0.02
	}
	path := ms()
	for i := range s.links {
		link.Delay = path / 2
		link.Jitter = time.Duration(r.Float64() * 0.2 * float64(path))
		s.links[i] = link
	}
	s.server = nattest.Link{Delay: ms() / 2, Loss: link.Loss}
	s.lan = []string{"192.168.1.3/24", "192.168.2.3/24"}[r.IntN(2)]
	return s
}

func (s spec) String() string {
	return fmt.Sprintf("seed %d: %s and %s, path %v, jitter %v, loss %.2f, server %v, skew %v, LAN %s", s.seed,
		s.kinds[0].name, s.kinds[1].name, s.rtt()/2, s.links[0].Jitter, s.loss(), s.server.Delay, s.skew, s.lan)
}

// rtt is the round trip between the laptops at worst, jitter included.
func (s spec) rtt() time.Duration {
	return 2 * (s.links[0].Delay + s.links[1].Delay + s.links[0].Jitter + s.links[1].Jitter)
}

// loss is the probability that a packet from one to the other is lost.
func (s spec) loss() float64 { return 1 - (1-s.links[0].Loss)*(1-s.links[1].Loss) }

// direct says that the theory allows a path without prediction of ports.
func (s spec) direct() bool {
	a, b := s.kinds[0], s.kinds[1]
	if a.ipv6 && b.ipv6 {
		return true
	}
	return (!a.hard() || b.takesStrangers()) && (!b.hard() || a.takesStrangers())
}

// guessable says that a path takes a hard round, which may fail.
func (s spec) guessable() bool { return !s.direct() && s.kinds[0].hard() != s.kinds[1].hard() }

// moves is how often a settled path may move. Where a fifth of all packets and
// more is lost, all checks of a path are lost now and then (1 world in 10,000),
// and a second one that is just as good may take over once.
func (s spec) moves() int {
	if s.kinds[0].ipv6 && s.kinds[1].ipv6 && s.loss() >= 0.2 {
		return 1
	}
	return 0
}

// lost says that a path was given up, not replaced.
func lost(moves []nattest.Move) bool {
	return slices.ContainsFunc(moves, func(m nattest.Move) bool { return !m.Path.Addr.IsValid() })
}

// patience is how long both sides may take to a path.
func (s spec) patience() time.Duration {
	if s.loss() > 0 && s.mayPoison() {
		return 3 * time.Minute
	}
	if s.loss() > 0 {
		return 20 * time.Second
	}
	// Gathering and the signals go through the server, the checks do not.
	return 2*time.Second + 4*max(s.rtt(), s.rtt()+2*s.server.Delay)
}

// mayPoison says that a call and its answer can take longer than checks wait for
// them, so that they may reach a router with open input too early: then only
// its forgetting helps.
func (s spec) mayPoison() bool {
	open := func(k kind) bool { return k.nat != nil && k.nat.OpenInput }
	if !open(s.kinds[0]) && !open(s.kinds[1]) {
		return false
	}
	const hold, rto = time.Second, 200 * time.Millisecond
	signal := s.rtt()/2 + 2*s.server.Delay
	return 2*signal+rto+2*s.server.Delay+s.rtt()/2 > hold // one segment lost on the way
}

// laptop attaches the i-th laptop as kind k says.
func laptop(w *nattest.World, i int, k kind, l nattest.Link, lan string) (*nattest.Node, *nattest.Router) {
	wan := netip.AddrFrom4([4]byte{203, 0, 113, byte(20 + i)})
	if k.nat == nil {
		return w.NewNode(w.Internet().NewHost(l, netip.PrefixFrom(wan, 32)), l), nil
	}
	router := w.Internet().NewRouter(*k.nat, wan, l)
	addrs := []netip.Prefix{netip.MustParsePrefix(lan)}
	if k.ipv6 {
		addrs = append(addrs, netip.MustParsePrefix(fmt.Sprintf("2001:db8:%d::2/64", i+1)))
	}
	return w.NewNode(router.LAN().NewHost(nattest.Link{}, addrs...), l), router
}

// TestRestless lets events come as fast as they can on both sides of a dead
// link while signals go on: every one of them asks for checks at once.
func TestRestless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := nattest.NewWorld(14, homeLink())
		defer w.Stop()
		a, _ := laptop(w, 0, kinds()[1], homeLink(), "192.168.1.2/24")
		b, router := laptop(w, 1, kinds()[1], homeLink(), "192.168.2.2/24")
		b.Plant(punch.Candidate{Addr: netip.MustParseAddrPort("203.0.113.201:1000"), Type: punch.ServerReflexive})
		connect(t, a, b)
		router.SetLink(nattest.Link{Down: true})
		for range 1000 {
			for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
				pair[0].Agent().NetworkChanged()
				pair[0].Agent().Demand(pair[1].Key())
			}
			time.Sleep(10 * time.Millisecond)
		}
		expectNoFaults(t, w)
	})
}

// TestWorlds lets two laptops meet in many worlds and holds what they do
// against the design: a path wherever theory allows one, soon, for good, and
// never a packet too many or to where none may go.
func TestWorlds(t *testing.T) {
	eachWorld(t, *worlds, func(t *testing.T, seed uint64) { drawSpec(seed).run(t) })
}

// eachWorld runs f with the seed of each of so many worlds, or of the one asked for.
func eachWorld(t *testing.T, count uint64, f func(t *testing.T, seed uint64)) {
	first, last := uint64(1), count
	if *onlySeed != 0 {
		first, last = *onlySeed, *onlySeed
	}
	for seed := first; seed <= last; seed++ {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, seed) })
		})
	}
}

func (s spec) run(t *testing.T) {
	w := nattest.NewWorld(s.seed, s.server)
	defer w.Stop()
	a, _ := laptop(w, 0, s.kinds[0], s.links[0], "192.168.1.2/24")
	b, _ := laptop(w, 1, s.kinds[1], s.links[1], s.lan)
	start(t, a)
	time.Sleep(s.skew)
	start(t, b)
	if s.direct() {
		s.expectPath(t, a, b)
	} else {
		s.expectPatience(t, a, b)
	}
	for _, f := range w.Faults() {
		t.Errorf("%v: %s", s, f)
	}
}

// expectPath wants both sides to have a path soon and to keep it, idle and
// under traffic.
func (s spec) expectPath(t *testing.T, a, b *nattest.Node) {
	if took, ok := met(a, b, s.patience()); !ok {
		t.Errorf("%v: no path after %v: %v, %v", s, took, a.Path(b).Addr, b.Path(a).Addr)
		return
	}
	const settle, quiet, busy, interval = 10 * time.Second, time.Minute, 20 * time.Second, 50 * time.Millisecond
	time.Sleep(settle)
	settled := time.Now()
	time.Sleep(quiet)
	traffic := time.Now()
	stops := []func(){a.Stream(b, interval), b.Stream(a, interval)}
	time.Sleep(busy)
	for _, stop := range stops {
		stop()
	}
	for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
		if moves := pair[0].Moves(pair[1], settled); len(moves) > s.moves() || lost(moves) {
			t.Errorf("%v: the path moved %d times, last to %v", s, len(moves), moves[len(moves)-1].Path.Addr)
		}
		least := (1 - s.loss() - 0.15) * float64(busy/interval)
		if n := len(pair[0].Arrivals(pair[1], traffic)); float64(n) < least {
			t.Errorf("%v: %d packets arrived, want %.0f", s, n, least)
		}
	}
}

// expectPatience wants two sides that cannot meet to keep trying, moderately. Where
// a hard round found a path after all, it is checked as often as it needs.
func (s spec) expectPatience(t *testing.T, a, b *nattest.Node) {
	const busy, most = 3 * time.Minute, 1000
	stops := []func(){a.Stream(b, time.Second), b.Stream(a, time.Second)}
	time.Sleep(busy)
	before := []uint64{cadence(a), cadence(b)}
	time.Sleep(busy)
	for _, stop := range stops {
		stop()
	}
	if s.guessable() && (a.Path(b).Addr.IsValid() || b.Path(a).Addr.IsValid()) {
		return
	}
	for i, n := range []*nattest.Node{a, b} {
		if before[i] > most || cadence(n)-before[i] > most || cadence(n) == before[i] {
			t.Errorf("%v: %d checks, then %d more", s, before[i], cadence(n)-before[i])
		}
	}
	if !s.guessable() && (a.Path(b).Addr.IsValid() || b.Path(a).Addr.IsValid()) {
		t.Errorf("%v: a path where none can be: %v, %v", s, a.Path(b).Addr, b.Path(a).Addr)
	}
}

// cadence is how many packets a node sent outside of hard rounds.
func cadence(n *nattest.Node) uint64 {
	_, hard := n.Hard()
	return n.Checks() - uint64(hard)
}

func start(t *testing.T, n *nattest.Node) {
	t.Helper()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
}

// met waits until both have a path to each other and says how long it took.
func met(a, b *nattest.Node, most time.Duration) (time.Duration, bool) {
	begin := time.Now()
	for time.Since(begin) < most {
		if a.Path(b).Addr.IsValid() && b.Path(a).Addr.IsValid() {
			return time.Since(begin), true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begin), false
}

// TestForbidden has a peer publish addresses where no packet may go, and others
// whose publication is an attempt to make a victim's load.
func TestForbidden(t *testing.T) {
	for _, addr := range []string{
		"0.0.0.0:1000", "127.0.0.1:1000", "224.0.0.1:1000", "255.255.255.255:1000", "240.0.0.1:1000",
		"203.0.113.200:0", "100.100.3.4:1000", "198.51.100.1:3478", "198.51.100.1:3479", "[::]:1000",
		"[::1]:1000", "[ff02::1]:1000", "[fd00:aa::7]:1000", "[2001:db8:ffff::1]:3478", "203.0.113.201:1000",
		"10.99.99.99:1000", "192.168.77.1:1000", "172.16.1.1:1000", "100.64.1.1:1000", "[fd12::1]:1000", "[fe80::1]:1000", "192.168.1.255:1000",
	} {
		synctest.Test(t, func(t *testing.T) {
			w, a, b := homes(1)
			defer w.Stop()
			planted := punch.Candidate{Addr: netip.MustParseAddrPort(addr), Type: punch.ServerReflexive}
			b.Plant(planted)
			start(t, a)
			start(t, b)
			if _, ok := met(a, b, 2*time.Second); !ok {
				t.Errorf("with %s among the candidates there is no path", addr)
			}
			a.Agent().NetworkChanged()
			time.Sleep(time.Minute)
			for _, f := range w.Faults() {
				t.Errorf("with %s among the candidates: %s", addr, f)
			}
		})
	}
}

// TestVictim has many peers name one address that never answers.
func TestVictim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := nattest.NewWorld(1, nattest.Link{Delay: 10 * time.Millisecond})
		defer w.Stop()
		victim := netip.MustParseAddr("203.0.113.200")
		const peers, ports = 12, 8
		for i := range peers {
			k := kinds()[1]
			n, _ := laptop(w, i, k, nattest.Link{Delay: 10 * time.Millisecond}, "192.168.1.2/24")
			var planted []punch.Candidate
			for port := range uint16(ports) {
				planted = append(planted, punch.Candidate{Addr: netip.AddrPortFrom(victim, 1000+port), Type: punch.ServerReflexive})
			}
			n.Plant(planted...)
			start(t, n)
		}
		time.Sleep(time.Minute)
		for _, f := range w.Faults() {
			t.Error(f)
		}
	})
}
