package main

import (
	"context"
	"errors"
	"fmt"
)

const (
	smallSize  = 64
	largeSize  = 1200
	smallPace  = 20_000 // packets per second
	largePace  = 1_000_000_000
	microsPerS = 1e6
)

// flood offers as many UDP packets of a size as the sender can and counts
// those that arrive.
func (b *bench) flood(name string, size int) testCase {
	m := metric(fmt.Sprintf("udp%dKpps", size))
	run := func(ctx context.Context, t *tunnel, s sample) error {
		r, err := b.udp(ctx, t, size, 0)
		if err != nil {
			return err
		}
		_, packets, err := r.arrived()
		s[m] = packets / r.End.Sum.Seconds / 1000
		return err
	}
	return testCase{name, "", []row{{m, fmt.Sprintf("UDP %d B flood received, kpps", size)}}, run}
}

// pacedLarge sends at a speed that a good tunnel carries whole.
func (b *bench) pacedLarge() testCase {
	const gone metric = "udp1200At1GbpsLostPercent"
	run := func(ctx context.Context, t *tunnel, s sample) error {
		r, err := b.udp(ctx, t, largeSize, largePace)
		if err != nil {
			return err
		}
		s[gone], _, err = r.arrived()
		return err
	}
	return testCase{"paced1200", "", []row{{gone, "UDP 1200 B at 1 Gbit/s, lost %"}}, run}
}

// pacedSmall sends at a pace that costs CPU time for each packet.
func (b *bench) pacedSmall() testCase {
	const (
		sender   metric = "udp64At20kppsMicrosA"
		receiver metric = "udp64At20kppsMicrosB"
		gone     metric = "udp64At20kppsLostPercent"
	)
	rows := []row{
		{sender, "UDP 64 B at 20 kpps, sender, µs/packet"},
		{receiver, "  receiver, µs/packet"},
		{gone, "  lost, %"},
	}
	run := func(ctx context.Context, t *tunnel, s sample) error {
		var r iperfResult
		used, err := t.spend(func() (err error) {
			r, err = b.udp(ctx, t, smallSize, smallPace*smallSize*8)
			return err
		})
		if err != nil {
			return err
		}
		lost, packets, err := r.arrived()
		if err != nil {
			return err
		}
		if packets <= 0 {
			return errors.New("none of the paced packets arrived")
		}
		s[gone] = lost
		s[sender] = used.daemons[0] / r.End.Sum.Packets * microsPerS
		s[receiver] = used.daemons[1] / packets * microsPerS
		return nil
	}
	return testCase{"paced64", "", rows, run}
}

// udp sends packets of a size at a speed in bit/s; 0 is as fast as it can.
func (b *bench) udp(ctx context.Context, t *tunnel, size, speed int) (iperfResult, error) {
	return b.stream(t, 1).iperf(ctx, "-u", "-l", fmt.Sprint(size), "-b", fmt.Sprint(speed))
}
