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
	wantInTime(t, 200, 0, func(t *testing.T, seed uint64) (time.Duration, bool) {
		return underLoss(t, seed, 3*time.Second)
	})
}

// wantInTime wants at most missed of so many worlds not to meet in time.
func wantInTime(t *testing.T, worlds uint64, missed int, run func(t *testing.T, seed uint64) (time.Duration, bool)) {
	t.Helper()
	late := 0
	for seed := range worlds {
		synctest.Test(t, func(t *testing.T) {
			if took, ok := run(t, seed); !ok {
				late++
				t.Logf("seed %d: no path after %v", seed, took)
			}
		})
	}
	if late > missed {
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
