package natlab

import (
	"testing"
	"time"
)

const portSamples = 24

// TestAllocations looks at the ports of every kind of NAT, while other flows of
// the home take some.
func TestAllocations(t *testing.T) {
	lab := newLab(t, Options{Delay: 2 * time.Millisecond})
	for nat, ok := range map[NAT]func(Allocation) bool{
		Masquerade:     func(a Allocation) bool { return a.Low == a.High },
		OtherPort:      func(a Allocation) bool { return a.Low == a.High && a.Low >= 20000 && a.High < 30000 },
		Sequential:     func(a Allocation) bool { return a.Step == 1 && a.Low >= sequenceStart },
		SequentialDown: func(a Allocation) bool { return a.Step == -2 },
		Stride:         func(a Allocation) bool { return a.Step == 4 },
		RandomOpen:     func(a Allocation) bool { return a.Step == 0 && a.High-a.Low > 1<<14 },
		Random:         func(a Allocation) bool { return a.Step == 0 && a.High-a.Low > 1<<14 },
		Block512:       inBlock(512),
		Block:          inBlock(1024),
		Block2048:      inBlock(2048),
	} {
		t.Run(string(nat), func(t *testing.T) {
			home := mustHome(t, lab, string(nat), nat)
			laptop, other := mustLaptop(t, home, "laptop-"+string(nat)), mustLaptop(t, home, "other-"+string(nat))
			got, err := laptop.Allocations(t.Context(), portSamples)
			if err != nil {
				t.Fatal(err)
			}
			if !ok(got) {
				t.Errorf("ports %v, step %d", got.Ports, got.Step)
			}
			before := got.Ports[portSamples-1]
			const churn = 7
			if err := other.Churn(churn); err != nil {
				t.Fatal(err)
			}
			got, err = laptop.Allocations(t.Context(), portSamples)
			if err != nil {
				t.Fatal(err)
			}
			if step := got.Step; step != 0 && int(got.Ports[0]) != int(before)+(churn+1)*step {
				t.Errorf("after %d flows of another host the port after %d is %d", churn, before, got.Ports[0])
			}
		})
	}
}

// inBlock is for ports that use all of a block: half of it, to be sure.
func inBlock(ports int) func(Allocation) bool {
	return func(a Allocation) bool {
		return a.Step == 0 && a.Low >= blockStart && int(a.High) < blockStart+ports && int(a.High-a.Low) > ports/2
	}
}

func TestAllocationOfPorts(t *testing.T) {
	for _, c := range []struct {
		ports     []uint16
		step      int
		low, high uint16
	}{
		{[]uint16{5, 6, 7}, 1, 5, 7},
		{[]uint16{9, 7, 5}, -2, 5, 9},
		{[]uint16{9, 7, 6}, 0, 6, 9},
		{[]uint16{9, 9}, 0, 9, 9},
	} {
		got := Allocation{Ports: c.ports}.complete()
		if got.Step != c.step || got.Low != c.low || got.High != c.high {
			t.Errorf("%v: %+v", c.ports, got)
		}
	}
}
