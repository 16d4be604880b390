package nattest_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch/nattest"
)

// TestOpenInputUnderLoss wants routers that accept input to be passed in time
// where a fifth of all packets is lost, those of signals too.
func TestOpenInputUnderLoss(t *testing.T) {
	const worlds, limit = 200, 3 * time.Second
	late := 0
	for seed := range uint64(worlds) {
		synctest.Test(t, func(t *testing.T) {
			if took, ok := underLoss(t, seed, limit); !ok {
				late++
				t.Logf("seed %d: no path after %v", seed, took)
			}
		})
	}
	if late > 0 {
		t.Errorf("%d of %d worlds are late", late, worlds)
	}
}

func underLoss(t *testing.T, seed uint64, limit time.Duration) (time.Duration, bool) {
	l := homeLink()
	l.Loss = 0.106 // 20 % from end to end
	w := nattest.NewWorld(seed, l)
	defer w.Stop()
	open := nattest.Masquerade()
	open.OpenInput = true
	k := kind{name: "open input", nat: &open}
	a, _ := laptop(w, 0, k, l, "192.168.1.2/24")
	b, _ := laptop(w, 1, k, l, "192.168.2.2/24")
	start(t, a)
	time.Sleep(time.Duration(rand.New(rand.NewPCG(seed, 3)).IntN(501)) * time.Millisecond)
	start(t, b)
	return met(a, b, limit)
}
