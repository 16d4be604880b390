package nattest_test

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/punch/nattest"
)

// go test ./punch/nattest -run TestHardCells -hard 1000 -v
var (
	hardWorlds = flag.Int("hard", 10, "how many seeded worlds per cell of TestHardCells to run")
	hardSeed   = flag.Uint64("hardseed", 0, "run only the world of this seed in every cell")
)

// cell is a pair of NATs of which one at least gives out ports that the peer
// cannot know, and what is promised.
type cell struct {
	name   string
	nats   [2]nattest.NAT
	churn  float64 // most unrelated flows per second through either NAT
	parted bool    // nothing arrives without a relay
	loss   float64 // on the way from one laptop to the other
	rate   float64 // of success, at least
	most   time.Duration
	rounds time.Duration // how long further rounds are awaited for
	later  float64       // rate of success after that
}

func cells() []cell {
	masquerade, open := nattest.Masquerade(), nattest.Masquerade()
	open.OpenInput = true
	moved := nattest.NAT{Filtering: apdm}
	sequential := nattest.NAT{Mapping: apdm, Filtering: apdm, Sequential: 1}
	down := nattest.NAT{Mapping: apdm, Filtering: apdm, Sequential: -2}
	random := nattest.NAT{Mapping: apdm, Filtering: apdm}
	block := func(size int) nattest.NAT { return nattest.NAT{Mapping: apdm, Filtering: apdm, Block: size} }
	const predict, birthday, small = 5 * time.Second, 12 * time.Second, 4 * time.Second
	pair := func(a, b nattest.NAT) [2]nattest.NAT { return [2]nattest.NAT{a, b} }
	return []cell{
		{name: "sequential × EIM", nats: pair(sequential, masquerade), churn: 100, rate: 0.95, most: predict},
		{name: "sequential −2 × EIM moved", nats: pair(down, moved), churn: 100, rate: 0.95, most: predict},
		{name: "sequential × open input", nats: pair(sequential, open), churn: 100, rate: 0.95, most: predict},
		{name: "sequential × sequential", nats: pair(sequential, sequential), churn: 100, rate: 0.95, most: predict},
		{name: "sequential × sequential −2", nats: pair(sequential, down), churn: 100, rate: 0.95, most: predict},
		{name: "random × EIM", nats: pair(random, masquerade), rate: 0.95, most: birthday},
		{name: "random × open input", nats: pair(random, open), rate: 0.95, most: birthday},
		{name: "block 512 × EIM", nats: pair(block(512), masquerade), rate: 0.99, most: small},
		{name: "block 2048 × EIM", nats: pair(block(2048), masquerade), rate: 0.99, most: small},
		{name: "block 2048 × open input", nats: pair(block(2048), open), rate: 0.99, most: small},
		{name: "block 1024 × block 1024", nats: pair(block(1024), block(1024)), rate: 0.20, most: birthday, rounds: 4 * time.Minute, later: 0.60},
		{name: "sequential × EIM, 10 % loss", nats: pair(sequential, masquerade), churn: 50, loss: 0.1, rate: 0.9, most: 2 * predict},
		{name: "sequential × sequential, 10 % loss", nats: pair(sequential, sequential), churn: 50, loss: 0.1, rate: 0.8, most: 2 * predict},
		{name: "random × EIM, 10 % loss", nats: pair(random, masquerade), loss: 0.1, rate: 0.9, most: birthday},
	}
}

// result is what one world came to.
type result struct {
	took    time.Duration
	met     bool // in time
	later   bool
	packets int // of both sides in hard rounds
}

// TestHardCells lets laptops meet behind NATs that give out ports nobody knows,
// 40 ms of round trip apart, with a relay to talk over meanwhile.
func TestHardCells(t *testing.T) {
	for _, c := range cells() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var results []result
			var failed []uint64
			first, count := uint64(1), uint64(*hardWorlds)
			if *hardSeed != 0 {
				first, count = *hardSeed, 1
			}
			for seed := first; seed < first+count; seed++ {
				var r result
				synctest.Test(t, func(t *testing.T) { r = c.run(t, seed) })
				results = append(results, r)
				if !r.met {
					failed = append(failed, seed)
				}
			}
			c.judge(t, results, failed)
		})
	}
}

func (c cell) judge(t *testing.T, results []result, failed []uint64) {
	n := float64(len(results))
	var took []time.Duration
	var packets []int
	later := 0
	for _, r := range results {
		if r.met {
			took = append(took, r.took)
		}
		if r.met || r.later {
			later++
		}
		packets = append(packets, r.packets)
	}
	slices.Sort(took)
	slices.Sort(packets)
	if len(took) > 0 {
		t.Logf("%d of %.0f in %v, median %v, worst %v; later %d; packets median %d, most %d", len(took), n, c.most,
			took[len(took)/2], took[len(took)-1], later, packets[len(packets)/2], packets[len(packets)-1])
	}
	if float64(len(took)) < least(n, c.rate) {
		t.Errorf("%d of %.0f worlds, want %.2f; failed seeds %v", len(took), n, c.rate, failed[:min(len(failed), 20)])
	}
	if c.later > 0 && float64(later) < least(n, c.later) {
		t.Errorf("%d of %.0f worlds after more rounds, want %.2f", later, n, c.later)
	}
}

// least is how many of n trials succeed at least when the rate is what it should
// be, but for chance (three standard deviations; nothing at 1,000 and more).
func least(n, rate float64) float64 {
	if n >= 1000 {
		return n * rate
	}
	return n*rate - 3*math.Sqrt(n*rate*(1-rate)) - 1
}

func (c cell) run(t *testing.T, seed uint64) result {
	rng := rand.New(rand.NewPCG(seed, 0x68617264))
	w, a, b := c.world(seed, rng)
	defer w.Stop()
	start(t, a)
	time.Sleep(time.Duration(rng.IntN(501)) * time.Millisecond)
	start(t, b)
	stops := []func(){a.Stream(b, time.Second), b.Stream(a, time.Second)}
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	r := result{}
	r.took, r.met = metDirect(a, b, c.most)
	if !r.met && c.rounds > 0 {
		_, r.later = metDirect(a, b, c.rounds)
	}
	for _, n := range []*nattest.Node{a, b} {
		_, packets := n.Hard()
		r.packets += packets
	}
	const watched = 25 // that paths stay is a matter of a few worlds
	if r.met && seed <= watched {
		c.expectKept(t, seed, a, b)
	}
	for _, f := range w.Faults() {
		t.Errorf("seed %d: %s", seed, f)
	}
	return r
}

// world has two laptops with the cell's NATs, and a relay.
func (c cell) world(seed uint64, rng *rand.Rand) (w *nattest.World, a, b *nattest.Node) {
	w = nattest.NewWorld(seed, homeLink())
	w.NewRelay(homeLink())
	link := homeLink()
	link.Loss = 1 - math.Sqrt(1-c.loss)
	var nodes []*nattest.Node
	for i := range 2 {
		nat := c.nats[i]
		n, router := laptop(w, i, kind{nat: &nat}, link, fmt.Sprintf("192.168.%d.2/24", i+1))
		nodes = append(nodes, n)
		if c.churn > 0 {
			disturb(w, router, rng.Float64()*c.churn, rng.Uint64())
		}
	}
	if c.parted {
		w.Part(netip.MustParseAddr("203.0.113.20"), netip.MustParseAddr("203.0.113.21"))
	}
	return w, nodes[0], nodes[1]
}

// disturb makes flows through a router, at random times, for a minute.
func disturb(w *nattest.World, router *nattest.Router, rate float64, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	host := router.LAN().NewHost(nattest.Link{}, netip.MustParsePrefix("192.168.200.9/16"))
	end := time.Now().Add(time.Minute)
	port := uint16(1024)
	var next func()
	next = func() {
		port++
		_ = host.Send([]byte("x"), port, netip.MustParseAddrPort("198.51.100.77:9"), 0)
		if time.Now().Before(end) {
			w.After(time.Duration(rng.ExpFloat64()/rate*float64(time.Second)), next)
		}
	}
	next()
}

// expectKept wants the path to stay, to carry data, and all other sockets closed.
func (c cell) expectKept(t *testing.T, seed uint64, a, b *nattest.Node) {
	if c.loss > 0 {
		return
	}
	time.Sleep(5 * time.Second)
	settled := time.Now()
	time.Sleep(40 * time.Second)
	if kinds := isHard(a.Path(b)) || isHard(b.Path(a)); !kinds {
		t.Errorf("seed %d: paths of type %v and %v", seed, a.Path(b).Type, b.Path(a).Type)
	}
	for _, pair := range [][2]*nattest.Node{{a, b}, {b, a}} {
		if !isDirect(pair[0], pair[1]) {
			t.Errorf("seed %d: the path is lost", seed)
		}
		if n := len(pair[0].Arrivals(pair[1], settled)); n < 38 {
			t.Errorf("seed %d: %d packets of 40 arrived", seed, n)
		}
		if n := pair[0].Spare(); n > 16 {
			t.Errorf("seed %d: %d sockets stay open", seed, n)
		}
	}
}

// TestHardBoth wants peers whose ports nobody can know to stay on the relay, and to
// try no more than their openers and calls.
func TestHardBoth(t *testing.T) {
	for seed := range uint64(5) {
		random := nattest.NAT{Mapping: apdm, Filtering: apdm}
		c := cell{nats: [2]nattest.NAT{random, random}}
		c.during(t, seed, func(t *testing.T, a, b *nattest.Node) {
			time.Sleep(10 * time.Minute)
			for _, n := range []*nattest.Node{a, b} {
				if rounds, packets := n.Hard(); rounds+packets > 0 {
					t.Errorf("seed %d: %d packets in %d rounds", seed, packets, rounds)
				}
				if open := n.Spare(); open > 0 {
					t.Errorf("seed %d: %d sockets stay open", seed, open)
				}
			}
			if p := a.Path(b); p.Type != punch.Relayed {
				t.Errorf("seed %d: path %v", seed, p)
			}
		})
	}
}

func isHard(p punch.Path) bool { return p.Type == punch.Predicted || p.Type == punch.Birthday }

// TestBlock wants all mappings in a block of ports, and packets dropped when it
// is full.
func TestBlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64
		p := newProbe(nattest.NAT{Mapping: apdm, Filtering: apdm, Block: size})
		var ports []uint16
		for i := range uint16(size) {
			ports = append(ports, p.mapped(t, 1024+i, 0, serverPort).Port())
		}
		slices.Sort(ports)
		if low := ports[0]; low < 1024 || int(ports[size-1]-low) != size-1 {
			t.Errorf("%d ports from %d to %d", size, low, ports[size-1])
		}
		if from := p.mapped(t, 5000, 0, serverPort); from.IsValid() {
			t.Errorf("a packet leaves from %v with all ports taken", from)
		}
	})
}
