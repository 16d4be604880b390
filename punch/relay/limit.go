package relay

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	challengesPerSource = 100 // a second
	challengeBurst      = 1000
	challengesTotal     = 10_000 // a second, so that forged sources buy little
	challengeTotalBurst = 20_000
	admissionsPerSource = 100 // a second
	admissionBurst      = 1000
	bucketSlots         = 4096
	refusalsTold        = 1 // a second, in the log: strangers cause them

	controlsPerNode = 100 // authenticated messages a second
	controlBurst    = 400

	movesPerNode = 10 // challenges a second
	moveBurst    = 20

	answersPerNode = 50 // to Binding requests, a second
	answerBurst    = 200

	rateBurst    = 100 * time.Millisecond // of what a node may send
	minRateBurst = 4 << 16                // bytes: some trains, however low the rate
)

// network is what limits count by: one customer's addresses.
func network(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 24
	if a.Is6() {
		bits = 56
	}
	p, _ := a.Prefix(bits) // fails only for the zero address, one network as well
	return p
}

// rate is a limit per second with a burst. It is constant.
type rate struct {
	per   uint64
	burst int64 // ns
}

func newRate(per uint64) rate {
	return rate{per, max(int64(rateBurst), int64(minRateBurst*uint64(time.Second)/per))}
}

// newLimit is a rate of so many a second that may come at once.
func newLimit(per, burst int) rate {
	return rate{uint64(per), int64(burst) * int64(time.Second) / int64(per)}
}

// meter measures one sender against a rate. It holds the time at which all that
// was taken is paid for. The zero meter is full. It is safe for concurrent use.
type meter struct{ paid atomic.Int64 }

// take takes n at a time of Server.clock, or says false and takes nothing.
func (m *meter) take(r *rate, now int64, n int) bool {
	cost := int64(uint64(n) * uint64(time.Second) / r.per)
	for {
		paid := m.paid.Load()
		next := max(paid, now) + cost
		if next-now > r.burst {
			return false
		}
		if m.paid.CompareAndSwap(paid, next) {
			return true
		}
	}
}

// buckets limits how often something happens per network. It has a fixed size,
// so nobody can fill memory with networks; two that share a slot, which nobody
// can predict, share the limit. It is safe for concurrent use.
type buckets struct {
	rate rate
	seed maphash.Seed

	slots [bucketSlots]meter
}

func newBuckets(per, burst int) *buckets {
	return &buckets{rate: newLimit(per, burst), seed: maphash.MakeSeed()}
}

// spend takes one from the bucket of an address's network. It says false, and
// takes none, when the bucket is empty.
func (b *buckets) spend(a netip.Addr, now int64) bool {
	return b.slots[maphash.Comparable(b.seed, network(a))%bucketSlots].take(&b.rate, now, 1)
}

// verifiedFor is how long credentials are taken for good without a look.
const (
	verifiedFor = 5 * time.Minute
	maxVerified = 4096
)

// verified remembers whose credentials are, by their hash. Only good ones are
// kept. It is safe for concurrent use.
type verified struct {
	mu      sync.Mutex
	entries map[[32]byte]verdict
}

type verdict struct {
	identity Identity
	until    int64
}

func (v *verified) get(hash [32]byte, now int64) (Identity, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.entries[hash]
	return e.identity, ok && now < e.until
}

func (v *verified) put(hash [32]byte, id Identity, now int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.entries) >= maxVerified {
		clear(v.entries)
	}
	v.entries[hash] = verdict{id, now + int64(verifiedFor)}
}

// clear forgets all.
func (v *verified) clear() {
	v.mu.Lock()
	defer v.mu.Unlock()
	clear(v.entries)
}
