package punch

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
)

// TestRestlessMember has a member name other addresses all the time. A router
// remembers each that a packet went to for half a minute.
func TestRestlessMember(t *testing.T) {
	const remembered = routerMemory
	inWorld(t, func(w *world) {
		a, b := w.gathered(1, outerA), w.gathered(2, outerB)
		w.setDrop(func(x wire) bool { return x.to != stunAddr() })
		meet(a, b)
		count := uint32(0)
		for began := time.Now(); time.Since(began) < 2*remembered; time.Sleep(100 * time.Millisecond) {
			var list []Candidate
			for range MaxCandidates {
				count++
				ip := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0xcb007200+count)))
				list = append(list, Candidate{Addr: netip.AddrPortFrom(ip, 5000), Type: Host})
			}
			b.signalTo(a, signal{kind: signalCall, candidates: list})
		}
		last, most := map[netip.AddrPort]time.Time{}, 0
		for _, x := range w.all() {
			if x.from != a.outer || x.to == stunAddr() {
				continue
			}
			last[x.to] = x.at
			now := 0
			for _, at := range last {
				if x.at.Sub(at) < remembered {
					now++
				}
			}
			most = max(most, now)
		}
		t.Logf("%d addresses named, %d tried, %d within %v", count, len(last), most, remembered)
		if most > maxNamed {
			t.Errorf("%d addresses within %v, want at most %d", most, remembered, maxNamed)
		}
		if len(last) < MaxCandidates {
			t.Errorf("%d addresses tried: this proves nothing", len(last))
		}
	})
}

const maxNamed = 5 * MaxCandidates
