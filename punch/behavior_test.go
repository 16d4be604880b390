package punch

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// translator gives out ports as some NAT does.
type translator struct {
	rng     *rand.Rand
	mapping Behavior
	choose  func(local uint16) uint16
	known   map[Sample]uint16 // only Local and Server are set
}

// samples are those of fresh sockets at two ports of a server and one of another,
// 10 ms apart; before each, others make up to churn mappings.
func (n *translator) samples(sockets, churn int) []Sample {
	servers := []netip.AddrPort{
		netip.MustParseAddrPort("198.51.100.1:3478"), netip.MustParseAddrPort("198.51.100.1:3479"),
		netip.MustParseAddrPort("198.51.100.2:3478"),
	}
	n.known = map[Sample]uint16{}
	at := time.Now()
	var list []Sample
	for range sockets {
		local := uint16(32768 + n.rng.IntN(28000))
		for _, server := range servers {
			for range n.rng.IntN(churn + 1) {
				n.choose(0)
			}
			mapped := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), n.port(local, server))
			list = append(list, Sample{Local: local, Server: server, Mapped: mapped, At: at})
			at = at.Add(10 * time.Millisecond)
		}
	}
	return list
}

func (n *translator) port(local uint16, server netip.AddrPort) uint16 {
	key := Sample{Local: local}
	switch n.mapping {
	case AddressAndPortDependent:
		key.Server = server
	case AddressDependent:
		key.Server = netip.AddrPortFrom(server.Addr(), 0)
	}
	if _, ok := n.known[key]; !ok {
		n.known[key] = n.choose(local)
	}
	return n.known[key]
}

func TestClassify(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0x636c617373))
		for _, mapping := range []Behavior{EndpointIndependent, AddressDependent, AddressAndPortDependent} {
			n := &translator{rng: rng, mapping: mapping}
			sockets := 16 / min(int(mapping), 3)
			sockets++
			check := func(want NAT, samples []Sample) {
				got := Classify(samples)
				low, high := got.Low, got.High
				got.Low, got.High = 0, 0
				if got != want {
					t.Fatalf("seed %d: %v, want %v from %v", seed, got, want, samples)
				}
				if (want.Allocation == Block) != (low != 0) || high < low {
					t.Fatalf("seed %d: block from %d to %d", seed, low, high)
				}
			}
			n.choose = func(local uint16) uint16 { return local }
			check(NAT{Mapping: EndpointIndependent, Preserves: true, Allocation: Preserving}, n.samples(sockets, 3))

			step := rng.IntN(9) - 4
			if step == 0 {
				step = 256
			}
			next := uint16(rng.IntN(1 << 16))
			n.choose = func(uint16) uint16 { next += uint16(step); return next }
			check(NAT{Mapping: mapping, Allocation: Sequential, Step: step}, n.samples(sockets, 5))

			size := 512 << rng.IntN(3)
			first := 1024 + size*rng.IntN(30)
			n.choose = func(uint16) uint16 { return uint16(first + rng.IntN(size)) }
			check(NAT{Mapping: mapping, Allocation: Block}, n.samples(sockets, 0))

			n.choose = func(uint16) uint16 { return uint16(1024 + rng.IntN(64512)) }
			check(NAT{Mapping: mapping, Allocation: Random}, n.samples(sockets, 0))
		}
	}
}

// TestClassifyFew wants nothing claimed of what the samples do not tell.
func TestClassifyFew(t *testing.T) {
	if got := Classify(nil); got != (NAT{}) {
		t.Errorf("of nothing: %v", got)
	}
	addr := netip.MustParseAddrPort
	x := Sample{Local: 1000, Server: addr("198.51.100.1:1"), Mapped: addr("203.0.113.1:7000")}
	if got := Classify([]Sample{x}); got != (NAT{}) {
		t.Errorf("of one sample: %v", got)
	}
	y := x
	y.Server, y.Mapped = addr("198.51.100.1:2"), addr("203.0.113.1:7100")
	if got := Classify([]Sample{x, y}); got != (NAT{Mapping: AddressAndPortDependent}) {
		t.Errorf("of two samples: %v", got)
	}
}

// TestClassifyBlock wants the estimated block to be about the real one.
func TestClassifyBlock(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0x626c6f636b))
		const low, size = 5120, 1024
		n := &translator{rng: rng, mapping: AddressAndPortDependent, choose: func(uint16) uint16 { return uint16(low + rng.IntN(size)) }}
		got := Classify(n.samples(6, 0))
		if width := int(got.High) - int(got.Low) + 1; width < size/2 || width > size*3/2 {
			t.Errorf("seed %d: from %d to %d", seed, got.Low, got.High)
		}
	}
}

// TestChurn wants the mappings of others counted.
func TestChurn(t *testing.T) {
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 0x636875726e))
		next := uint16(rng.IntN(1 << 16))
		n := &translator{rng: rng, mapping: AddressAndPortDependent, choose: func(uint16) uint16 { next -= 2; return next }}
		samples := n.samples(6, 2) // one per sample, 100 a second
		if got := churn(samples, Classify(samples)); got < 30 || got > 200 {
			t.Errorf("seed %d: %.0f mappings a second", seed, got)
		}
	}
}
